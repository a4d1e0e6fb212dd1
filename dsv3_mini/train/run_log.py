"""A run's log: one JSON object a line, of kind "step" or "evaluation", in the order of steps."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dsv3_mini.files import write_text


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class RunLog:
    """JSON lines. A resumed run first drops the lines written after its checkpoint, so that no step stands twice."""

    def __init__(self, file: Path, step: int) -> None:
        self.file = file
        if file.exists():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
            write_text(file, "".join(line + "\n" for line in kept))

    def __enter__(self) -> RunLog:
        self.handle = self.file.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()

    def write(self, line: dict[str, Any]) -> None:
        self.handle.write(json.dumps(line) + "\n")
        self.handle.flush()


class NoLog(nullcontext):
    """Where another process writes the log."""

    def __enter__(self) -> NoLog:
        return self

    def write(self, line: dict[str, Any]) -> None: ...


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # a line cut short by a kill
