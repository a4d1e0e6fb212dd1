"""Lessons from their sources: `python -m dsv3_mini.course.build`.

solutions/NN_topic.py (jupytext's percent format) is executed and becomes lessons/NN_topic.ipynb with its outputs. What
differs from one build to the next is left out: cell ids come from the source, times and versions are not kept. So a
build with no change is no diff.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from dsv3_mini.errors import UserError

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read_source(source: Path) -> NotebookNode:
    """A lesson's cells, not yet run, with ids derived from what they say."""
    notebook = jupytext.read(source)
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        digest = hashlib.sha256((cell.cell_type + cell.source).encode()).hexdigest()[:8]
        cell.id = digest if not seen[digest] else f"{digest}-{seen[digest]}"
        seen[digest] += 1
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
    notebook.metadata = NotebookNode(METADATA)
    return notebook


def execute(notebook: NotebookNode, folder: Path, name: str) -> NotebookNode:
    """Run all cells in `folder`. UserError names the lesson and its error."""
    try:
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    except CellExecutionError as error:
        raise UserError(f"{name}: a cell failed: {error.ename}: {error.evalue}") from None
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times
    notebook.metadata = NotebookNode(METADATA)
    return notebook


def build(source: Path, lessons: Path) -> Path:
    """Build one lesson; the file that was there stays until the new one is complete."""
    lessons.mkdir(exist_ok=True)
    notebook = execute(read_source(source), lessons, source.name)
    target = lessons / f"{source.stem}.ipynb"
    partial = target.with_suffix(".partial")
    nbformat.write(notebook, partial)
    os.replace(partial, target)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the lessons named, or all of them."""
    root = Path.cwd()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sources = [Path(name) for name in arguments] or sorted((root / "solutions").glob("[0-9][0-9]_*.py"))
    for source in sources:
        try:
            print(build(source, root / "lessons"))
        except UserError as error:
            print(f"build: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
