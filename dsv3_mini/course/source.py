"""A lesson's source, solutions/NN_topic.py, read and held to the rules: its facts, its cells, its exercises.

The format is jupytext's percent format. An exercise's answer stands between the markers that nbgrader uses:

    ### BEGIN SOLUTION: what the reader is to write, in a line
    ### END SOLUTION

`read_lesson` refuses, with file and line, what would make a lesson rot: a marker without its partner, an exercise without a
check, a cell too long to be one idea, a required part that is missing.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jupytext
from nbformat import NotebookNode

from dsv3_mini.errors import UserError

PARTS = ("why", "paper", "naive", "exercise", "package", "experiment", "interactive", "bug", "at-671b", "recap", "next")
TRACKS = ("half-day", "two-days", "term")  # each holds all of the one before
LONGEST_CELL = 15  # lines of code
LONGEST_EXERCISE = 25
EXERCISES = range(2, 5)  # beside the bug

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"


class LessonError(UserError):
    """A rule that a lesson's source breaks: "solutions/04_x.py:31: what is wrong: what to do"."""


@dataclass(frozen=True)
class Cell:
    """One cell: `line` is where its `# %%` stands in the source."""

    kind: str  # "code" or "markdown"
    source: str
    tags: tuple[str, ...]
    line: int

    @property
    def lines(self) -> int:
        return len(self.source.strip("\n").split("\n"))

    def in_track(self, track: str) -> bool:
        """A cell without a track tag is in all of them; one tagged `track:term` in the term only."""
        own = [tag.removeprefix("track:") for tag in self.tags if tag.startswith("track:")]
        return all(TRACKS.index(track) >= TRACKS.index(name) for name in own)


@dataclass(frozen=True)
class Exercise:
    """An exercise as the syllabus knows it."""

    name: str  # of the function
    title: str
    difficulty: int
    minutes: int


@dataclass(frozen=True)
class Lesson:
    """A whole lesson, already held to the rules."""

    path: Path
    title: str
    minutes: int
    after: tuple[str, ...]
    builds: str
    tracks: tuple[str, ...]
    cells: tuple[Cell, ...]
    exercises: tuple[Exercise, ...]

    @property
    def name(self) -> str:
        return self.path.stem


def read_lesson(path: Path) -> Lesson:
    """Read a source and check it.

    Raises:
        LessonError: the first rule that is broken, with file and line.
    """
    text = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    facts = dict(notebook.metadata.get("dsv3", {}))
    cells = _cells(notebook, text, path)
    _check_facts(facts, path)
    for cell in cells:
        _check_cell(cell, path)
    _check_parts(cells, path)
    exercises = tuple(_exercises(cells, path))
    return Lesson(
        path,
        facts["title"],
        facts["minutes"],
        tuple(facts["after"]),
        facts["builds"],
        tuple(facts["tracks"]),
        tuple(cells),
        exercises,
    )


def blank(source: str) -> str:
    """A cell's source with its solution replaced by what the reader is to write, and a blank that says it is one."""
    lines: list[str] = []
    inside = False
    for line in source.split("\n"):
        stripped = line.strip()
        if stripped.startswith(BEGIN):
            indent = line[: len(line) - len(line.lstrip())]
            lines += [f"{indent}# YOUR CODE: {_task(stripped)}", f"{indent}raise NotImplementedError"]
            inside = True
        elif stripped == END:
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines)


def cell_ids(cells: list[tuple[str, str]]) -> list[str]:
    """An id for every (kind, source): from what it says, so that it stays when other cells come and go."""
    seen: Counter[str] = Counter()
    ids = []
    for kind, source in cells:
        digest = hashlib.sha256((kind + source).encode()).hexdigest()[:8]
        ids.append(digest if not seen[digest] else f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return ids


# ---- rules -----------------------------------------------------------------------------------------------------------


def _cells(notebook: NotebookNode, text: str, path: Path) -> list[Cell]:
    lines = [number for number, line in enumerate(text.split("\n"), start=1) if line.startswith("# %%")]
    if len(lines) != len(notebook.cells):
        raise LessonError(f"{path}:1: text stands before the first cell: begin it with `# %% [markdown]`")
    return [
        Cell(cell.cell_type, cell.source, tuple(cell.metadata.get("tags", ())), line)
        for cell, line in zip(notebook.cells, lines, strict=True)
    ]


def _check_facts(facts: dict[str, object], path: Path) -> None:
    kinds = {"title": str, "minutes": int, "after": list, "builds": str, "tracks": list}
    for name, kind in kinds.items():
        if not isinstance(facts.get(name), kind):
            raise LessonError(f"{path}:1: the header has no dsv3.{name}: a lesson says its {', '.join(kinds)}")
    unknown = [track for track in facts["tracks"] if track not in TRACKS]
    if unknown:
        raise LessonError(f"{path}:1: dsv3.tracks: {unknown[0]!r} is none of {', '.join(TRACKS)}")


def _check_cell(cell: Cell, path: Path) -> None:
    where = f"{path}:{cell.line}"
    for tag in cell.tags:
        if tag not in PARTS and tag.removeprefix("track:") not in TRACKS:
            raise LessonError(f"{where}: the tag {tag!r} is not known: parts are {', '.join(PARTS)}; tracks track:NAME")
    _check_markers(cell, path)
    if cell.kind == "code":
        longest = LONGEST_EXERCISE if BEGIN in cell.source else LONGEST_CELL
        if cell.lines > longest:
            raise LessonError(f"{where}: a code cell of {cell.lines} lines: {longest} are allowed, split it by ideas")


def _check_markers(cell: Cell, path: Path) -> None:
    opened: tuple[int, str] | None = None
    for number, line in enumerate(cell.source.split("\n"), start=cell.line + 1):
        stripped, indent = line.strip(), line[: len(line) - len(line.lstrip())]
        if re.match(r"#+ *(begin|end) *solution", stripped, re.IGNORECASE) and not stripped.startswith((BEGIN, END)):
            raise LessonError(f"{path}:{number}: {stripped!r} is no marker: write {BEGIN}: ... or {END}")
        if stripped.startswith(BEGIN):
            if opened:
                raise LessonError(f"{path}:{number}: a second {BEGIN} before {END} of line {opened[0]}")
            if not _task(stripped):
                raise LessonError(f"{path}:{number}: say after {BEGIN}: what the reader is to write, in a line")
            opened = number, indent
        elif stripped.startswith(END):
            if not opened:
                raise LessonError(f"{path}:{number}: {END} without {BEGIN} in this cell")
            if stripped != END or indent != opened[1]:
                raise LessonError(f"{path}:{number}: {END} must stand alone, indented as line {opened[0]}")
            opened = None
    if opened:
        raise LessonError(f"{path}:{opened[0]}: {BEGIN} without {END} in this cell")


def _check_parts(cells: list[Cell], path: Path) -> None:
    first = {tag: cell for cell in reversed(cells) for tag in cell.tags if tag in PARTS}
    for part in PARTS:
        if part not in first:
            raise LessonError(f"{path}:{cells[-1].line}: the part {part!r} is missing: tag the cell that begins it")
    order = [part for part in PARTS if part != "package"]  # the package's version may come between exercises
    for before, after in zip(order, order[1:], strict=False):
        if first[before].line > first[after].line:
            raise LessonError(f"{path}:{first[after].line}: the part {after!r} stands before {before!r}")
    if not first["naive"].line < first["package"].line < first["bug"].line:
        raise LessonError(f"{path}:{first['package'].line}: the part 'package' belongs between 'naive' and 'bug'")


def _exercises(cells: list[Cell], path: Path) -> list[Exercise]:
    found: list[Exercise] = []
    for i, cell in enumerate(cells):
        if BEGIN not in cell.source:
            continue
        where = f"{path}:{cell.line}"
        functions = [node.name for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)]
        if len(functions) != 1:
            raise LessonError(f"{where}: an exercise cell defines one function, this one {len(functions)}")
        name = functions[0]
        following = next((c for c in cells[i + 1 :] if c.kind == "code"), None)
        if following is None or f"check.{name}({name}" not in following.source:
            raise LessonError(
                f"{where}: the exercise {name} has no check: let the next code cell call check.{name}({name})"
            )
        before = cells[i - 1]
        if before.kind != "markdown" or not {"exercise", "bug"} & set(before.tags):
            raise LessonError(
                f"{where}: the exercise {name} has no text: a markdown cell tagged exercise (or bug) above it"
            )
        found.append(_described(name, before, path))
    regular = sum("exercise" in cell.tags for cell in cells)
    if regular not in EXERCISES or len(found) != regular + sum("bug" in cell.tags for cell in cells):
        raise LessonError(f"{path}:1: {regular} cells tagged exercise and {len(found)} solutions: 2 to 4, and the bug")
    return found


def _described(name: str, cell: Cell, path: Path) -> Exercise:
    where = f"{path}:{cell.line}"
    heading = re.search(r"^#+ (.+)$", cell.source, re.MULTILINE)
    effort = re.search(r"(●*)(○*) · (\d+) minutes", cell.source)
    if not heading or not effort or len(effort[1] + effort[2]) != 3:
        raise LessonError(f"{where}: the exercise {name} needs a heading and a line such as `●○○ · 10 minutes`")
    if "<details>" not in cell.source:
        raise LessonError(f"{where}: the exercise {name} has no hint: fold one into <details>")
    return Exercise(name, heading[1].split(" · ", 1)[-1], len(effort[1]), int(effort[3]))


def _task(marker: str) -> str:
    return marker.removeprefix(BEGIN).lstrip(":").strip()
