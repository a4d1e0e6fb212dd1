"""What was graded, as tables for a terminal, as CSV for a spreadsheet, as JSON for everything else."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dsv3_mini.course.grade.results import Graded
from dsv3_mini.course.grade.supervise import Limits

STYLE = {"right": "green", "wrong": "red", "unsolved": "dim", "missing": "yellow", "not run": "yellow"}
MARK = {"right": "✓", "wrong": "✗", "unsolved": "○", "missing": "?", "not run": "–"}
MOST_NOTES = 5


def print_report(graded: Sequence[Graded], console: Console) -> None:
    """One row an exercise, then the points of each person by lesson, and what protected the machine."""
    console.print(Group(_by_exercise(graded), _by_person(graded)))
    guards = sorted({f"{what}: {how}" for one in graded for what, how in one.guards.items()})
    if guards:
        console.print(Text("Protected by: " + "; ".join(guards), style="dim"))


def _by_exercise(graded: Sequence[Graded]) -> Table:
    table = Table(title="Exercises", title_justify="left")
    for column in ("person", "lesson", "exercise", "result", "why"):
        table.add_column(column, overflow="fold")
    for one in graded:
        first = [Text(one.submission.person), Text(one.submission.lesson)]
        for outcome in one.outcomes:
            result = Text(f"{MARK[outcome.state]} {outcome.state}", style=STYLE[outcome.state])
            table.add_row(*first, Text(outcome.name), result, Text(outcome.reason))
            first = [Text(), Text()]
        said = {outcome.reason for outcome in one.outcomes}
        notes = [note for note in one.notes if note not in said]
        if len(notes) > MOST_NOTES:
            notes[MOST_NOTES - 1 :] = [f"and {len(notes) - MOST_NOTES + 1} more of these"]
        for note in notes:
            table.add_row(*first, Text(), Text("note", style="dim"), Text(note, style="dim"))
            first = [Text(), Text()]
        table.add_section()
    return table


def _by_person(graded: Sequence[Graded]) -> Table:
    lessons = sorted({one.submission.lesson for one in graded})
    table = Table(title="Points", title_justify="left")
    table.add_column("person", overflow="fold")
    for column in [*lessons, "in all"]:
        table.add_column(column, justify="right")
    for person in dict.fromkeys(one.submission.person for one in graded):
        own = {one.submission.lesson: one for one in graded if one.submission.person == person}
        cells = [f"{own[lesson].points} of {own[lesson].of}" if lesson in own else "" for lesson in lessons]
        total = f"{sum(one.points for one in own.values())} of {sum(one.of for one in own.values())}"
        table.add_row(Text(person), *cells, total)
    return table


def to_csv(graded: Sequence[Graded]) -> str:
    """person, lesson, exercise, state, points, reason: one line an exercise."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("person", "lesson", "exercise", "state", "points", "reason"))
    for one in graded:
        for o in one.outcomes:
            row = (one.submission.person, one.submission.lesson, o.name, o.state, o.points, o.reason)
            writer.writerow([_harmless(cell) for cell in row])
    return text.getvalue()


def _harmless(cell: object) -> object:
    """A spreadsheet takes text that starts so for a formula, and runs it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


def to_json(graded: Sequence[Graded], limits: Limits, passed_over: Sequence[str]) -> str:
    """Everything, notes and resources too."""
    content = {
        "limits": {"seconds": limits.seconds, "cell_seconds": limits.cell_seconds, "memory_gb": limits.memory},
        "passed_over": list(passed_over),
        "notebooks": [_entry(one) for one in graded],
    }
    return json.dumps(content, indent=2) + "\n"


def _entry(one: Graded) -> dict[str, Any]:
    return {
        "person": one.submission.person,
        "lesson": one.submission.lesson,
        "points": one.points,
        "of": one.of,
        "seconds": one.seconds,
        "memory_gb": round(one.memory / 10**9, 2),
        "guards": dict(one.guards),
        "exercises": [
            {"name": o.name, "state": o.state, "points": o.points, "reason": o.reason, "lines": list(o.lines)}
            for o in one.outcomes
        ],
        "notes": list(one.notes),
    }
