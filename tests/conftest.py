"""What every test stands on: fixed seeds, no network, one thread for each worker."""

from __future__ import annotations

import os

# Before anything imports datasets, transformers or matplotlib: they read these once.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("MPLBACKEND", "agg")

import ipaddress
import random
import shutil
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy
import pytest
import torch

if TYPE_CHECKING:
    from playwright.sync_api import Browser

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The same random numbers for every test, whichever ran before it. Returns the seed, for generators of one's own."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fail the test that looks up or connects to anything but this machine; yields the list of such attempts.

    The failure passes through `except Exception`, and an attempt made in a thread is still found at the end.
    """
    attempts: list[str] = []

    def guard(function: Any, host_of: Any) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            host = host_of(*args, **kwargs)
            if not _is_local(host):
                attempts.append(str(host))
                pytest.fail(f"the test asked the network for {host!r}: tests run offline")
            return function(*args, **kwargs)

        return guarded

    def peer(sock: socket.socket, address: Any, *rest: Any) -> Any:
        # A Unix socket's address is a path: it never leaves the machine.
        return address[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else "localhost"

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guard(getattr(socket.socket, name), peer))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        monkeypatch.setattr(socket, name, guard(getattr(socket, name), lambda host, *args, **kwargs: host))
    yield attempts
    assert not attempts, f"the test asked the network for {attempts}: tests run offline"


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of this machine's browser. Where the browser or its driver is missing, the test is skipped."""
    pytest.importorskip("playwright.sync_api", reason="playwright, the browser's driver, is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    return path or pytest.skip(f"no browser on this machine: none of {', '.join(names)} is on the PATH")


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """A browser for one file of tests, and no longer: its driver keeps an event loop running in this thread, and with it
    neither a second driver nor `asyncio.run` of another file's tests would start."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Only this machine has a name: what asks the network fails, as it would in a plane.
        args = ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--disable-gpu", "--no-sandbox"]
        browser = driver.chromium.launch(executable_path=chromium, args=args)
        yield browser
        browser.close()


def _is_local(host: Any) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
