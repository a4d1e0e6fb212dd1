"""What every test stands on: fixed seeds, no network, one thread for each worker."""

from __future__ import annotations

import os

# Before anything imports datasets, transformers or matplotlib: they read these once.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("MPLBACKEND", "agg")

import ipaddress
import random
import socket
from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy
import pytest
import torch

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


def _is_local(host: Any) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
