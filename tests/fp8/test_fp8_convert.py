"""A model and its FP8 twin: what turns, what stays, the way back, and the released FP8 layout that both are saved in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from by_the_tile import RMS, error
from random_models import nano, random_model, random_tokens
from safetensors.torch import load_file
from torch import Tensor, nn

from dsv3_mini import DeepSeekV3, ModelConfig, from_pretrained, save_pretrained
from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.attention import FP8Attention
from dsv3_mini.fp8.convert import from_fp8, to_fp8
from dsv3_mini.fp8.linear import FP8Linear
from dsv3_mini.fp8.recipe import ABLATIONS, REPORT
from dsv3_mini.hub.names import is_fp8_name, released_tensors
from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.model.attention import MultiHeadLatentAttention
from dsv3_mini.model.experts import LoopExperts
from dsv3_mini.train.losses import training_losses

FP8 = torch.float8_e4m3fn


def logits(model: DeepSeekV3, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def gradients(model: DeepSeekV3, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    training_losses(model, tokens[:, :-1], tokens[:, 1:], 0.3, 1e-3).total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("queries", [32, None])
def test_what_the_released_layout_stores_in_fp8_turns_and_nothing_else(queries: int | None) -> None:
    model = random_model(nano(num_nextn_predict_layers=2, q_lora_rank=queries))
    plain = {name: type(module) for name, module in model.named_modules()}
    to_fp8(model)
    turned = {name for name, module in model.named_modules() if type(module) is not plain[name]}
    in_fp8 = {id(p) for name in turned for p in model.get_submodule(name).parameters(recurse=False)}
    stored = {view.data_ptr() for name, view in released_tensors(model).items() if is_fp8_name(name)}
    ours = {name for name, parameter in model.named_parameters() if id(parameter) in in_fp8}
    theirs = {
        name
        for name, parameter in model.named_parameters()
        if any(parameter.data_ptr() <= start < parameter.data_ptr() + parameter.nbytes for start in stored)
    }
    assert ours == theirs and any("experts.down_proj" in name for name in ours)
    kinds = {plain[name].__name__ for name in turned}
    assert kinds == {"Linear", "SwiGLU", "GroupedExperts", "MultiHeadLatentAttention"}
    for name in ("lm_head", "embed_tokens", "mtp.1.eh_proj", "layers.1.mlp.gate", "layers.0.input_layernorm"):
        assert name not in turned
    behind = {
        name for name, module in model.named_modules() if isinstance(module, FP8Linear) and module.after_attention
    }
    assert len(behind) == 5 and all(name.endswith("self_attn.o_proj") for name in behind)


def test_the_twin_has_the_same_parameters_and_the_way_back_is_exact() -> None:
    model, tokens = random_model(nano()), random_tokens(nano())
    before, expected = dict(model.state_dict(keep_vars=True)), logits(model, tokens)
    assert to_fp8(model) is model
    after = model.state_dict(keep_vars=True)
    assert before.keys() == after.keys() and all(after[name] is tensor for name, tensor in before.items())
    assert RMS < error(logits(model, tokens), expected) < 0.5
    assert from_fp8(model) is model
    assert torch.equal(logits(model, tokens), expected)
    assert not any(hasattr(module, "recipe") or hasattr(module, "after_attention") for module in model.modules())


def test_only_the_masters_stay_fp32_in_a_bf16_twin() -> None:
    model = to_fp8(random_model(nano())).to(torch.bfloat16)
    for name, tensor in model.state_dict().items():
        wide = is_fp8_name(name if name.endswith("weight") else name + ".weight") or name.endswith("bias")
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
    tokens = random_tokens(nano())
    assert logits(model, tokens).dtype == torch.bfloat16
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, tokens).values())


def test_a_twin_is_given_another_recipe() -> None:
    model = to_fp8(random_model(nano()))
    other = ABLATIONS["per-tensor scaling"]
    twins = [module for module in model.modules() if hasattr(module, "recipe")]
    assert twins and all(module.recipe is REPORT for module in twins)
    to_fp8(model, other)
    assert all(module.recipe is other for module in twins)


def test_what_has_no_twin_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="layers.1.mlp.experts: LoopExperts has no FP8 twin") as caught:
        to_fp8(random_model(nano(), LoopExperts))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="gate_up_proj has a bias"):
        to_fp8(nn.ModuleDict({"gate_up_proj": nn.Linear(4, 4)}))


# ---- attention that is computed again ----------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [32, None])
@pytest.mark.parametrize("documents", [False, True])
def test_computing_again_changes_no_bit(queries: int | None, documents: bool) -> None:
    model = to_fp8(random_model(nano(q_lora_rank=queries)))
    tokens = random_tokens(nano(), rows=2, length=40)
    ids = torch.arange(39).div(13, rounding_mode="floor").expand(2, 39) if documents else None
    found = []
    for kind in (FP8Attention, MultiHeadLatentAttention):
        for module in model.modules():
            if isinstance(module, MultiHeadLatentAttention):
                module.__class__ = kind
        model.zero_grad()
        losses = training_losses(model, tokens[:, :-1], tokens[:, 1:], 0.3, 1e-3, ids)
        losses.total.backward()
        found.append([losses.total.detach(), *(parameter.grad for parameter in model.parameters())])
    again, kept = found
    assert all(torch.equal(one, other) for one, other in zip(again, kept, strict=True))


def test_a_twin_writes_from_a_cache_what_it_reads_at_once() -> None:
    """Every token's rows are quantised on their own, so that what comes later changes nothing."""
    model, tokens = to_fp8(random_model(nano())), random_tokens(nano(), rows=2, length=24)
    at_once = logits(model, tokens)
    cache = LatentCache.for_model(model.cfg, 2, 24, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        parts = [model(piece, cache=cache).logits for piece in tokens.split([10, 1, 1, 8, 1, 3], dim=1)]
    # Sums in another order may now and then round an operand the other way.
    assert error(torch.cat(parts, dim=1), at_once) < 5e-3


# ---- in and out of a folder --------------------------------------------------------------------------------------------


def wide() -> ModelConfig:
    """Sides above 128, and no multiples of it: several blocks, ragged at both edges."""
    return nano(hidden_size=136, kv_lora_rank=130, intermediate_size=264, vocab_size=300, moe_intermediate_size=72)


def dequantized_by_hand(q: Tensor, scale: Tensor) -> Tensor:
    """W = q * scale, number by number in Python."""
    values, scales = q.float().tolist(), scale.tolist()
    return torch.tensor([[v * scales[r // 128][c // 128] for c, v in enumerate(row)] for r, row in enumerate(values)])


def test_a_twin_is_saved_in_the_released_layout_and_comes_back(tmp_path: Path) -> None:
    cfg = wide()
    model = to_fp8(random_model(cfg))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients(model, random_tokens(cfg))
    optimizer.step()  # weights of a run, not of an initialisation
    save_pretrained(model, tmp_path / "twin", dtype=FP8)
    files = {name: t for file in (tmp_path / "twin").glob("*.safetensors") for name, t in load_file(file).items()}
    config = json.loads((tmp_path / "twin" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    loaded = released_tensors(from_pretrained(tmp_path / "twin"))
    checked = 0
    for name, weight in released_tensors(model).items():
        if not is_fp8_name(name):
            assert name + "_scale_inv" not in files
            continue
        q, scale = files[name], files[name + "_scale_inv"]
        blocks = [[-(-side // 128) for side in weight.shape], weight.shape]
        assert q.dtype == FP8 and scale.dtype == torch.float32 and [list(scale.shape), q.shape] == blocks
        by_hand = dequantized_by_hand(q, scale)
        # By definition a scale makes its block's largest number 448, the largest of E4M3.
        for r in range(scale.shape[0]):
            for c in range(scale.shape[1]):
                block = (slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128))
                assert scale[r, c].item() == pytest.approx(weight[block].abs().max().item() / 448, rel=1e-6)
                step = scale[r, c].item() * 2.0**-9
                off = (by_hand[block] - weight[block]).abs()
                assert (off <= weight[block].abs() / 16 + step / 2 + 1e-9).all(), name
        # Products of Python are FP64 and rounded to FP32 here: what FP32 gives, as one product is rounded correctly.
        assert torch.equal(loaded[name], by_hand), name
        checked += 1
    assert checked == sum(is_fp8_name(name) for name in loaded) > 50

    save_pretrained(from_fp8(model), tmp_path / "plain", dtype=FP8)
    one, other = (sorted((tmp_path / which).iterdir()) for which in ("twin", "plain"))
    assert [path.name for path in one] == [path.name for path in other]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))


def test_a_loaded_model_trains_on_as_a_twin(tmp_path: Path) -> None:
    """Blocks that were quantised once are quantised to the same numbers again: loading into a twin loses nothing more."""
    cfg = nano(hidden_size=128, moe_intermediate_size=128, intermediate_size=256)
    model, tokens = to_fp8(random_model(cfg)), random_tokens(cfg)
    with torch.no_grad():  # the others are stored in BF16
        for name, parameter in model.named_parameters():
            if not is_fp8_name(name if name.endswith("weight") else name + ".weight"):
                parameter.copy_(parameter.bfloat16())
    save_pretrained(model, tmp_path / "saved", dtype=FP8)
    again = to_fp8(from_pretrained(tmp_path / "saved"))
    assert error(logits(again, tokens), logits(model, tokens)) < 5e-3
