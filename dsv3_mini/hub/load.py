"""From a Hugging Face folder to a model, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import CheckpointError
from dsv3_mini.hub.fp8_blocks import BLOCK
from dsv3_mini.hub.names import is_mtp_name, released_tensors, shared_names
from dsv3_mini.hub.reader import FLOATS, TensorFolder, as_dtype, read_tensors, some
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.experts import GroupedExperts


def from_pretrained(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    experts: type[GroupedExperts] = GroupedExperts,
    mtp: bool = True,
) -> DeepSeekV3:
    """The model of a folder with config.json and safetensors (one file, or shards with an index).

    All is checked by the files' headers first; then the model's memory is taken once and filled tensor by tensor, so
    loading needs the model's size and the largest tensor's (in FP32 where it is stored in FP8).

    Args:
        folder: a local folder, as released, or as `save_pretrained` of this package or of transformers writes it.
        dtype: of the parameters. FP8 weights are dequantised to it; gate biases are FP32 whatever it is.
        device: where the parameters live.
        experts: how routed experts are computed.
        mtp: False leaves the MTP modules out. transformers, for one, saves a config that names them and not their weights.

    Raises:
        CheckpointError: the folder or one of its files cannot be used, or its tensors are not those that its config asks for.
        ConfigError: a field of config.json breaks a rule.
    """
    tensors, model = open_checkpoint(folder, dtype, experts, mtp)
    model.to_empty(device=device)
    views = released_tensors(model)
    for name, view in views.items():
        view.copy_(as_dtype(tensors[name], view.dtype))
    check_copies(tensors, model)
    return model


def open_checkpoint(
    folder: str | Path, dtype: torch.dtype, experts: type[GroupedExperts] = GroupedExperts, mtp: bool = True
) -> tuple[TensorFolder, DeepSeekV3]:
    """A folder's tensors, and on meta the model that its config describes; they fit each other, by the files' headers.

    Arguments and errors are those of `from_pretrained`.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        raise CheckpointError(
            f"dtype = {dtype} cannot hold a model: use float32 or bfloat16 (read_tensors keeps FP8 as it is)"
        )
    tensors = read_tensors(folder)
    cfg = _read_config(Path(folder))
    passed_over: set[str] = set()
    if not mtp:
        passed_over = {name for name in tensors if is_mtp_name(name, cfg)}
        cfg = cfg.replace(num_nextn_predict_layers=0)

    with torch.device("meta"):
        model = DeepSeekV3(cfg, experts).to(dtype)
    expected = released_tensors(model)
    present_copies = {copy: main for copy, main in shared_names(cfg).items() if copy in tensors}
    shapes = {**expected, **{copy: expected[main] for copy, main in present_copies.items()}}
    _check(tensors, shapes, passed_over, cfg)
    return tensors, model


def check_copies(tensors: TensorFolder, model: DeepSeekV3) -> None:
    """CheckpointError unless MTP's stored embeddings and heads are those that the loaded model has."""
    views = released_tensors(model)
    for copy, main in shared_names(model.cfg).items():
        own = views[main]
        if copy in tensors and not torch.equal(as_dtype(tensors[copy], own.dtype).to(own.device), own):
            raise CheckpointError(
                f"{tensors.folder}: {copy} differs from {main}: MTP shares the main model's; this package cannot hold a "
                "second one (mtp=False loads without MTP)"
            )


def _read_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
    cfg = ModelConfig.from_hf(path)
    quantisation = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        block = quantisation.get("weight_block_size") if method == "fp8" else None
        if block != [BLOCK, BLOCK]:
            raise CheckpointError(
                f"{path}: quantization_config has quant_method {method!r} and weight_block_size {block!r}: only 'fp8' in "
                f"[{BLOCK}, {BLOCK}] blocks can be read"
            )
    return cfg


def _check(tensors: TensorFolder, expected: Mapping[str, Tensor], passed_over: set[str], cfg: ModelConfig) -> None:
    """One error for all that is wrong: names of what is missing, unknown, of the wrong shape or type."""
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected and name not in passed_over]
    present = [name for name in expected if name in tensors]
    shapes = [
        f"{name} {list(tensors.shape(name))} instead of {list(expected[name].shape)}"
        for name in present
        if tensors.shape(name) != tuple(expected[name].shape)
    ]
    types = [
        f"{name} {tensors.stored_dtype(name)}"
        for name in present
        if tensors.stored_dtype(name) not in (*FLOATS, "F8_E4M3")
    ]
    said = [
        f"{len(names)} {what} ({some(names)})"
        for what, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("of wrong shape", shapes),
            ("of wrong type", types),
        )
        if names
    ]
    if not said:
        return
    only_mtp = missing and all(is_mtp_name(name, cfg) for name in missing) and len(said) == 1
    hint = "; they are MTP's: mtp=False loads without" if only_mtp else "; config.json and weights are not of one model"
    raise CheckpointError(f"{tensors.folder}: tensors {'; '.join(said)}{hint}")
