"""Each divergence against the same thing done apart: another function, another config, a loop over one token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import YARN, assert_routing_is_awake, nano, random_tokens
from torch import Tensor

from dsv3_mini.config import ModelConfig, RopeScaling
from dsv3_mini.course.divergences import DIVERGENCES, OtherRouter, altered, largest_change, wake
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model import attention as attention_module
from dsv3_mini.model.rope import rotations
from dsv3_mini.model.router import Router


@pytest.fixture
def cfg() -> ModelConfig:
    return nano(num_nextn_predict_layers=2, **YARN)


@pytest.fixture
def model(cfg: ModelConfig) -> DeepSeekV3:
    return wake(DeepSeekV3(cfg)).eval()


@pytest.fixture
def tokens(cfg: ModelConfig) -> Tensor:
    return random_tokens(cfg)


@torch.no_grad()
def logits_of(model: DeepSeekV3, tokens: Tensor) -> list[Tensor]:
    out = model(tokens)
    return [out.logits, *out.mtp_logits]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def assert_exact(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def rewoken(cfg: ModelConfig, model: DeepSeekV3) -> DeepSeekV3:
    """The same weights under another config."""
    other = DeepSeekV3(cfg)
    other.load_state_dict(model.state_dict())
    return other


# ---- the frame ---------------------------------------------------------------------------------------------------------


def test_wake_wakes(model: DeepSeekV3, tokens: Tensor) -> None:
    assert_routing_is_awake(model, tokens)


def test_wake_is_the_same_each_time_and_leaves_the_random_numbers_alone(cfg: ModelConfig) -> None:
    torch.manual_seed(3)
    one, after = DeepSeekV3(cfg), torch.get_rng_state()
    wake(one)
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    assert_exact(list(one.state_dict().values()), list(wake(DeepSeekV3(cfg)).state_dict().values()))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_copy_is_altered_and_the_model_stays(model: DeepSeekV3, tokens: Tensor, name: str) -> None:
    before = logits_of(model, tokens)
    largest = largest_change(model, name, tokens)
    assert_exact(before, logits_of(model, tokens))
    after = logits_of(altered(model, name), tokens)
    changes = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(after, before, strict=True)]
    assert largest == pytest.approx(max(changes)) and largest > 1e-3, "awake weights show it"


def test_fresh_weights_hide_exactly_what_concerns_the_bias(cfg: ModelConfig, tokens: Tensor) -> None:
    fresh = DeepSeekV3(cfg.replace(initializer_range=0.006))
    unseen = {name for name in DIVERGENCES if largest_change(fresh, name, tokens) == 0}
    assert unseen == {
        "groups ranked without the bias",
        "other groups at 0, not -inf",
        "gate values contain the bias",
    }


# ---- the gate ----------------------------------------------------------------------------------------------------------


def test_with_its_switches_as_they_stand_the_other_router_is_the_packages(model: DeepSeekV3, tokens: Tensor) -> None:
    before = logits_of(model, tokens)
    for module in model.modules():
        if isinstance(module, Router):
            module.__class__ = OtherRouter
    assert_exact(before, logits_of(model, tokens))


def gates_of_one_token(router: Router, x: Tensor, name: str) -> tuple[dict[int, float], int]:
    """Expert -> gate value, in plain numbers; and how many of the chosen stand outside the best groups."""
    s = (router.weight @ x).sigmoid().tolist()
    b = [score + bias for score, bias in zip(s, router.e_score_correction_bias.tolist(), strict=True)]
    size = len(s) // router.n_group
    ranked = s if name == "groups ranked without the bias" else b
    ranks = {g: sum(sorted(ranked[g * size : (g + 1) * size])[-2:]) for g in range(router.n_group)}
    best = sorted(ranks, key=lambda g: -ranks[g])[: router.topk_group]
    outside = 0.0 if name == "other groups at 0, not -inf" else float("-inf")
    wish = [b[e] if e // size in best else outside for e in range(len(s))]
    chosen = sorted(range(len(s)), key=lambda e: -wish[e])[: router.k]
    weights = b if name == "gate values contain the bias" else s
    total = sum(weights[e] for e in chosen)
    return {e: weights[e] / total * router.scaling for e in chosen}, sum(e // size not in best for e in chosen)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["groups ranked without the bias", "other groups at 0, not -inf", "gate values contain the bias"]
)
def test_gates_are_those_of_a_loop(model: DeepSeekV3, name: str) -> None:
    x = torch.randn(1, 40, model.cfg.hidden_size)
    router = altered(model, name).layers[1].mlp.gate
    routing, plain = router(x), model.layers[1].mlp.gate(x)
    compared = differing = strays = 0
    for token in range(40):
        got = dict(zip(routing.chosen[0, token].tolist(), routing.gates[0, token].tolist(), strict=True))
        wish, outside = gates_of_one_token(router, x[0, token], name)
        usual = set(plain.chosen[0, token].tolist())
        if outside:  # all of them are at 0, so any of them may be taken; but no longer what is taken rightly
            strays += 1
            assert set(got) != usual
            continue
        assert got == pytest.approx(wish, rel=1e-3, abs=1e-4)
        compared += 1
        differing += got != pytest.approx(
            dict(zip(plain.chosen[0, token].tolist(), plain.gates[0, token].tolist(), strict=True))
        )
    assert compared > 5 and differing + strays > 3
    assert (strays > 0) == name.startswith("other groups")


@torch.no_grad()
def test_a_gate_in_bf16_has_scores_of_bf16(model: DeepSeekV3) -> None:
    x = torch.randn(1, 9, model.cfg.hidden_size)
    gate, rounded = model.layers[1].mlp.gate, altered(model, "gate computed in BF16").layers[1].mlp.gate
    expected = (x.bfloat16() @ gate.weight.bfloat16().T).sigmoid().float()
    assert torch.equal(rounded(x).scores, expected) and not torch.equal(gate(x).scores, expected)


def test_gates_not_multiplied_are_another_configs(model: DeepSeekV3, tokens: Tensor) -> None:
    plain = rewoken(model.cfg.replace(routed_scaling_factor=1.0), model)
    assert_exact(logits_of(altered(model, "gate values not multiplied"), tokens), logits_of(plain, tokens))


# ---- attention ---------------------------------------------------------------------------------------------------------


def test_pairs_apart_are_the_layout_of_halves(
    model: DeepSeekV3, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against RoPE as libraries of the other layout write it: i with i + r/2."""
    other = altered(model, "RoPE pairs i with i + r/2")
    expected = logits_of(other, tokens)

    def rotate_halves(x: Tensor, turn: Tensor) -> Tensor:
        turn = turn[..., None, :] if x.ndim == 4 else turn
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * turn.real - high * turn.imag, high * turn.real + low * turn.imag], dim=-1)

    monkeypatch.setattr(attention_module, "rotate", rotate_halves)
    assert_same(logits_of(model, tokens), expected)


def test_unturned_queries(model: DeepSeekV3, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, rotate = logits_of(altered(model, "queries not turned"), tokens), attention_module.rotate
    # Queries have heads, the shared key has none.
    monkeypatch.setattr(attention_module, "rotate", lambda x, turn: x if x.ndim == 4 else rotate(x, turn))
    assert_same(logits_of(model, tokens), expected)


def test_a_root_for_each_part(model: DeepSeekV3, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, nope = logits_of(altered(model, "a root for each part"), tokens), model.cfg.qk_nope_head_dim
    factor = model.layers[0].self_attn.scale * model.cfg.qk_head_dim**0.5  # YaRN's

    def two_roots(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Any) -> Tensor:
        parts = (
            torch.einsum("bshq,bthq->bhst", query[..., part], key[..., part]) / query[..., part].shape[-1] ** 0.5
            for part in (slice(nope), slice(nope, None))
        )
        scores = sum(parts) * factor
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return torch.einsum("bhst,bthv->bshv", scores.masked_fill(later, -torch.inf).softmax(-1), value)

    monkeypatch.setattr(attention_module, "attention", two_roots)
    assert_same(logits_of(model, tokens), expected)


def test_without_yarns_factor_on_the_softmax(model: DeepSeekV3, tokens: Tensor) -> None:
    """A config whose two factors are both 1: mscale next to nothing, and none over all dimensions."""
    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=64, mscale=1e-12, mscale_all_dim=0.0)
    plain = rewoken(model.cfg.replace(rope_scaling=scaling), model)
    assert_same(logits_of(altered(model, "no YaRN factor on the softmax"), tokens), logits_of(plain, tokens))


def test_direct_queries_can_be_altered_too() -> None:
    cfg = nano(q_lora_rank=None, num_nextn_predict_layers=0)
    model = wake(DeepSeekV3(cfg))
    for name in ("RoPE pairs i with i + r/2", "a root for each part", "queries not turned"):
        assert largest_change(model, name, random_tokens(cfg)) > 1e-3


# ---- multi-token prediction --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["MTP joins state, then embedding", "MTP without its last norm"])
def test_mtp_done_otherwise(model: DeepSeekV3, tokens: Tensor, name: str) -> None:
    got = logits_of(altered(model, name), tokens)
    assert torch.equal(got[0], model(tokens).logits), "the main model stays"
    hidden, _ = model.main_states(tokens)
    embedding = model.embed_tokens(tokens)
    for depth, module in enumerate(model.mtp, start=1):
        kept = tokens.shape[1] - depth
        e, h = module.enorm(embedding[:, depth:]), module.hnorm(hidden[:, :kept])
        pair = [h, e] if name.startswith("MTP joins") else [e, h]
        turn = rotations(model.cfg, torch.arange(kept))
        hidden, _ = module.block(module.eh_proj(torch.cat(pair, dim=-1)), turn)
        hidden = module.norm(hidden) if name.startswith("MTP joins") else hidden
        assert_same([got[depth]], [model.lm_head(hidden)])
