"""Inference on stored FP8 weights: one byte each, and the same numbers as a model that rounds its inputs by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from by_the_tile import RMS, error, rounded
from random_models import YARN, nano, random_model, random_tokens
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_mini import DeepSeekV3, ModelConfig, from_pretrained, generate, save_pretrained
from dsv3_mini.errors import CheckpointError
from dsv3_mini.fp8.convert import to_fp8
from dsv3_mini.fp8.inference import StoredWeight, load_fp8
from dsv3_mini.hub.names import is_fp8_name
from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.model.experts import Dispatched, GroupedExperts, gated

FP8 = torch.float8_e4m3fn

CONFIGS = {
    "released shape": nano(),
    "ragged": nano(hidden_size=136, kv_lora_rank=130, intermediate_size=264, moe_intermediate_size=72),
    "whole blocks": nano(hidden_size=128, moe_intermediate_size=128, intermediate_size=256),
    "direct queries, YaRN": nano(q_lora_rank=None, **YARN),
    "dense only, no MTP": nano(first_k_dense_replace=3, num_nextn_predict_layers=0),
    "no shared expert": nano(n_shared_experts=0),
}


def saved(folder: Path, cfg: ModelConfig) -> Path:
    save_pretrained(random_model(cfg), folder / "model", dtype=FP8)
    return folder / "model"


class RoundedExperts(GroupedExperts):
    """Experts one after the other, on inputs rounded to FP8 by hand."""

    def compute(self, sent: Dispatched, weight: Tensor) -> Tensor:
        load, results = sent.load.tolist(), []
        parts = zip(sent.rows.split(load), weight.split(load), self.gate_up_proj, self.down_proj, strict=True)
        for rows, gates, gate_up, down in parts:
            if len(rows):
                hidden = gated(rounded(rows, (1, 128), power_of_two=True) @ gate_up.T, gates)
                results.append(rounded(hidden, (1, 128)) @ down.T)
        return torch.cat(results)


def rounding_by_hand(folder: Path) -> DeepSeekV3:
    """The oracle: dequantised weights in FP32, and every linear that is stored in FP8 reads a rounded input."""
    model = from_pretrained(folder, experts=RoundedExperts)

    def round_input(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        x = inputs[0]
        return rounded(x.reshape(-1, x.shape[-1]), (1, 128)).view_as(x)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_fp8_name(f"{name}.weight"):
            module.register_forward_pre_hook(round_input)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_inputs_rounded_by_hand(name: str, tmp_path: Path) -> None:
    folder, tokens = saved(tmp_path, CONFIGS[name]), random_tokens(CONFIGS[name])
    got, expected = load_fp8(folder, dtype=torch.float32)(tokens), rounding_by_hand(folder)(tokens)
    # FP32 sums in another order may now and then round an input the other way; unrounded inputs are 10 times further off.
    assert error(got.logits, expected.logits) < 5e-3
    for one, other in zip(got.mtp_logits, expected.mtp_logits, strict=True):
        assert error(one, other) < 5e-3
    assert error(expected.logits, from_pretrained(folder)(tokens).logits) > RMS


@torch.no_grad()
def test_weights_stay_one_byte_each_and_are_the_files_bytes(tmp_path: Path) -> None:
    cfg = CONFIGS["ragged"]
    folder = saved(tmp_path, cfg)
    model = load_fp8(folder)
    files = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    mtp = "model.layers.3."
    copies = {mtp + "embed_tokens.weight", mtp + "shared_head.head.weight"} & files.keys()
    in_files = sum(tensor.nbytes for name, tensor in files.items() if name not in copies)
    assert len(copies) == 2 and sum(tensor.nbytes for tensor in model.state_dict().values()) == in_files
    numbers = sum(tensor.numel() for name, tensor in files.items() if is_fp8_name(name))
    held = sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.dtype == FP8)
    assert held == numbers
    whole = sum(tensor.nbytes for tensor in from_pretrained(folder, dtype=torch.bfloat16).state_dict().values())
    assert in_files < 0.6 * whole  # not a half: embedding and head stay BF16
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


class Largest(TorchDispatchMode):
    """The most numbers that any one tensor has which an operation makes in a type of two bytes or more."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.dtype.itemsize > 1:
                self.numbers = max(self.numbers, tensor.numel())
        return out


@torch.no_grad()
def test_never_are_all_experts_dequantised_at_once(tmp_path: Path) -> None:
    """What is dequantised on a CPU is one matrix at a time: an expert's, never a layer's stack of them, and no whole model."""
    cfg = nano(n_routed_experts=32, num_experts_per_tok=2, moe_intermediate_size=64, vocab_size=128)
    model = load_fp8(saved(tmp_path, cfg), backend="exact")
    with Largest() as largest:
        model(random_tokens(cfg, rows=1, length=6))
    stack = max(
        stored.q.numel() for stored in model.modules() if isinstance(stored, StoredWeight) and stored.q.ndim == 3
    )
    single = max(
        stored.q.numel() for stored in model.modules() if isinstance(stored, StoredWeight) and stored.q.ndim == 2
    )
    assert largest.numbers <= max(single, cfg.vocab_size * cfg.hidden_size) < stack


@torch.no_grad()
def test_no_change_of_type_touches_stored_numbers(tmp_path: Path) -> None:
    model = load_fp8(saved(tmp_path, nano()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith((".q", ".scale"))}
    model.float().to(torch.bfloat16)
    for name, tensor in model.state_dict().items():
        if name in before:
            assert tensor.dtype == before[name].dtype, name
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert len(before) == 2 * (4 * 5 + 4 * 3 + 3 * 3)  # attention; dense and shared SwiGLUs; stacks of experts


@torch.no_grad()
def test_a_trained_twin_and_what_is_loaded_from_its_folder_agree(tmp_path: Path) -> None:
    """What training saw is what serving sees, where expert widths are whole blocks: same weights, same tiles."""
    cfg = CONFIGS["whole blocks"]
    model, tokens = random_model(cfg), random_tokens(cfg)
    for name, parameter in model.named_parameters():  # the others are stored in BF16
        if not is_fp8_name(name if name.endswith("weight") else name + ".weight"):
            parameter.copy_(parameter.bfloat16())
    save_pretrained(model, tmp_path / "saved", dtype=FP8)
    loaded = load_fp8(tmp_path / "saved", dtype=torch.float32)
    assert error(loaded(tokens).logits, to_fp8(model)(tokens).logits) < 5e-3


@torch.no_grad()
def test_it_writes_from_its_cache(tmp_path: Path) -> None:
    """A single new token goes the absorbed way, which reads kv_b_proj dequantised and the latent unrounded: one rounding less
    in each layer. Without experts, which a difference as small as this may exchange for others."""
    cfg = CONFIGS["dense only, no MTP"]
    folder, tokens = saved(tmp_path, cfg), random_tokens(cfg, rows=2, length=16)
    model = load_fp8(folder)
    cache = LatentCache.for_model(cfg, 2, 16, torch.bfloat16, torch.device("cpu"))
    parts = [model(piece, cache=cache).logits for piece in tokens.split([15, 1], dim=1)]
    at_once = model(tokens).logits
    # BF16 (2^-9 a rounding) comes on top of it; a wrong weight would be 100% off.
    assert error(parts[0], at_once[:, :15]) < 2 * RMS and error(parts[1], at_once[:, 15:]) < 8 * RMS
    written = generate(model, tokens, max_new_tokens=5)
    best = at_once[:, -1].float()
    picked = best.gather(1, written[:, 16:17])[:, 0]
    assert written.shape == (2, 21) and (best.amax(-1) - picked < 0.05).all()  # BF16 may see two as equal


def test_a_folder_that_is_not_fp8_is_refused_in_one_line(tmp_path: Path) -> None:
    save_pretrained(random_model(nano()), tmp_path / "bf16")
    with pytest.raises(CheckpointError, match="is stored as BF16, not in FP8: use from_pretrained") as caught:
        load_fp8(tmp_path / "bf16")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_without_mtp_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    folder, tokens = saved(tmp_path, nano()), random_tokens(nano())
    whole, main = load_fp8(folder), load_fp8(folder, mtp=False)
    assert len(main.mtp) == 0 and not main(tokens).mtp_logits and len(whole(tokens).mtp_logits) == 1
    assert torch.equal(main(tokens).logits, whole(tokens).logits)
