"""From a model to a Hugging Face folder, complete or not there at all."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv3_mini.errors import CheckpointError
from dsv3_mini.hub.fp8_blocks import BLOCK, quantise_blocks
from dsv3_mini.hub.names import GATE_BIAS, is_fp8_name, released_tensors, shared_names
from dsv3_mini.hub.reader import INDEX, SCALE, one_line
from dsv3_mini.model import DeepSeekV3

STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def save_pretrained(
    model: DeepSeekV3,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Write config.json, model-00001-of-0000N.safetensors and their index, named as the released checkpoint is.

    All is written to a hidden folder beside `folder`, which takes its place when it is complete: a run that dies on the
    way leaves what was there. One shard at a time is copied to the CPU. transformers opens the result.

    Args:
        dtype: of the stored weights; `torch.float8_e4m3fn` writes the released FP8 layout (linears in E4M3 with a scale per
            128x128 block, the rest in BF16). Gate biases are FP32 in every layout.
        max_shard_bytes: the largest a file becomes, unless a single tensor is larger.
        overwrite: True replaces `folder`, all of it, if it holds a checkpoint.

    Raises:
        CheckpointError: `folder` is not free, dtype or max_shard_bytes make no sense, or the disk refuses.
    """
    with write_folder(model, folder, dtype, max_shard_bytes, overwrite) as new:
        write_weights(model, new, dtype, max_shard_bytes)
        write_json(new / "config.json", hf_config(model, dtype))


@contextmanager
def write_folder(
    model: DeepSeekV3, folder: str | Path, dtype: torch.dtype, max_shard_bytes: float, overwrite: bool
) -> Iterator[Path]:
    """A hidden folder to write a checkpoint into; when the block ends without an error it takes the place of `folder`.

    Arguments and errors are those of `save_pretrained`.
    """
    folder = Path(folder).resolve()
    if dtype not in STORED:
        raise CheckpointError(f"dtype = {dtype} cannot be stored: use float32, bfloat16, float16 or float8_e4m3fn")
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, (int, float)) or not max_shard_bytes > 0:
        raise CheckpointError(f"max_shard_bytes = {max_shard_bytes!r} must be a number of bytes above 0")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise CheckpointError("the model is on the meta device: it has shapes and no numbers to save")
    _check_free(folder, overwrite)

    token = uuid.uuid4().hex[:8]
    new, old = (folder.parent / f".{folder.name}.{what}-{token}" for what in ("writing", "replaced"))
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written: {one_line(error)}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def stored_layout(name: str, shape: torch.Size, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """What a layout stores for one released tensor: itself, cast; or E4M3 numbers and the scales of their blocks."""
    if name.endswith(GATE_BIAS):
        return {name: (shape, torch.float32)}
    if dtype != torch.float8_e4m3fn:
        return {name: (shape, dtype)}
    if not is_fp8_name(name):
        return {name: (shape, torch.bfloat16)}
    blocks = torch.Size(-(-side // BLOCK) for side in shape)
    return {name: (shape, dtype), name + SCALE: (blocks, torch.float32)}


def _stored_tensors(name: str, tensor: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    layout = stored_layout(name, tensor.shape, dtype)
    if name + SCALE in layout:
        weight = quantise_blocks(tensor)
        return {name: weight.q, name + SCALE: weight.scale}
    return {name: tensor.to(layout[name][1])}


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: choose another place to save to")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{folder} is not empty: choose another folder, or overwrite=True to replace it")
    # overwrite=True with a home folder must not be the end of the home folder.
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds other things than a checkpoint: overwrite=True replaces checkpoints only"
        )


def write_weights(model: DeepSeekV3, folder: Path, dtype: torch.dtype, max_shard_bytes: float) -> None:
    """All tensors of a model in shards, and their index."""
    tensors = released_tensors(model)
    tensors.update({copy: tensors[main] for copy, main in shared_names(model.cfg).items()})
    shards: list[list[str]] = [[]]
    sizes = {name: _stored_bytes(name, tensor, dtype) for name, tensor in tensors.items()}
    filled = 0
    for name, size in sizes.items():  # a weight and its scales stay together
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size

    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard: dict[str, Tensor] = {}
        for name in names:
            for stored, tensor in _stored_tensors(name, tensors[name], dtype).items():
                # Views of one parameter, and MTP's copies, share memory; safetensors wants each on its own.
                shard[stored] = tensor.to("cpu", copy=True).contiguous()
                weight_map[stored] = file
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def _stored_bytes(name: str, tensor: Tensor, dtype: torch.dtype) -> int:
    return sum(shape.numel() * kind.itemsize for shape, kind in stored_layout(name, tensor.shape, dtype).values())


def hf_config(model: DeepSeekV3, dtype: torch.dtype) -> dict[str, object]:
    """The content of config.json for weights stored in `dtype`."""
    fp8 = dtype == torch.float8_e4m3fn
    config = {**model.cfg.to_hf(), "torch_dtype": "bfloat16" if fp8 else str(dtype).removeprefix("torch.")}
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
    return config


def write_json(path: Path, values: dict[str, object]) -> None:
    """Indented, with a line end, as the hub's own files are."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
