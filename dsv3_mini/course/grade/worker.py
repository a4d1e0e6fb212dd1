"""The process that runs one notebook and checks its exercises. `supervise` starts it and reads what it writes.

It is told its job in one line on standard input and appends events, one JSON object a line, to a results file whose path
and nonce nobody else knows:

    exercises (names), ready (guards), then for each cell: cell (number), ran (number, error),
    check (name, seconds) and result (name, state, lines) for each exercise that the cell defined;
    refused (text) where the guard stepped in; done at the end, or failed (text) where there is nothing to run.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from dsv3_mini.course.grade.guards import guard

try:
    from dsv3_mini.course.grade import lockdown
except ImportError:  # Windows has none of it
    lockdown = None

MOST_REFUSALS = 5  # told of a cell
PACKAGE, CHECKS = "dsv3_mini", "dsv3_mini.course.checks"
Send = Callable[..., None]


class CellTimeOver(BaseException):
    """The supervisor's signal. Not an Exception, so that a reader's `except Exception` does not catch it."""


def main(job: dict[str, Any]) -> None:
    """Grade one notebook, and leave without running what the notebook may have registered for the end."""
    send = reporter(job["results"], job["nonce"])
    try:
        _grade(job, send)
        send("done")
    except MemoryError:
        send("failed", text="the notebook left no memory to check with")
    except BaseException as error:  # ours, or a notebook that got hold of us: either way it is written down
        send("failed", text=f"the grader failed: {type(error).__name__}: {error}")
    os._exit(0)


def reporter(path: str, nonce: str) -> Send:
    """A function that appends an event. It opens the file each time: a notebook may close what it did not open.

    A notebook may also fork: its copies of this process have no say, and end here.
    """
    open_, write, close, dumps = os.open, os.write, os.close, json.dumps
    getpid, leave, main = os.getpid, os._exit, os.getpid()

    def send(event: str, **fields: Any) -> None:
        if getpid() != main:
            leave(0)
        descriptor = open_(path, os.O_WRONLY | os.O_APPEND)
        try:
            write(descriptor, dumps({"nonce": nonce, "event": event, **fields}).encode() + b"\n")
        finally:
            close(descriptor)

    return send


def _grade(job: dict[str, Any], send: Send) -> None:
    sys.dont_write_bytecode = True
    if lockdown:
        lockdown.die_with_parent()
        alone = lockdown.leave_network()
    from dsv3_mini.course.checks.framework import Exercise, exercises_of  # torch comes with it

    exercises: dict[str, Exercise] = exercises_of(importlib.import_module(job["checks"]))
    send("exercises", names=list(exercises))
    if job["problem"]:
        return send("failed", text=job["problem"])
    import matplotlib.font_manager  # noqa: F401  while it may still write the cache of fonts

    shell = _shell(job["folder"])
    forget_checks(job["checks"])
    guards = {"network": "Python's own functions only", "files": "Python's own functions only"}
    if lockdown:
        lockdown.limit(job["memory"], job["seconds"])
        if lockdown.landlock(job["folder"], [job["results"], os.devnull], network=alone):
            guards["files"] = "Landlock"
        if alone:
            guards["network"] = "a namespace of its own"
    try:
        cells = code_cells(Path(job["notebook"]))
    except (ValueError, OSError, RecursionError, MemoryError) as error:
        return send("failed", text=f"not a notebook: {error}")
    run = Run(shell, exercises, send, job["cell_seconds"])
    guard(job["folder"], job["results"], run.refused)
    send("ready", guards=guards)
    run.all(cells)


def forget_checks(module: str) -> None:
    """The notebook imports checks of its own: what it does to them does not reach those that count."""
    for name in [n for n in sys.modules if n in (module, CHECKS) or n.startswith(CHECKS + ".")]:
        del sys.modules[name]
    vars(sys.modules["dsv3_mini.course"]).pop("checks", None)


def code_cells(notebook: Path) -> list[str]:
    """The code cells' sources. ValueError says why there are none to be had."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise ValueError("it has no list of cells (format 4)")
    sources = [cell.get("source", "") for cell in cells if cell.get("cell_type") == "code"]
    return ["".join(map(str, source)) if isinstance(source, list) else str(source) for source in sources]


class Run:
    """One notebook, cell by cell, in one namespace, with its exercises checked as they come."""

    def __init__(self, shell: Any, exercises: dict[str, Any], send: Send, cell_seconds: float) -> None:
        self.shell, self.exercises, self.send, self.cell_seconds = shell, exercises, send, cell_seconds
        self.checked: dict[str, Any] = {}  # the last answer of each name
        self.right: set[str] = set()
        self.failed: list[tuple[str, str]] = []  # source of a cell, and what went wrong there
        self.told: set[str] = set()
        self.in_cell = False
        if hasattr(signal, "SIGUSR1"):
            signal.signal(signal.SIGUSR1, self._time_over)

    def all(self, cells: list[str]) -> None:
        for number, source in enumerate(cells, start=1):
            self.send("cell", number=number)
            error = self._cell(source, f"cell {number}")
            if error:
                self.failed.append((source, error))
            self.send("ran", number=number, error=error)
            for name in self.exercises:
                answer = self._answer(name)
                if answer is not None and answer is not self.checked.get(name):
                    self._check(name, answer)
        for name in self.exercises:
            if name in self.right:
                continue
            if name in self.checked:
                self._check(name, self.checked[name])
            else:
                self.send("result", name=name, **self._absent(name))

    def refused(self, what: str) -> None:
        """The guard's word: once for each thing in each cell."""
        if what not in self.told and len(self.told) < MOST_REFUSALS:
            self.told.add(what)
            self.send("refused", text=what)

    def _cell(self, source: str, where: str) -> str:
        """Run a cell; what went wrong in it, in words, or nothing."""
        self.told.clear()
        sys.stdout, sys.stderr = Nowhere(), Nowhere()  # whatever the last cell did to them
        try:
            self.in_cell = True
            result = self.shell.run_cell(source, store_history=False)
            before, within = result.error_before_exec, result.error_in_exec
        except BaseException as error:
            before, within = None, error
        finally:
            self.in_cell = False
            close_figures()
        if isinstance(before, SyntaxError):
            return f"syntax error in {where}"
        if isinstance(within, CellTimeOver):
            return f"{where} was stopped after {self.cell_seconds:g} s"
        error = before or within
        if error is None:
            return ""
        message = " ".join(str(error).split())
        return f"{where}: {type(error).__name__}" + (f": {message[:300]}" if message else "")

    def _answer(self, name: str) -> Any:
        """What the notebook now means by a name, if it can be called and is not the package's own."""
        value = self.shell.user_ns.get(name)
        own = str(getattr(value, "__module__", "")).partition(".")[0] != PACKAGE
        return value if callable(value) and own else None

    def _check(self, name: str, answer: Any) -> None:
        exercise = self.exercises[name]
        calls = len(exercise.cases) + 2 * len(exercise.properties)
        self.send("check", name=name, seconds=exercise.seconds * calls + 30)
        self.checked[name] = answer
        self.right.discard(name)  # of an answer that this one replaces
        try:
            result = exercise.run(answer)
            state, lines = result.state, [str(line)[:1000] for line in result.lines[:20]]
        except BaseException as error:
            state, lines = "not run", [f"its check failed: {type(error).__name__}: {error}"]
        close_figures()
        if state == "right":
            self.right.add(name)
        self.send("result", name=name, state=state, lines=lines)

    def _absent(self, name: str) -> dict[str, Any]:
        """Why there is no answer of this name: the cell that was to define it failed, or it is nowhere."""
        defines = re.compile(rf"^\s*(?:async\s+)?(?:def|class)\s+{name}\b|^\s*{name}\s*[:=]", re.M)
        for source, error in reversed(self.failed):
            if defines.search(source):
                return {"state": "not run", "lines": [error]}
        there = self.shell.user_ns
        if name in there:
            said = (
                "the package's own"
                if callable(there[name])
                else f"no function, its type is {type(there[name]).__name__}"
            )
            return {"state": "missing", "lines": [f"{name} is {said}"]}
        own = [k for k, v in list(there.items()) if isinstance(k, str) and getattr(v, "__module__", "") == "__main__"]
        close = difflib.get_close_matches(name, own, n=1, cutoff=0.7)
        return {
            "state": "missing",
            "lines": [f"nothing here is called {name}" + (f"; there is {close[0]}" if close else "")],
        }

    def _time_over(self, *_: object) -> None:
        if self.in_cell:
            raise CellTimeOver


class Nowhere(io.TextIOBase):
    """Where the cells print to."""

    def write(self, text: str) -> int:
        return len(text)


def close_figures() -> None:
    """pyplot keeps each figure until it is closed."""
    helpers: ModuleType | None = sys.modules.get("matplotlib._pylab_helpers")
    try:
        if helpers is not None and helpers.Gcf.figs:
            helpers.Gcf.destroy_all()
            gc.collect()
    except Exception:
        pass  # a notebook may have put anything in its place


def _shell(folder: str) -> Any:
    """IPython without a kernel: magics work, errors are not printed, nothing is kept. Its home is `folder`."""
    os.environ.update(HOME=folder, USERPROFILE=folder, IPYTHONDIR=str(Path(folder) / ".ipython"))
    os.environ.pop("MPLCONFIGDIR", None)
    tempfile.tempdir = None
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shell(InteractiveShell):
        def showtraceback(self, *_: Any, **__: Any) -> None:
            pass

        showsyntaxerror = showindentationerror = showtraceback

        def enable_matplotlib(self, gui: str | None = None) -> tuple[None, str]:
            return None, "agg"  # %matplotlib inline would draw each figure for nobody

        def enable_gui(self, gui: str | None = None) -> None:
            pass

        def system(self, cmd: str) -> None:
            subprocess.run(cmd, shell=True, check=False)  # !cmd: plain, so that the guard sees it

        def ask_exit(self) -> None:
            raise SystemExit  # exit(): the cell ends, the notebook goes on

    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.cache_size = 0
    return Shell.instance(config=config)
