"""Reads the tensors of a folder of safetensors, one at a time, with every file checked before the first is used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3_mini.errors import CheckpointError
from dsv3_mini.hub.fp8_blocks import BLOCK, Fp8Weight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALE = "_scale_inv"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FLOATS = ("F64", "F32", "F16", "BF16")


class TensorFolder(Mapping[str, "Tensor | Fp8Weight"]):
    """Name -> tensor. A weight that the folder stores in FP8 comes as an `Fp8Weight`, with the scale beside it.

    Tensors are read when they are asked for, not before; `shape` and `stored_dtype` read headers only.

    Raises:
        CheckpointError: no such folder, no safetensors, a file that is missing, cut off or damaged, an index that does not
            match the files, or an FP8 weight and scale that do not fit each other.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        stored = self._locate()
        self._scales = {
            name: file for name, file in stored.items() if name.removesuffix(SCALE) in stored.keys() - {name}
        }
        self._where = {name: file for name, file in stored.items() if name not in self._scales}
        for name in self._where:
            self._check_fp8(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor | Fp8Weight:
        weight = self._read(self._where[name], name)
        if name + SCALE not in self._scales:
            return weight
        return Fp8Weight(weight, self._read(self._scales[name + SCALE], name + SCALE))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header(self._where[name], name).get_shape())

    def stored_dtype(self, name: str) -> str:
        """As safetensors spells it: F32, BF16, F8_E4M3, ..."""
        return self._header(self._where[name], name).get_dtype()

    # ---- files -----------------------------------------------------------------------------------------------------

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name, for all tensors of all files."""
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is not a folder: give a local one with config.json and safetensors, nothing is downloaded"
            )
        single, index = (self.folder / SINGLE).is_file(), (self.folder / INDEX).is_file()
        if single and index:
            raise CheckpointError(f"{self.folder} holds both {SINGLE} and {INDEX}: remove the one that is out of date")
        if not single and not index:
            raise CheckpointError(self._nothing_to_read())
        if single:
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        named = self._read_index()
        found = {name: file for file in sorted(set(named.values())) for name in self._open(file).keys()}  # noqa: SIM118
        for name, file in named.items():
            if name not in self._open(file).keys():  # noqa: SIM118
                elsewhere = f"it is in {found[name]}" if name in found else "no file has it"
                raise CheckpointError(f"{self.folder / INDEX} says that {name} is in {file}, but {elsewhere}")
        unnamed = [name for name in found if name not in named]
        if unnamed:
            raise CheckpointError(f"{self.folder / INDEX} does not name {some(unnamed)}, which its files hold")
        return named

    def _nothing_to_read(self) -> str:
        pickles = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
        if pickles:
            return (
                f"{self.folder} holds {some(pickles)} but no safetensors: pickled weights are never opened, for they can run "
                "code; convert them to safetensors where you trust them"
            )
        return f"{self.folder} holds neither {SINGLE} nor {INDEX}: give the folder of a Hugging Face checkpoint"

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {one_line(error)}") from None
        named = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
            raise CheckpointError(
                f"{path} has no weight_map from tensor names to file names: write the checkpoint again"
            )
        for file in named.values():
            # An index is data from somewhere else: it must not lead out of its folder.
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{path} names the file {file!r}: it must be a .safetensors in the same folder")
        return named

    def _open(self, file: str) -> Any:
        """The open file. Opening checks that header and length fit each other."""
        if file not in self._files:
            path = self.folder / file
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, but {INDEX} names it: copy it again")
            try:
                self._files[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is cut off or damaged ({one_line(error)}): copy it again") from None
        return self._files[file]

    def _header(self, file: str, name: str) -> Any:
        return self._open(file).get_slice(name)

    def _read(self, file: str, name: str) -> Tensor:
        try:
            return self._open(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: {name} cannot be read ({one_line(error)})") from None

    def _check_fp8(self, name: str) -> None:
        dtype, shape, scale = self.stored_dtype(name), self.shape(name), name + SCALE
        if (dtype == "F8_E4M3") != (scale in self._scales):
            has = f"is stored as {dtype} and has" + ("" if scale in self._scales else " no")
            raise CheckpointError(
                f"{self.folder}: {name} {has} {scale}: an FP8 (F8_E4M3) weight has one, others have none"
            )
        if scale not in self._scales:
            return
        header = self._header(self._scales[scale], scale)
        blocks = [-(-side // BLOCK) for side in shape]
        if len(shape) != 2 or header.get_shape() != blocks or header.get_dtype() != "F32":
            raise CheckpointError(
                f"{self.folder}: {scale} is {header.get_dtype()} {header.get_shape()} and must be F32 {blocks}: one scale for "
                f"each {BLOCK}x{BLOCK} block of {list(shape)}"
            )


def read_tensors(folder: str | Path) -> TensorFolder:
    """The tensors of a checkpoint folder by released name, read one at a time; FP8 weights as `Fp8Weight(q, scale)`.

    Needs no config.json. Raises CheckpointError as `TensorFolder` does.
    """
    return TensorFolder(folder)


def as_dtype(stored: Tensor | Fp8Weight, dtype: torch.dtype) -> Tensor:
    return stored.dequantise(dtype) if isinstance(stored, Fp8Weight) else stored.to(dtype)


def some(names: Iterable[str], most: int = 4) -> str:
    """The first names and the number of the others: a list for one line."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
