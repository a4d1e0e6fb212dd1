"""Grading one notebook from outside: a process of its own in a folder of its own, watched, ended, and its results read.

Nothing of the notebook is executed or even parsed here. What the process found is taken from its results file alone, from
lines that carry the nonce.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dsv3_mini.course.grade.results import Graded, Submission
from dsv3_mini.course.grade.verdict import verdict

GB = 10**9
LARGEST_NOTEBOOK, MOST_ON_DISK, LONGEST_LOG = 100 * 10**6, GB, 10**7
STARTUP_SECONDS, GRACE_SECONDS, POLL_SECONDS = 180.0, 5.0, 0.1
SLACK = 1.1  # pages that are not data also count as memory held: the limit on data is to be met first
KEPT = (
    "PATH",
    "HOME",
    "USERPROFILE",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "MPLCONFIGDIR",
    "SYSTEMROOT",
    "LD_LIBRARY_PATH",
)
QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "MPLBACKEND": "agg",
}
MARK = "DSV3_GRADE"
WHERE = "{where}"  # the verdict knows it
START = (
    "import json, sys; job = json.loads(sys.stdin.buffer.readline()); sys.path[:] = job.pop('path'); "
    "from dsv3_mini.course.grade.worker import main; main(job)"
)


@dataclass(frozen=True)
class Limits:
    """Of one notebook: seconds in all (from when its first cell starts), seconds of one cell, memory in GB."""

    seconds: float = 300.0
    cell_seconds: float = 120.0
    memory: float = 3.0


def grade(submission: Submission, checks: str, limits: Limits, stop: threading.Event | None = None) -> Graded:
    """Run and check one notebook. Never raises for what the notebook does.

    Args:
        checks: import path of the lesson's checker module.
        stop: set it to have the process ended early.
    """
    with tempfile.TemporaryDirectory(prefix="dsv3-grade-", ignore_cleanup_errors=True) as base:
        folder, results = Path(base).resolve() / "work", Path(base).resolve() / secrets.token_hex(8)
        folder.mkdir()
        results.touch()
        log = Log(results, secrets.token_hex(16))
        job = {
            "path": [os.path.abspath(p) for p in sys.path if p] + [str(Path(__file__).parents[3])],
            "notebook": str(folder / submission.file.name),
            "problem": _copy(submission.file, folder),
            "checks": checks,
            "folder": str(folder),
            "results": str(results),
            "nonce": log.nonce,
            "memory": int(limits.memory * GB),
            "seconds": limits.seconds,
            "cell_seconds": limits.cell_seconds,
        }
        with _Process(folder) as process:
            process.tell(job)
            ended = _watch(process, log, limits, folder, stop or threading.Event())
        ended = ended or process.how_it_ended()
        log.read()
        return verdict(submission, log.events, "" if log.complete else ended, process.seconds, process.most_memory)


class Log:
    """The results file as the process writes it."""

    def __init__(self, path: Path, nonce: str) -> None:
        self.path, self.nonce = path, nonce
        self.events: list[dict[str, Any]] = []
        self.lines = 0

    def read(self) -> bool:
        """Take in what is new; whether there was anything."""
        try:
            with self.path.open("rb") as file:
                lines = file.read(LONGEST_LOG).split(b"\n")[:-1]
        except OSError:
            return False
        new, self.lines, before = lines[self.lines :], len(lines), len(self.events)
        for line in new:
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("nonce") == self.nonce:
                    self.events.append(event)
        return len(self.events) > before

    @property
    def last(self) -> Mapping[str, Any]:
        return self.events[-1] if self.events else {}

    @property
    def complete(self) -> bool:
        return self.last.get("event") in ("done", "failed")


class _Process:
    """The worker: its process, whatever it started, and the ending of both."""

    def __init__(self, folder: Path) -> None:
        self.mark = secrets.token_hex(8)
        environment = {k: v for k, v in os.environ.items() if k in KEPT} | QUIET
        environment |= {"TMPDIR": str(folder), "TMP": str(folder), "TEMP": str(folder), "HF_HOME": str(folder / ".hf")}
        environment[MARK] = self.mark
        self.handle = subprocess.Popen(
            [sys.executable, "-I", "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        self.process = psutil.Process(self.handle.pid)
        self.children: set[psutil.Process] = set()
        self.most_memory, self.started = 0, time.monotonic()
        self.seconds = 0.0

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def tell(self, job: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it may have died by now
            self.handle.stdin.write(json.dumps(job).encode() + b"\n")
            self.handle.stdin.close()

    def over(self) -> bool:
        """Whether it has ended. It is not waited for yet, so that nobody else gets its number."""
        try:
            return self.process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            return True

    def memory(self) -> int:
        """Bytes held by it and by what it started (of these, only what they do not share with it)."""
        total = 0
        with contextlib.suppress(psutil.Error):
            total += self.process.memory_info().rss
            self.children.update(self.process.children(recursive=True))
        for child in self.children:
            with contextlib.suppress(psutil.Error):
                total += child.memory_full_info().uss
        self.most_memory = max(self.most_memory, total)
        return total

    def interrupt(self) -> None:
        if hasattr(signal, "SIGUSR1"):
            with contextlib.suppress(psutil.Error):
                self.process.send_signal(signal.SIGUSR1)

    def end(self) -> None:
        """Kill it, if it still runs, and all that it started: its group, its descendants, and what bears its mark."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(self.handle.pid, signal.SIGKILL)
        else:
            self.handle.kill()
        for child in self.children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        self.handle.wait()
        self.seconds = time.monotonic() - self.started
        for other in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if other.environ().get(MARK) == self.mark:
                    other.kill()

    def how_it_ended(self) -> str:
        code = self.handle.returncode
        if code < 0:
            names = {member.value: member.name for member in signal.Signals}
            return f"the process was killed{WHERE}: {names.get(-code, f'signal {-code}')}"
        return f"the process ended itself{WHERE}: exit status {code}"


def _watch(process: _Process, log: Log, limits: Limits, folder: Path, stop: threading.Event) -> str:
    """Wait until the process is done, has ended, or has to be; why it has to be, or nothing."""
    since = looked = time.monotonic()
    ready, interrupted = None, 0.0
    while True:
        over = process.over()  # first this, then its last words
        now = time.monotonic()
        if log.read():
            since, interrupted = now, 0.0
            if ready is None and any(event["event"] == "ready" for event in log.events):
                ready = now
        if log.complete or over:
            return ""
        if stop.is_set():
            return "grading was interrupted{where}"
        if process.memory() > SLACK * limits.memory * GB:
            return f"killed{WHERE}: memory above {limits.memory:g} GB"
        if ready is None:
            if now - process.started > STARTUP_SECONDS:
                return f"killed: its process was not ready after {STARTUP_SECONDS:g} s"
        elif now - ready > limits.seconds:
            return f"killed{WHERE}: the notebook took more than {limits.seconds:g} s"
        doing = log.last.get("event")
        if doing == "cell" and now - since > limits.cell_seconds:
            if now - since > limits.cell_seconds + GRACE_SECONDS:
                return f"killed{WHERE}: it did not stop after {limits.cell_seconds:g} s"
            if now - interrupted > 0.5:  # again and again: a bare `except:` in a loop swallows the first
                interrupted = now
                process.interrupt()
        if doing == "check" and now - since > log.last["seconds"]:
            return f"killed{WHERE}: it did not stop after {log.last['seconds']:g} s"
        if now - looked > 1.0:
            looked = now
            if _size(folder) > MOST_ON_DISK:
                return f"killed{WHERE}: more than {MOST_ON_DISK / GB:g} GB of files"
        time.sleep(POLL_SECONDS)


def _copy(file: Path, folder: Path) -> str:
    """Copy the notebook; why that cannot be done, or nothing."""
    try:
        if file.stat().st_size > LARGEST_NOTEBOOK:
            return f"the file has {file.stat().st_size / 10**6:.0f} MB, and {LARGEST_NOTEBOOK // 10**6} are the most"
        shutil.copyfile(file, folder / file.name)
    except (OSError, shutil.Error) as error:
        return f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
    return ""


def _size(folder: Path) -> int:
    """Bytes of all files below."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total
