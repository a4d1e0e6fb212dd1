"""Notebooks from lesson sources: `python -m dsv3_mini.course.build [--check] [--track NAME --out FOLDER] [SOURCE ...]`.

Every solutions/NN_topic.py becomes two notebooks, both executed, outputs kept:

    solutions/NN_topic.ipynb    with the answers          lessons/NN_topic.ipynb    with blanks in their place

and all of them together lessons/README.md, the syllabus. What would differ from one build to the next is left out: ids come
from the source, times and versions are not kept, the live view of a widget is dropped and its first picture stays. A picture
that is the old one but for the last bits of arithmetic (another processor adds in another order) is kept as it was. So a
build with no change is no diff; `--check` builds beside and says what differs.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
from einops import reduce
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image

from dsv3_mini.course.source import TRACKS, Cell, Lesson, blank, cell_ids, read_lesson
from dsv3_mini.course.syllabus import syllabus
from dsv3_mini.errors import UserError
from dsv3_mini.files import write_text

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
NOTEBOOKS: dict[str, Callable[[Cell], str]] = {  # folder: what of a cell stands in its notebooks
    "solutions": lambda cell: cell.source,
    "lessons": lambda cell: blank(cell.source),
}
CELL_SECONDS = 120
LARGEST = 600_000  # bytes of a notebook
LIVE_VIEW = "application/vnd.jupyter.widget-view+json"
# A difference of two pictures that is arithmetic and not content: in grey levels of 256, over all of them and over the tile
# that differs most. A dot that moves is nothing to the whole and all of its tile.
SAME_PICTURE, SAME_TILE, TILE = 0.5, 8.0, 16
WORKERS = 2


def build(lesson: Lesson, root: Path, out: Path, track: str = TRACKS[-1]) -> list[Path]:
    """Build both notebooks of a lesson below `out`, keeping pictures of those in `root`; returns what was written.

    A file that was there stays until the new one is complete.
    """
    cells = [cell for cell in lesson.cells if cell.in_track(track)]
    written = []
    for folder, text in NOTEBOOKS.items():
        target = out / folder / f"{lesson.name}.ipynb"
        notebook = execute(unexecuted(cells, text), root / folder, f"{folder}/{lesson.name}.ipynb")
        keep_pictures(notebook, root / folder / target.name)
        write(notebook, target)
        written.append(target)
    return written


def unexecuted(cells: Sequence[Cell], text: Callable[[Cell], str]) -> NotebookNode:
    """A notebook of the cells, `text(cell)` in each, with ids derived from it."""
    notebook = nbformat.v4.new_notebook(metadata=METADATA)
    ids = cell_ids([(cell.kind, text(cell)) for cell in cells])
    for cell, cell_id in zip(cells, ids, strict=True):
        new = nbformat.v4.new_code_cell if cell.kind == "code" else nbformat.v4.new_markdown_cell
        tags = {"tags": list(cell.tags)} if cell.tags else {}
        notebook.cells.append(new(text(cell), id=cell_id, metadata=tags))
    return notebook


def execute(notebook: NotebookNode, folder: Path, name: str) -> NotebookNode:
    """Run all cells in `folder` and clean what they put out.

    Raises:
        UserError: a cell failed, or put out what would differ elsewhere; the message names the notebook and the cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(folder)}}, store_widget_state=False
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise UserError(f"{name}: a cell failed: {error.ename}: {error.evalue}") from None
    except (CellTimeoutError, DeadKernelError) as error:
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from None
    notebook.metadata = NotebookNode(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.metadata.pop("execution", None)  # the times
        if cell.cell_type == "code":
            cell.outputs = clean(cell.outputs, f"{name}, cell {number} ({cell.source.splitlines()[0][:60]!r})")
    return notebook


def clean(outputs: list[NotebookNode], where: str) -> list[NotebookNode]:
    """Outputs as they are kept: neighbouring prints joined, no live widgets, no place or address of this machine."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "error":
            raise UserError(f"{where}: {output.ename}: {output.evalue}")
        if output.output_type == "stream":
            if output.name == "stderr":
                raise UserError(f"{where}: it wrote a warning: {output.text.strip().splitlines()[0][:200]}")
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif LIVE_VIEW in output.data:
            if "image/png" not in output.data:
                raise UserError(f"{where}: this widget shows nothing without a kernel: show it as an Explorer does")
            del output.data[LIVE_VIEW]
        output.get("metadata", {}).pop("execution", None)
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = small_picture(output.data["image/png"])
        kept.append(output)
    for output in kept:
        texts = (
            [output.text]
            if output.output_type == "stream"
            else [str(v) for k, v in output.data.items() if "image" not in k]
        )
        for text in texts:
            for place in (str(Path.home()), str(Path.cwd()), sys.prefix, tempfile.gettempdir()):
                if len(place) > 1 and place + os.sep in text:
                    raise UserError(f"{where}: it shows a place of this machine ({place})")
            if address := re.search(r"\b0x[0-9a-f]{8,}\b", text):
                raise UserError(f"{where}: it shows an address ({address[0]}), which is another the next time")
    return kept


def small_picture(picture: str) -> str:
    """A PNG (base64) as one of at most 256 colours: no eye tells a chart from its original, of twice to thrice the bytes."""
    small = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def keep_pictures(notebook: NotebookNode, before: Path) -> None:
    """Where the notebook that stands there has nearly the same picture in the same cell, keep its bytes."""
    if not before.exists():
        return
    old = {cell.id: cell for cell in nbformat.read(before, as_version=4).cells if cell.cell_type == "code"}
    for cell in notebook.cells:
        if cell.cell_type != "code" or cell.id not in old:
            continue
        for now, then in zip(cell.outputs, old[cell.id].outputs, strict=False):
            pair = [output.get("data", {}).get("image/png") for output in (now, then)]
            if all(pair) and pair[0] != pair[1] and same_picture(*pair):
                now.data["image/png"] = pair[1]


def same_picture(one: str, other: str) -> bool:
    """Whether two PNGs (base64) look alike, as a whole and everywhere."""
    a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode(x))).convert("L"), dtype=float) for x in (one, other))
    if a.shape != b.shape:
        return False
    apart = np.abs(a - b)
    height, width = (-(-length // TILE) * TILE for length in apart.shape)
    padded = np.zeros((height, width))
    padded[: apart.shape[0], : apart.shape[1]] = apart
    tiles = reduce(padded, "(h y) (w x) -> h w", "mean", y=TILE, x=TILE)
    return bool(apart.mean() < SAME_PICTURE and tiles.max() < SAME_TILE)


def write(notebook: NotebookNode, target: Path) -> None:
    """Write a notebook, whole or not at all."""
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > LARGEST:
        raise UserError(
            f"{target.name}: {len(text.encode()):,} bytes, {LARGEST:,} are allowed: make its pictures smaller"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)


def differences(built: Sequence[Path], out: Path, root: Path) -> list[str]:
    """The files below `out` that are not as those below `root`."""
    wrong = []
    for path in built:
        there = root / path.relative_to(out)
        if not there.exists():
            wrong.append(f"{path.relative_to(out)} is missing")
        elif there.read_bytes() != path.read_bytes():
            wrong.append(f"{path.relative_to(out)} differs")
    return wrong


def sources(root: Path) -> list[Path]:
    return sorted((root / "solutions").glob("[0-9][0-9]_*.py"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 0, 1 if a check finds a difference, 2 for a broken rule or a cell that fails."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_mini.course.build", description="Build the notebooks.")
    parser.add_argument("sources", nargs="*", type=Path, help="default: all in solutions/")
    parser.add_argument(
        "--check", action="store_true", help="write nothing here, say whether what is there is up to date"
    )
    parser.add_argument("--track", choices=TRACKS, help="only its lessons and cells; needs --out")
    parser.add_argument("--out", type=Path, help="build below this folder, not here")
    options = parser.parse_args(arguments)
    root = Path.cwd()
    try:
        if options.track and not options.out:
            raise UserError("--track needs --out: a track is built beside the whole course, not over it")
        for path in options.sources:
            if not path.exists():
                raise UserError(f"{path}: there is no such source")
        lessons = [read_lesson(path.resolve().relative_to(root)) for path in sources(root)]
        if not lessons:
            raise UserError(f"{root}: no solutions/NN_topic.py here: run it in the project's folder")
        wanted = {path.stem for path in options.sources} or {lesson.name for lesson in lessons}
        track = options.track or TRACKS[-1]
        chosen = [lesson for lesson in lessons if lesson.name in wanted and track in lesson.tracks]
        with tempfile.TemporaryDirectory() as beside:
            out = Path(beside) if options.check else (options.out or root)
            with ProcessPoolExecutor(WORKERS) as pool:
                written = [
                    p for paths in pool.map(_build, [(lesson, root, out, track) for lesson in chosen]) for p in paths
                ]
            readme = out / "lessons" / "README.md"
            write_text(readme, syllabus(lessons if not options.track else chosen))
            wrong = differences([*written, readme], out, root) if options.check else []
        for path in written:
            print(path.relative_to(out))
    except UserError as error:
        print(f"build: {error}", file=sys.stderr)
        return 2
    for line in wrong:
        print(f"build: {line}: run make notebooks", file=sys.stderr)
    return 1 if wrong else 0


def _build(task: tuple[Lesson, Path, Path, str]) -> list[Path]:
    return build(*task)


if __name__ == "__main__":
    sys.exit(main())
