"""The whole model against transformers' DeepseekV3, in both directions of conversion, through folders on disk."""

from pathlib import Path

import pytest
import torch
from random_models import YARN, assert_routing_is_awake, nano, random_model, random_tokens
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_mini import from_pretrained, save_pretrained
from dsv3_mini.config import RopeScaling
from dsv3_mini.model.experts import GroupedExperts, LoopExperts

TOLERANCE = 1e-5  # of the logits' scale, in FP32

CONFIGS = {
    "released shape": {},
    "YaRN": YARN,
    "YaRN with both factors": dict(
        max_position_embeddings=512,
        rope_scaling=RopeScaling(
            factor=8.0, original_max_position_embeddings=64, beta_fast=16.0, mscale=1.0, mscale_all_dim=0.707
        ),
    ),
    "YaRN without mscale_all_dim": dict(
        max_position_embeddings=256,
        rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=64, mscale_all_dim=0.0),
    ),
    "YaRN configured, not needed": dict(
        max_position_embeddings=64, rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=64)
    ),
    "direct queries": dict(q_lora_rank=None),
    "no shared expert": dict(n_shared_experts=0),
    "two shared experts": dict(n_shared_experts=2),
    "gates not normalised": dict(norm_topk_prob=False, routed_scaling_factor=1.0),
    "one group": dict(n_group=1, topk_group=1, num_experts_per_tok=3),
    "wide values": dict(v_head_dim=40),
    "equal widths": dict(v_head_dim=24),
    "dense only": dict(first_k_dense_replace=3, num_nextn_predict_layers=0),
    "sparse only": dict(first_k_dense_replace=0, rope_theta=500.0),
}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_save_transformers_opens_with_equal_logits(name: str, tmp_path: Path) -> None:
    cfg = nano(**CONFIGS[name])
    model, tokens = random_model(cfg), random_tokens(cfg)
    if cfg.first_k_dense_replace < cfg.num_hidden_layers:
        assert_routing_is_awake(model, tokens)
    save_pretrained(model, tmp_path / "ours", dtype=torch.float32, max_shard_bytes=150_000)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert isinstance(theirs, DeepseekV3ForCausalLM)
    # Without shared experts transformers still builds them, zero wide.
    assert all("shared_experts" in name and cfg.n_shared_experts == 0 for name in report["missing_keys"])
    assert not report["mismatched_keys"]
    assert all(".layers.3." in name for name in report["unexpected_keys"])  # MTP, which it reads only by MtpModel
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    assert relative(model(tokens).logits, expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("experts", [GroupedExperts, LoopExperts])
@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name != "no shared expert"]
)  # transformers saves them, zero wide
def test_what_transformers_saves_we_open_with_equal_logits(
    name: str, experts: type[GroupedExperts], tmp_path: Path
) -> None:
    cfg = nano(**CONFIGS[name])
    torch.manual_seed(2)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**cfg.to_hf())).eval()
    for key, tensor in theirs.state_dict().items():
        if key.endswith("e_score_correction_bias"):
            tensor.normal_(-0.8, 0.2)
        elif "norm" in key:
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(0, 0.32 if key.endswith("gate.weight") else 0.08)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs", experts=experts, mtp=False)
    tokens = random_tokens(cfg)
    if cfg.first_k_dense_replace < cfg.num_hidden_layers:
        assert_routing_is_awake(ours, tokens)
    assert ours.cfg == cfg.replace(num_nextn_predict_layers=0, rope_scaling=ours.cfg.rope_scaling)
    assert relative(ours(tokens).logits, theirs(tokens).logits) <= TOLERANCE


@torch.no_grad()
def test_a_longer_model_with_uneven_groups_of_choice() -> None:
    """More experts than a token chooses, by far; choices in 3 of 8 groups; through a state dict in memory."""
    cfg = nano(num_hidden_layers=4, n_routed_experts=32, n_group=8, topk_group=3, num_experts_per_tok=6, **YARN)
    ours, tokens = random_model(cfg), random_tokens(cfg, length=200)
    assert_routing_is_awake(ours, tokens)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**cfg.to_hf())).eval()
    weights = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if name.startswith("mtp"):
            continue
        name = (
            name.replace("q_proj.q_", "q_")
            if name.startswith("lm_head")
            else f"model.{name.replace('q_proj.q_', 'q_')}"
        )
        if name in weights:
            weights.pop(name).copy_(tensor)
        else:
            gate, up = tensor.chunk(2)
            weights.pop(name.replace("gate_up", "gate")).copy_(gate)
            weights.pop(name.replace("gate_up", "up")).copy_(up)
    assert not weights
    assert relative(ours(tokens).logits, theirs(tokens).logits) <= TOLERANCE


def test_gradients_equal_transformers(tmp_path: Path) -> None:
    cfg = nano(num_nextn_predict_layers=0, **YARN)
    ours, tokens = random_model(cfg), random_tokens(cfg)
    save_pretrained(ours, tmp_path / "ours", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").train()
    weigh = torch.randn(2, 48, cfg.vocab_size)
    (ours(tokens).logits * weigh).mean().backward()
    (theirs(tokens).logits * weigh).mean().backward()
    pairs = [
        (ours.embed_tokens.weight, theirs.model.embed_tokens.weight),
        (ours.lm_head.weight, theirs.lm_head.weight),
        *(
            (mine.self_attn.get_parameter(name), his.self_attn.get_parameter(name))
            for mine, his in zip(ours.layers, theirs.model.layers, strict=True)
            for name in ("kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight")
        ),
        *(
            (mine.mlp.get_parameter(name), his.mlp.get_parameter(name))
            for mine, his in list(zip(ours.layers, theirs.model.layers, strict=True))[1:]
            for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        ),
    ]
    for mine, his in pairs:
        assert his.grad.abs().max() > 0
        assert relative(mine.grad, his.grad) <= 1e-4


def test_the_oracle_can_fail() -> None:
    """One swapped half in one layer is seen: the tolerance is not wide."""
    cfg = nano()
    model, tokens = random_model(cfg), random_tokens(cfg)
    with torch.no_grad():
        before = model(tokens).logits
        weight = model.layers[1].mlp.experts.gate_up_proj
        weight[0] = torch.cat(weight[0].chunk(2)[::-1])
        assert relative(model(tokens).logits, before) > 100 * TOLERANCE
