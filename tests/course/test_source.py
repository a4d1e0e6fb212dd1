"""The rules of a lesson's source: a good one is read, each broken rule is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_lesson import SOURCE

from dsv3_mini.course.source import LessonError, blank, cell_ids, read_lesson


def read(tmp_path: Path, text: str):  # noqa: ANN201
    path = tmp_path / "90_doubling.py"
    path.write_text(text)
    return read_lesson(path)


def test_a_good_lesson_is_read(tmp_path: Path) -> None:
    lesson = read(tmp_path, SOURCE)
    assert (lesson.name, lesson.title, lesson.minutes, lesson.after) == ("90_doubling", "Doubling", 5, ())
    assert [(e.name, e.title, e.difficulty, e.minutes) for e in lesson.exercises] == [
        ("double", "Twice", 1, 2),
        ("halve", "Half", 2, 3),
        ("treble", "Three times", 1, 2),
    ]
    for cell in lesson.cells:  # `line` is where the cell begins
        assert SOURCE.split("\n")[cell.line - 1].startswith("# %%")
    term_only = [cell.source for cell in lesson.cells if not cell.in_track("two-days")]
    assert term_only == ['print("only in the term")']
    assert all(cell.in_track("term") for cell in lesson.cells)


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


BROKEN = {
    "no end": ("    return y\n    ### END SOLUTION\n", "    return y\n", "    ### BEGIN SOLUTION: return twice", "without ### END"),
    "no begin": ("    ### BEGIN SOLUTION: return twice x\n", "", "    ### END SOLUTION", "without ### BEGIN"),
    "two begins": ("    y = x + x\n", "    ### BEGIN SOLUTION: again\n", "    ### BEGIN SOLUTION: again", "a second"),
    "says nothing": ("### BEGIN SOLUTION: return twice x", "### BEGIN SOLUTION", "### BEGIN SOLUTION\n", "say after"),
    "misspelt": ("### END SOLUTION", "## end solution", "## end solution", "is no marker"),
    "end indented otherwise": ("return y\n    ### END", "return y\n        ### END", "        ### END", "indented as line"),
    "no check": ("check.double(double)", "pass", "# %%\ndef double", "has no check"),
    "check of another": ("check.double(double)", "check.halve(double)", "# %%\ndef double", "has no check"),
    "no text": ('# %% [markdown] tags=["exercise"]\n# ### Exercise 1', "# %% [markdown]\n# ### Exercise 1", "# %%\ndef double", "has no text"),
    "no effort": ("# ●○○ · 2 minutes\n#\n# <details><summary>Hint</summary>Add", "# <details><summary>Hint</summary>Add", '# %% [markdown] tags=["exercise"]', "needs a heading"),
    "no hint": ("# <details><summary>Hint</summary>Add.</details>\n", "#\n", '# %% [markdown] tags=["exercise"]', "has no hint"),
    "long cell": ('print("only in the term")', "\n".join(f"print({i})" for i in range(16)), '# %% tags=["track:term"]', "16 lines"),
    "unknown tag": ("track:term", "track:year", '# %% tags=["track:year"]', "'track:year' is not known"),
    "two functions": ("def halve", "def other() -> None: ...\ndef halve", "# %%\ndef other", "defines one function"),
    "text first": ("# %% [markdown] tags=[\"why\"]", "x = 1\n# %% [markdown] tags=[\"why\"]", None, "stands before the first cell"),
    "no minutes": ("#     minutes: 5\n", "", None, "dsv3.minutes"),
    "odd track": ("[half-day, two-days, term]", "[year]", None, "'year' is none of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    old, new, place, message = BROKEN[name]
    assert old in SOURCE
    text = SOURCE.replace(old, new, 1)
    with pytest.raises(LessonError) as caught:
        read(tmp_path, text)
    said = str(caught.value)
    assert message in said and "\n" not in said
    line = 1 if place is None else line_of(text, place)
    assert said.startswith(f"{tmp_path}/90_doubling.py:{line}: "), (said, line)


@pytest.mark.parametrize(
    "part", ["why", "paper", "naive", "package", "experiment", "interactive", "bug", "at-671b", "recap", "next"]
)
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    with pytest.raises(LessonError, match=f"'{part}' is missing|solutions: 2 to 4|has no text"):
        read(tmp_path, SOURCE.replace(f' tags=["{part}"]', "", 1))


def test_parts_out_of_order_are_named(tmp_path: Path) -> None:
    swapped = (
        SOURCE.replace('tags=["recap"]', 'tags=["X"]')
        .replace('tags=["next"]', 'tags=["recap"]')
        .replace('"X"', '"next"')
    )
    with pytest.raises(LessonError, match="'next' stands before 'recap'"):
        read(tmp_path, swapped)


def test_a_blank_says_what_to_do_and_raises(tmp_path: Path) -> None:
    cell = next(c for c in read(tmp_path, SOURCE).cells if "def double" in c.source)
    text = blank(cell.source)
    assert "y = x + x" not in text and "SOLUTION" not in text and '"""Twice x."""' in text
    assert text.endswith("    # YOUR CODE: return twice x\n    raise NotImplementedError")
    namespace: dict = {}
    exec(text, namespace)
    with pytest.raises(NotImplementedError):
        namespace["double"](1)


def test_ids_come_from_what_a_cell_says() -> None:
    ids = cell_ids([("code", "a"), ("code", "b"), ("code", "a"), ("markdown", "a")])
    assert len(set(ids)) == 4
    assert cell_ids([("code", "b"), ("code", "a")]) == [ids[1], ids[0]]
