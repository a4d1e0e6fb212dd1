"""Notebooks of the fake lesson 40: solved, blank, and broken in every way we could think of."""

from __future__ import annotations

from pathlib import Path

import nbformat

FIRST = "import torch\nimport fake_lesson_40 as check"
BLANK = [
    FIRST,
    "def double(x):\n    # YOUR CODE: twice x\n    raise NotImplementedError",
    "check.double(double)",
    "def scale(x, weight):\n    raise NotImplementedError",
    "check.scale(scale)",
    "def total(x):\n    raise NotImplementedError",
    "check.total(total)",
]
SOLVED = [
    FIRST,
    "def double(x):\n    return 2 * x",
    "check.double(double)",
    "def scale(x, weight):\n    return x * weight",
    "check.scale(scale)",
    "def total(x):\n    return x.sum()",
    "check.total(total)",
]
HOSTS = ("example.com", "93.184.215.14", "192.0.2.1")  # a name, an address, a datagram's
HOSTILE = 4  # the number of the cell that `with_cell` adds: between double and scale


def with_cell(*sources: str) -> list[str]:
    return [*SOLVED[: HOSTILE - 1], *sources, *SOLVED[HOSTILE - 1 :]]


def broken(outside: Path) -> dict[str, list[str]]:
    """First the ten that a grader must survive. `outside` is a folder that none of them may touch; it holds note.txt and sub/deep.txt."""
    note = f"{str(outside / 'note.txt')!r}"
    return {
        "syntax": [*SOLVED[:3], "def scale(x, weight)\n    return x * weight", *SOLVED[4:]],
        "loop": with_cell("while True:\n    pass"),
        "memory": with_cell(
            "block = bytearray(10**10)",
            "block = torch.ones(10**10 // 4)",
            "blocks = []\nwhile True:\n    blocks.append(bytearray(10**8))",
            "del blocks",
        ),
        "exit": with_cell("import sys\nsys.exit(1)", "exit()"),
        "deleted": SOLVED[:2],
        "renamed": [cell.replace("def scale", "def scales") for cell in SOLVED],
        "network": with_cell(
            "import urllib.request\nurllib.request.urlopen('http://example.com', timeout=3)",
            "import socket\nsocket.create_connection(('93.184.215.14', 80), timeout=3)",
            "try:\n    socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))\nexcept OSError:\n    pass",
        ),
        "storm": with_cell(
            "import matplotlib.pyplot as plt\nplt.rcParams['figure.max_open_warning'] = 0\n"
            "while True:\n    figure, axes = plt.subplots()\n    axes.plot(range(1000))\n    figure.canvas.draw()",
            "open_figures = len(plt.get_fignums())",
            "assert open_figures == 0, open_figures",
        ),
        "deletion": with_cell(
            f"import os, shutil, subprocess\nfrom pathlib import Path\nshutil.rmtree({str(outside)!r})",
            f"os.remove({note})",
            f"Path({note}).write_text('gone')",
            f"os.rename({note}, 'mine.txt')",
            f"os.truncate({note}, 0)",
            f"os.symlink({str(outside)!r}, 'link')\nPath('link/note.txt').write_text('gone')",
            f"!rm -rf {outside}",
            "Path('mine.txt').write_text('may be')\nos.remove('mine.txt')\nPath.home().joinpath('own').mkdir()",
        ),
        "kill": with_cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"),
        # and these
        "kill-others": with_cell(
            "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
            "os.kill(-1, 0)",  # signal 0 only asks: should the guard ever fail, nothing is harmed
        ),
        "compiled": with_cell(  # where the audit hook does not see it: Landlock and the namespace do
            f"torch.save(torch.ones(3), {note})",
            f"import ctypes, os\nassert ctypes.CDLL(None).unlink({note}.encode()) == 0",
            "assert ctypes.CDLL(None).kill(os.getppid(), 0) == 0",
        ),
        "leave": with_cell("import os\nos._exit(3)"),
        "stubborn": with_cell(
            "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass"
        ),
        "shared-memory": with_cell(
            "import mmap\nblock = mmap.mmap(-1, 10**10)\nfor page in range(0, 10**10, 4096):\n    block[page] = 1"
        ),
        "forks": with_cell("import os\nwhile True:\n    os.fork()"),
        "forger": [
            "import torch\nimport dsv3_mini.course.checks.framework as framework\nimport fake_lesson_40 as check",
            "framework.Exercise.run = lambda self, answer: framework.Result(self.name, 'right')\n"
            "framework.difference = lambda *_: ''\ncheck.double = None",
            "def double(x):\n    return x",
            "from dsv3_mini.course.checks.framework import show as scale",
            "total = 3",
        ],
        "odd": [  # and all right
            FIRST,
            "%matplotlib inline\n%load_ext autoreload",
            "%%time\ndef double(x):\n    return x + x",
            "import os, sys\nos.closerange(0, 100)\nsys.stdout = sys.stderr = None",
            "def scale(x, weight):\n    return times(x, weight)",
            "import functools\ntotal = functools.partial(torch.sum)",
            "await __import__('asyncio').sleep(0)\ntimes = torch.mul",
        ],
        "replaced": [
            *SOLVED,
            "def scale(x, weight):\n    return x + weight",
            "double = 3\nfrom dsv3_mini.course.checks.framework import show as total",
        ],
    }


def write(cells: list[str], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A lesson")])
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(notebook, file)
