"""Checkpoints of a run: all that the next step depends on, in safetensors and JSON, written whole or not at all.

    RUN/checkpoints/step-00001200/state.safetensors    weights, moments, averages, gate biases, random state
                                  state.json           step, tokens seen, position in the data, settings

A checkpoint is written under a temporary name and renamed when complete, so a kill at any moment leaves the one before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3_mini.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write one, then remove the oldest beyond `keep`. Returns its folder."""
    root = run / "checkpoints"
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for file in temporary.iterdir():
        _flush(file)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _flush(root)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    for partial in root.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    return final


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one back. Raises a CheckpointError that names the file if it is missing or damaged."""
    file = folder / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        file = folder / "state.safetensors"
        return Checkpoint(load_file(file), state)
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).splitlines()[0]
        raise CheckpointError(
            f"{file} cannot be read ({first_line}): remove {folder.name} to resume from the one before"
        ) from None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
