"""A class is graded: solved, blank and broken notebooks in one run, with nothing outside touched."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import graded_notebooks as notebooks
import psutil
import pytest

from dsv3_mini.cli import main
from dsv3_mini.course.grade.supervise import MARK

pytestmark = pytest.mark.slow
CELL_SECONDS, MEMORY = 8, 1
KILLED = "right not-run not-run"


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "sub").mkdir()
    (folder / "note.txt").write_text("keep me")
    (folder / "sub" / "deep.txt").write_text("and me")
    return folder


@pytest.fixture(scope="module")
def graded(outside: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of one run over the whole class, by person, and what was printed under ''."""
    classroom, reports = tmp_path_factory.mktemp("class"), tmp_path_factory.mktemp("reports")
    everyone = {"solved": notebooks.SOLVED, "blank": notebooks.BLANK, **notebooks.broken(outside)}
    for person, cells in everyone.items():
        notebooks.write(cells, classroom / person / "40_fake.ipynb")
    (classroom / "no-notebook").mkdir()
    (classroom / "no-notebook" / "40_fake.ipynb").write_bytes(b'{"cells": [')
    (classroom / "no-notebook" / "draft.ipynb").write_bytes(b"")
    before = {path: path.read_bytes() for path in classroom.rglob("*.ipynb")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed := io.StringIO())
        code = main(
            ["grade", str(classroom), "--csv", str(reports / "c.csv"), "--json", str(reports / "j.json"), "--jobs", "2"]
            + ["--cell-seconds", str(CELL_SECONDS), "--memory", str(MEMORY), "--checks", "fake_lesson_{number}"]
        )
    assert code == 0
    assert before == {path: path.read_bytes() for path in classroom.rglob("*.ipynb")}
    content = json.loads((reports / "j.json").read_text())
    people = {entry["person"]: entry for entry in content["notebooks"]}
    assert sorted(people) == sorted([*everyone, "no-notebook"])
    return {**people, "": {"csv": (reports / "c.csv").read_text(), "printed": printed.getvalue(), **content}}


def states(entry: dict[str, Any]) -> str:
    assert [exercise["name"] for exercise in entry["exercises"]] == ["double", "scale", "total"]
    return " ".join(exercise["state"].replace(" ", "-") for exercise in entry["exercises"])


def test_solved_has_full_points_and_blank_none(graded: dict[str, Any]) -> None:
    solved, blank = graded["solved"], graded["blank"]
    assert (solved["points"], solved["of"], solved["notes"], states(solved)) == (3, 3, [], "right right right")
    assert (blank["points"], blank["of"], blank["notes"], states(blank)) == (0, 3, [], "unsolved unsolved unsolved")


@pytest.mark.parametrize(
    ("person", "expected", "reason", "notes"),
    [
        ("syntax", "right not-run right", "syntax error in cell 4", ["syntax error in cell 4"]),
        ("loop", "right right right", "", [f"cell 4 was stopped after {CELL_SECONDS} s"]),
        ("memory", "right right right", "", ["cell 4: MemoryError", "cell 5: RuntimeError", "cell 6: MemoryError"]),
        ("exit", "right right right", "", ["cell 4: SystemExit: 1", "cell 5: SystemExit"]),
        ("deleted", "right missing missing", "nothing here is called scale", []),
        ("renamed", "right missing right", "nothing here is called scale; there is scales", ["cell 5: NameError"]),
        (
            "network",
            "right right right",
            "",
            [f"refused in cell {4 + i}: reach the network ({host})" for i, host in enumerate(notebooks.HOSTS)],
        ),
        ("storm", "right right right", "", [f"cell 4 was stopped after {CELL_SECONDS} s"]),
        (
            "deletion",
            "right right right",
            "",
            [
                f"refused in cell {4 + i}: {verb} "
                for i, verb in enumerate(("delete", "delete", "write", "move", "change", "write", "start a program"))
            ],
        ),
        ("kill", KILLED, "the process was killed in cell 4: SIGKILL", ["the process was killed in cell 4: SIGKILL"]),
        (
            "kill-others",
            "right right right",
            "",
            [f"refused in cell 4: signal process {os.getpid()}", "refused in cell 5"],
        ),
        ("leave", KILLED, "the process ended itself in cell 4: exit status 3", ["the process ended itself"]),
        ("stubborn", KILLED, f"killed in cell 4: it did not stop after {CELL_SECONDS} s", ["killed in cell 4"]),
        ("shared-memory", KILLED, f"killed in cell 4: memory above {MEMORY} GB", ["killed in cell 4"]),
        ("forks", "right right right", "", ["refused in cell 4: start more than 16 processes"]),
        ("forger", "wrong missing missing", "scale is the package's own", []),
        ("odd", "right right right", "", []),
        ("replaced", "right wrong right", "you add the weight: a weight is multiplied", []),
        ("no-notebook", "not-run not-run not-run", "not a notebook: ", ["not a notebook: "]),
    ],
)
def test_each_is_reported(graded: dict[str, Any], person: str, expected: str, reason: str, notes: list[str]) -> None:
    entry = graded[person]
    assert states(entry) == expected, entry
    assert entry["points"] == expected.split().count("right")
    assert entry["exercises"][1]["reason"].startswith(reason)
    told = [note for note in entry["notes"] if "URLError" not in note]
    assert len(told) >= len(notes)
    for note in notes:
        assert any(each.startswith(note) for each in told), (note, told)
    if not notes or person in (
        "memory",
        "loop",
        "storm",
        "exit",
        "deletion",
        "kill-others",
    ):  # nothing that was allowed is complained of
        assert len(told) == len(notes), told


def test_nothing_outside_was_touched(graded: dict[str, Any], outside: Path) -> None:
    left = {str(path.relative_to(outside)): path.read_text() for path in outside.rglob("*") if path.is_file()}
    assert left == {"note.txt": "keep me", "sub/deep.txt": "and me"}
    assert sorted(path.name for path in outside.iterdir()) == ["note.txt", "sub"]


def test_compiled_code_is_refused_where_the_system_has_landlock(graded: dict[str, Any]) -> None:
    entry = graded["compiled"]
    if entry["guards"]["files"] != "Landlock":
        pytest.skip(f"files here: {entry['guards']['files']}")
    assert states(entry) == "right right right"
    starts = ["cell 4: RuntimeError", "cell 5: AssertionError", "cell 6: AssertionError"]
    assert all(note.startswith(start) for note, start in zip(entry["notes"][:3], starts, strict=True)), entry["notes"]


def test_memory_stayed_near_its_limit(graded: dict[str, Any]) -> None:
    most = {person: entry["memory_gb"] for person, entry in graded.items() if person}
    assert max(most.values()) < 1.6 * MEMORY, most
    assert most["shared-memory"] > MEMORY


def test_no_process_is_left(graded: dict[str, Any]) -> None:
    def marked(process: psutil.Process) -> bool:
        try:
            return process.ppid() in (1, os.getpid()) and MARK in process.environ()
        except (psutil.Error, OSError):
            return False

    assert [process for process in psutil.process_iter() if marked(process)] == []


def test_csv_and_tables(graded: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(graded[""]["csv"])))
    assert len(rows) == 3 * len(graded[""]["notebooks"])
    assert list(rows[0]) == ["person", "lesson", "exercise", "state", "points", "reason"]
    mine = [row for row in rows if row["person"] == "replaced"]
    assert [(row["exercise"], row["state"], row["points"]) for row in mine] == [
        ("double", "right", "1"),
        ("scale", "wrong", "0"),
        ("total", "right", "1"),
    ]
    printed = graded[""]["printed"]
    for words in (
        "✓ right",
        "✗ wrong",
        "○ unsolved",
        "? missing",
        "– not run",
        "3 of 3",
        "0 of 3",
        "you add the weight",
    ):
        assert words in printed
    assert "Passed over, not named NN_topic.ipynb: no-notebook/draft.ipynb" in printed
    assert graded[""]["passed_over"] == ["no-notebook/draft.ipynb"]
    assert graded[""]["limits"] == {"seconds": 300, "cell_seconds": CELL_SECONDS, "memory_gb": MEMORY}
