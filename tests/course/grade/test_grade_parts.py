"""The grader's parts without a notebook running: finding, reading results, verdicts, reports, what is said to people."""

from __future__ import annotations

import csv
import io
import json
import threading
from pathlib import Path
from typing import Any

import graded_notebooks as notebooks
import pytest

from dsv3_mini.cli import main
from dsv3_mini.course.grade.find import find_notebooks, with_checks
from dsv3_mini.course.grade.report import to_csv
from dsv3_mini.course.grade.results import Graded, Outcome, Submission, clean
from dsv3_mini.course.grade.supervise import Limits, Log, grade
from dsv3_mini.course.grade.verdict import verdict
from dsv3_mini.course.grade.worker import code_cells

ME = Submission("ada", "40_fake", Path("40_fake.ipynb"))
START = [{"event": "exercises", "names": ["double", "scale"]}, {"event": "ready", "guards": {"files": "Landlock"}}]
RIGHT = {"event": "result", "name": "double", "state": "right", "lines": ["1 trials passed: a matrix"]}


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_one_person_or_a_class(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    touch(
        folder / "01_shapes.ipynb", folder / "ada" / "04_transformer.ipynb", folder / "ada" / "04_transformer (1).ipynb"
    )
    touch(folder / ".ipynb_checkpoints" / "01_shapes.ipynb", folder / "bob" / "deep" / "01_shapes.ipynb")
    found, passed_over = find_notebooks(folder)
    assert [(s.person, s.lesson, s.number) for s in found] == [
        ("mine", "01_shapes", "01"),
        ("ada", "04_transformer", "04"),
    ]
    assert passed_over == ["ada/04_transformer (1).ipynb"]


def test_lessons_without_checks_are_passed_over() -> None:
    graded, without = with_checks([ME, Submission("ada", "77_none", Path())], "fake_lesson_{number}")
    assert (graded, without) == ([ME], ["77_none"])
    assert with_checks([ME], "no_such_package.lesson_{number}") == ([], ["40_fake"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cells": 3}', '{"cells": [3]}', "\ud800", "[" * 100_000])
def test_what_is_no_notebook(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.ipynb"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises((ValueError, RecursionError)):
        code_cells(file)


def test_code_cells_are_read_in_both_spellings(tmp_path: Path) -> None:
    cells = [{"cell_type": "markdown", "source": "x"}, {"cell_type": "code", "source": ["a\n", "b"]}]
    file = tmp_path / "x.ipynb"
    file.write_text(json.dumps({"cells": [*cells, {"cell_type": "code", "source": "c"}, {"cell_type": "code"}]}))
    assert code_cells(file) == ["a\nb", "c", ""]


# ---- results ---------------------------------------------------------------------------------------------------------


def test_only_whole_lines_with_the_nonce_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "results"
    log = Log(file, "secret")
    assert not log.read()
    file.write_text(
        '{"event": "done"}\n{"event": "done", "nonce": "guess"}\nnonsense\n[1]\n{"nonce": "secret", "event"'
    )
    assert not log.read() and not log.complete
    with file.open("a") as more:
        more.write(': "done"}\n')
    assert log.read() and log.complete and len(log.events) == 1


def test_what_was_checked_before_the_process_died_stays() -> None:
    events = [*START, {"event": "cell", "number": 2}, {"event": "ran", "number": 2, "error": ""}, RIGHT]
    events += [{"event": "cell", "number": 3}]
    graded = verdict(ME, events, "killed{where}: memory above 2 GB", 1.0, 0)
    assert [(o.name, o.state, o.reason) for o in graded.outcomes] == [
        ("double", "right", ""),
        ("scale", "not run", "killed in cell 3: memory above 2 GB"),
    ]
    assert graded.notes == ("killed in cell 3: memory above 2 GB",)
    assert (graded.points, graded.of) == (1, 2)


def test_a_death_in_a_check_and_at_the_start() -> None:
    graded = verdict(ME, [*START, {"event": "check", "name": "scale", "seconds": 9}], "killed{where}: x", 1.0, 0)
    assert graded.outcomes[1].reason == "killed when scale was checked: x"
    graded = verdict(ME, [], "the process ended itself{where}: exit status 1", 1.0, 0)
    assert [(o.name, o.state) for o in graded.outcomes] == [("(all)", "not run")]
    assert graded.outcomes[0].reason == "the process ended itself: exit status 1"


def test_the_last_result_of_an_exercise_counts() -> None:
    wrong = {
        **RIGHT,
        "state": "wrong",
        "lines": ["with a matrix: it gave 3", "in line 2 of your function: x", "a hint"],
    }
    graded = verdict(ME, [*START, RIGHT, wrong, {"event": "done"}], "", 1.0, 0)
    assert (graded.outcomes[0].state, graded.outcomes[0].reason) == ("wrong", "a hint")
    assert graded.outcomes[1].reason == "it was not checked"


def test_readers_words_are_one_printable_line_and_no_formula() -> None:
    assert clean("a\n b\x1b[31m\ud800") == "a b?[31m?"
    assert len(clean("x" * 1000)) == 200
    one = Graded(Submission("=1+1", "40_fake", Path()), (Outcome("double", "wrong", ('=HYPERLINK("x")',)),))
    row = list(csv.reader(io.StringIO(to_csv([one]))))[1]
    assert row == ["'=1+1", "40_fake", "double", "wrong", "0", '\'=HYPERLINK("x")']


# ---- one process -----------------------------------------------------------------------------------------------------


def test_a_notebook_has_a_time_in_all(tmp_path: Path) -> None:
    file = tmp_path / "40_fake.ipynb"
    notebooks.write(notebooks.with_cell(*["import time\ntime.sleep(3)"] * 40), file)
    graded = grade(Submission("ada", "40_fake", file), "fake_lesson_40", Limits(seconds=6, cell_seconds=60, memory=1))
    assert [o.state for o in graded.outcomes] == ["right", "not run", "not run"]
    assert graded.outcomes[1].reason.endswith(": the notebook took more than 6 s")
    assert graded.outcomes[1].reason.startswith("killed in cell ")


def test_a_stopped_grading_leaves_at_once(tmp_path: Path) -> None:
    file = tmp_path / "40_fake.ipynb"
    notebooks.write(notebooks.SOLVED, file)
    stop = threading.Event()
    stop.set()
    graded = grade(Submission("ada", "40_fake", file), "fake_lesson_40", Limits(), stop)
    assert graded.notes == ("grading was interrupted",)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    graded = grade(Submission("ada", "40_fake", tmp_path / "40_fake.ipynb"), "fake_lesson_40", Limits())
    assert [o.state for o in graded.outcomes] == ["not run"] * 3
    assert graded.outcomes[0].reason == "the file cannot be read: No such file or directory"


# ---- the command -----------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line of an error, with exit code 2."""
    try:
        code = main(["grade", *map(str, arguments)])
    except SystemExit as left:
        code = left.code
    out, error = capsys.readouterr()
    assert (code, out, error.count("\n")) == (2, "", 1)
    return error


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not there: name a folder" in said(capsys, tmp_path / "none")
    touch(tmp_path / "empty" / "draft.ipynb", tmp_path / "mine" / "77_none.ipynb")
    assert "is a file: name a folder" in said(capsys, tmp_path / "empty" / "draft.ipynb")
    assert "holds no lesson: looked for NN_topic.ipynb" in said(capsys, tmp_path / "empty")
    assert "no checks for 77_none" in said(capsys, tmp_path / "mine")
    assert "there is no folder" in said(capsys, tmp_path / "mine", "--csv", tmp_path / "no" / "x.csv")
    assert "must be a number of at least 0.5" in said(capsys, tmp_path, "--memory", "0.1")
    assert "not allowed with" in said(capsys, tmp_path, "--seconds", 60, "--minutes", 1)
