"""Checkpoints of a run: all that the next step depends on, in safetensors and JSON, written whole or not at all.

    RUN/checkpoints/step-00001200/state.safetensors    weights, moments, averages, gate biases, random state
                                  state.json           step, tokens seen, position in the data, settings

Processes that share weights write files of pieces instead (parallel/checkpoint.py), which are read here as well.

A checkpoint is written under a temporary name and renamed when complete, so a kill at any moment leaves the one before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3_mini.errors import CheckpointError

STATE = ("step", "tokens", "seconds", "context", "stream")
WHOLE, PIECES = "state.safetensors", "shard-*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """One of its tensors. CheckpointError names the tensor if it is missing or of another shape."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.shape != shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{self.folder / 'state.safetensors'}: {name} {found}, expected {tuple(shape)}: remove {self.folder.name} "
                "to resume from the one before"
            )
        return tensor


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write one, then remove the oldest beyond `keep`. Returns its folder.

    Raises:
        CheckpointError: the disk refuses; what was there before stays.
    """
    root = run / "checkpoints"
    final = root / checkpoint_name(step)
    temporary = root / f".{final.name}.{os.getpid()}.partial"
    begin(temporary)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / WHOLE)
        write_state(temporary, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(final, error) from None
    publish(temporary, final, keep)
    return final


def cannot_write(final: Path, error: Exception, who: str = "") -> CheckpointError:
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"{who}{final} cannot be written ({first_line}): make room, and run the same command again; "
        "it goes on from the checkpoint before"
    )


def begin(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def write_state(temporary: Path, state: Mapping[str, Any]) -> None:
    """The last file; then all of them are on the disk."""
    (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for file in [*temporary.iterdir(), temporary]:
        _flush(file)


def publish(temporary: Path, final: Path, keep: int = 2) -> None:
    """Give a complete checkpoint its name, then remove the oldest beyond `keep`, and what was never completed."""
    root = final.parent
    if final.exists():
        _take_away(final)
    os.replace(temporary, final)
    _flush(root)
    for old in checkpoints(root.parent)[:-keep]:
        _take_away(old)
    for partial in root.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one back. Raises a CheckpointError that names the file if it is missing or damaged."""
    stored = open_checkpoint(folder)
    return Checkpoint(folder, {name: stored.tensors[name] for name in stored.tensors}, stored.state)


def open_checkpoint(folder: Path) -> Checkpoint:
    """As `load_checkpoint`, but each tensor is read when it is asked for, and every time that it is."""
    state = load_state(folder)
    return Checkpoint(folder, StoredTensors(folder), state)


class StoredTensors(Mapping[str, Tensor]):
    """Name -> tensor, whole, from one file or put together from files of pieces, each of which tells where it begins.

    Raises a CheckpointError that names the file where one is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        in_pieces = any(folder.glob(PIECES)) and not (folder / WHOLE).exists()
        self.file = folder / (PIECES if in_pieces else WHOLE)
        self._pieces: dict[str, list[tuple[Any, list[int] | None]]] = {}
        with _readable(self.file):
            for file in sorted(folder.glob(PIECES)) if in_pieces else [self.file]:
                opened = safe_open(file, framework="pt")
                places = json.loads((opened.metadata() or {})["DCP_SHARDING_INFO"]) if in_pieces else {}
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    start = places[name]["saved_offsets"] if in_pieces else None
                    self._pieces.setdefault(name, []).append((opened, start))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        with _readable(self.file):
            read = [(start, opened.get_tensor(name)) for opened, start in pieces]
            return read[0][1] if read[0][0] is None else _joined(read)


def load_state(folder: Path) -> dict[str, Any]:
    """What its state.json says. Raises a CheckpointError that names the file if it is missing or damaged."""
    with _readable(folder / "state.json"):
        state = dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))
        missing = [name for name in STATE if name not in state]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        return state


def _joined(pieces: list[tuple[list[int], Tensor]]) -> Tensor:
    """The whole of pieces, by where each begins."""
    ends = [[start + size for start, size in zip(starts, piece.shape, strict=True)] for starts, piece in pieces]
    whole = pieces[0][1].new_empty([max(along) for along in zip(*ends, strict=True)])
    if sum(piece.numel() for _, piece in pieces) != whole.numel():
        raise ValueError("a file of pieces is missing")
    for (starts, piece), end in zip(pieces, ends, strict=True):
        whole[tuple(slice(*along) for along in zip(starts, end, strict=True))] = piece
    return whole


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file} cannot be read ({first_line}): remove {file.parent.name} to resume from the one before"
        ) from None


def _take_away(folder: Path) -> None:
    """Rename, then delete: a kill while files are being deleted leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old.partial")
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
