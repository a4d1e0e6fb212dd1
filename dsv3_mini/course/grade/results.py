"""What grading found: an outcome for each exercise, and a graded notebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["right", "wrong", "unsolved", "missing", "not run"]
LONGEST = 200


@dataclass(frozen=True)
class Submission:
    """One notebook of one person. `lesson` is its name, such as 04_transformer."""

    person: str
    lesson: str
    file: Path

    @property
    def number(self) -> str:
        return self.lesson[:2]


@dataclass(frozen=True)
class Outcome:
    """What became of one exercise; `lines` are the checker's words, or the reason why it was not run."""

    name: str
    state: State
    lines: tuple[str, ...] = ()

    @property
    def points(self) -> int:
        return int(self.state == "right")

    @property
    def reason(self) -> str:
        """One line: of a wrong answer the first line of its hint, where the checker has one."""
        if self.state in ("right", "unsolved") or not self.lines:
            return ""
        hints = [line for line in self.lines[1:] if not line.startswith("in line ")]
        return (hints or self.lines)[0]


@dataclass(frozen=True)
class Graded:
    """One notebook's outcomes. `notes` say what went wrong in which cell (cells are counted as Jupyter counts them:
    code cells only, from 1), `guards` which protections the system granted. `memory` is the most it held, in bytes,
    as far as it was seen."""

    submission: Submission
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    memory: int = 0
    guards: Mapping[str, str] = field(default_factory=dict)

    @property
    def points(self) -> int:
        return sum(outcome.points for outcome in self.outcomes)

    @property
    def of(self) -> int:
        return len(self.outcomes)


def clean(text: Any) -> str:
    """One line of at most LONGEST printable characters: names and messages come from readers."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "?" for c in line[: LONGEST + 1])
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
