"""The released names of a model's tensors: one mapping, for both directions.

`released_tensors(model)` gives every tensor of the released layout as a *view* into the model's own parameters. Saving
reads the views, loading copies into them; so there is no inverse mapping that could disagree, and no second copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.model import DeepSeekV3

GATE_BIAS = "e_score_correction_bias"


def released_tensors(model: DeepSeekV3) -> dict[str, Tensor]:
    """Released name -> a view that shares memory with the model's parameter or buffer. Works on meta, too."""
    views: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        views.update(_split(released_name(name, model.cfg), tensor))
    return views


def released_name(name: str, cfg: ModelConfig) -> str:
    """Our parameter's name in the released tree; fused parameters keep their fused name."""
    if name.startswith("lm_head."):
        return name
    module = re.fullmatch(r"mtp\.(\d+)\.(.*)", name)
    if module:
        inner = module[2].removeprefix("block.")
        inner = f"shared_head.{inner}" if module[2].startswith("norm.") else inner
        name = f"layers.{cfg.num_hidden_layers + int(module[1])}.{inner}"
    return "model." + name.replace(".q_proj.q_", ".q_")


def shared_names(cfg: ModelConfig) -> dict[str, str]:
    """The copies that ship inside each MTP layer -> the main model's tensor that they must equal."""
    copies = {}
    for layer in range(cfg.num_hidden_layers, cfg.num_hidden_layers + cfg.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return copies


def is_mtp_name(name: str, cfg: ModelConfig) -> bool:
    """Whether a released name belongs to an MTP layer (a number from `num_hidden_layers` on)."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= cfg.num_hidden_layers


def is_fp8_name(name: str) -> bool:
    """Whether the released FP8 layout stores this tensor in E4M3: all linears of attention, feed-forward and experts.

    Embedding, head, norms, gates and MTP's `eh_proj` stay in BF16, the gate bias in FP32. The hub's own count of the
    released files (680,571,043,840 E4M3, 3,918,786,560 BF16, 41,555,600 FP32) holds for exactly this rule.
    """
    return re.search(r"_proj(_with_mqa)?\.weight$", name) is not None and not name.endswith(".eh_proj.weight")


def _split(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Experts one by one, and gate apart from up. Every piece is a contiguous view."""
    stem, stacked, leaf = name.partition(".experts.")
    pieces = [(name, tensor)]
    if stacked:
        pieces = [(f"{stem}.experts.{e}.{leaf}.weight", weight) for e, weight in enumerate(tensor)]
    for piece, weight in pieces:
        if "gate_up_proj" in piece:
            gate, up = weight.chunk(2)
            yield piece.replace("gate_up_proj", "gate_proj"), gate
            yield piece.replace("gate_up_proj", "up_proj"), up
        else:
            yield piece, weight
