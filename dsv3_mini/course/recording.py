"""The command behind a recording: measurements that take minutes, written as JSON for a lesson to play back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_mini.files import write_text


def write_recording(name: str, record: Callable[[], dict[str, Any]], description: str) -> None:
    """Parse the command line (--out FILE, data/`name` if not given), and write what `record` measures."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", default="data/" + name, help=f"(default: data/{name})")
    file = Path(parser.parse_args().out)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(record(), indent=1) + "\n")
