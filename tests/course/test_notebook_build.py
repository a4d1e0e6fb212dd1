"""The builder: two notebooks of one source, the same bytes each time and wherever they are built."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from small_lesson import SOURCE

from dsv3_mini.course.build import clean, main, same_picture, small_picture
from dsv3_mini.errors import UserError


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project, built once."""
    root = tmp_path_factory.mktemp("first")
    (root / "solutions").mkdir()
    (root / "solutions" / "90_doubling.py").write_text(SOURCE)
    with contextlib.chdir(root):
        assert main([]) == 0
    return root


@pytest.fixture
def project(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it at a place of its own."""
    shutil.copytree(first, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def files(project: Path) -> dict[str, bytes]:
    return {str(p.relative_to(project)): p.read_bytes() for p in sorted(project.rglob("*")) if p.is_file()}


def outputs_text(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(json.dumps(output) for cell in cells if cell.cell_type == "code" for output in cell.outputs)


def test_both_notebooks_and_the_syllabus_are_built_and_stay_the_same(project: Path) -> None:
    before = files(project)
    assert set(before) == {
        "solutions/90_doubling.py", "solutions/90_doubling.ipynb", "lessons/90_doubling.ipynb", "lessons/README.md",
    }  # fmt: skip
    assert main([]) == 0
    assert files(project) == before
    assert main(["--check"]) == 0
    assert files(project) == before

    solved, lesson = (nbformat.read(project / f / "90_doubling.ipynb", as_version=4) for f in ("solutions", "lessons"))
    for notebook in (solved, lesson):
        nbformat.validate(notebook)
        assert set(notebook.metadata) == {"kernelspec", "language_info"}
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "y = x + x" in str(solved.cells) and "y = x + x" not in str(lesson.cells)
    assert outputs_text(project / "solutions/90_doubling.ipynb").count("\\u2713") >= 3
    blanks = outputs_text(project / "lessons/90_doubling.ipynb")
    assert "\\u2713" not in blanks and "still blank" in blanks
    # a page without a kernel shows the picture and no dead widget
    for text in (outputs_text(project / f / "90_doubling.ipynb") for f in ("solutions", "lessons")):
        assert "image/png" in text and "widget-view" not in text
    readme = (project / "lessons/README.md").read_text()
    assert "[90 Doubling](90_doubling.ipynb) | 5 | nothing | Twice ●, Half ●●, Three times ●" in readme


def test_a_change_is_noticed_and_nothing_written(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = project / "solutions" / "90_doubling.py"
    source.write_text(SOURCE.replace("# The naive way.", "# Another way."))
    before = files(project)
    assert main(["--check"]) == 1
    assert files(project) == before
    assert "lessons/90_doubling.ipynb differs" in capsys.readouterr().err


def test_a_track_leaves_out_what_is_longer(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    assert main(["--track", "half-day", "--out", str(out)]) == 0
    text = (out / "lessons" / "90_doubling.ipynb").read_text()
    assert "only in the term" not in text and "Doubling" in text
    assert main(["--track", "half-day"]) == 2


def test_a_cell_that_fails_is_named_and_the_old_notebook_stays(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(project)
    source = project / "solutions" / "90_doubling.py"
    source.write_text(SOURCE.replace('print("only in the term")', "1 / 0"))
    assert main([]) == 2
    assert "solutions/90_doubling.ipynb: a cell failed: ZeroDivisionError" in capsys.readouterr().err
    assert {k: v for k, v in files(project).items() if k.endswith("ipynb")} == {
        k: v for k, v in before.items() if k.endswith("ipynb")
    }


STREAM = dict(output_type="stream", name="stdout")


def test_prints_are_joined_and_places_addresses_and_warnings_refused() -> None:
    def output(**fields):  # noqa: ANN003, ANN202
        return nbformat.from_dict({**STREAM, **fields})

    assert [o.text for o in clean([output(text="a\n"), output(text="b\n")], "x")] == ["a\nb\n"]
    for text, message in {
        f"saved to {Path.home()}/x": "place of this machine" if str(Path.home()) != "/" else None,
        f"in {os.getcwd()}/data": "place of this machine",
        "<object at 0x7f12345678ab>": "an address",
    }.items():
        if message:
            with pytest.raises(UserError, match=message):
                clean([output(text=text)], "x")
    with pytest.raises(UserError, match="wrote a warning: UserWarning"):
        clean([output(name="stderr", text="UserWarning: old")], "x")
    live = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Box()"}
    with pytest.raises(UserError, match="shows nothing without a kernel"):
        clean([nbformat.from_dict(dict(output_type="display_data", data=live, metadata={}))], "x")


def encoded(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array.astype("uint8")).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_pictures_are_kept_in_few_colours_that_nobody_misses() -> None:
    # Thousands of colours, as soft edges make them: two ramps, a little noise, and white.
    y, x = np.mgrid[:200, :300]
    chart = np.stack([x * 0.8, 250 - x * 0.8, y + 20], axis=-1) + np.random.default_rng(0).integers(0, 5, (200, 300, 3))
    chart[:, 280:] = 255
    output = nbformat.from_dict(dict(output_type="display_data", data={"image/png": encoded(chart)}, metadata={}))
    kept = clean([output], "x")[0].data["image/png"]
    assert kept == small_picture(encoded(chart))
    image = Image.open(io.BytesIO(base64.b64decode(kept)))
    assert len(image.getcolors(2**24)) <= 256 and len(kept) < len(encoded(chart))
    shown = np.asarray(image.convert("RGB"), dtype=float)
    # 256 colours for a plane of 256 x 200 of them: each stands for 16 x 13, so it is 8 off at most, and 4 in the mean.
    assert abs(shown - chart).mean() < 4 and (shown[:, 280:] == 255).all()


def test_pictures_are_compared_by_what_they_show() -> None:
    page = np.full((60, 80), 255)
    nearly, other = page.copy(), page.copy()
    nearly[3, 4] = 250  # one pixel of a line's edge
    other[10:30, 10:30] = 0
    assert same_picture(encoded(page), encoded(nearly))
    assert not same_picture(encoded(page), encoded(other))
    assert not same_picture(encoded(page), encoded(page[:50]))
    # A dot that moves, in a picture so large that the mean hardly feels it.
    wide, moved = np.full((460, 900), 255), np.full((460, 900), 255)
    wide[92:104, 75:87] = moved[152:164, 75:87] = 120
    assert not same_picture(encoded(wide), encoded(moved))
