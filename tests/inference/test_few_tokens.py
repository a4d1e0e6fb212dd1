"""The model arranged for few tokens against the model as it stands, and which models are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import YARN, assert_routing_is_awake, nano, random_model, random_tokens

from dsv3_mini import from_pretrained
from dsv3_mini.inference import LatentCache, all_experts, few_attention, few_experts, few_product, generate
from dsv3_mini.inference.few_product import FewProduct
from dsv3_mini.inference.few_tokens import FewTokens, fits
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.experts import LoopExperts

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": YARN,
    "queries not compressed": {"q_lora_rank": None},
    "wide latent": {"kv_lora_rank": 64},
    "no groups": {"n_group": 1, "topk_group": 1},
    "softmax, not normalised": {"scoring_func": "softmax", "norm_topk_prob": False},
    "no shared experts": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "no bias": {"topk_method": "aux_loss"},
}


def caches(model: DeepSeekV3, rows: int, count: int, seed: int = 5) -> list[LatentCache]:
    """Layers' caches whose rows hold 9, 6, 9, 6, ... tokens; or all 9."""
    layers = [LatentCache(model.cfg, rows, 12, torch.float32, CPU) for _ in range(count)]
    torch.manual_seed(seed)
    for layer in layers:
        layer.extend(torch.randn(rows, 9, model.cfg.kv_lora_rank), torch.randn(rows, 9, model.cfg.qk_rope_head_dim))
    return layers


@torch.no_grad()
@pytest.mark.parametrize("experts", ["sent", "visited", "all"])
@pytest.mark.parametrize("new", [1, 2, 5])
@pytest.mark.parametrize("rows, lengths", [(1, [9]), (3, [9, 9, 9]), (3, [9, 6, 1])])
@pytest.mark.parametrize("shape", SHAPES)
def test_states_are_those_of_the_model(
    shape: str, rows: int, lengths: list[int], new: int, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside caches of random numbers, in each way that a token gets to experts: states, and what is kept, to FP32's rounding."""
    monkeypatch.setattr(few_experts, "FEW", 0 if experts == "sent" else 64)
    monkeypatch.setattr(all_experts, "SHARE", 0.0 if experts == "all" else torch.inf)
    monkeypatch.setattr(few_attention, "FOLDED", 0 if experts == "sent" else 2**40)
    if experts == "all":
        monkeypatch.setattr(few_product, "PACKED", range(1, 2**23))
    model = random_model(nano(**SHAPES[shape]))
    if shape in ("plain", "yarn"):
        assert_routing_is_awake(model, random_tokens(model.cfg))
    assert fits(model)
    lean, tokens = FewTokens(model), random_tokens(model.cfg, rows, new)
    theirs, ours = (caches(model, rows, len(model.layers)) for _ in range(2))
    for layer in (*theirs, *ours):
        layer.truncate(lengths)
    expected, _ = model.main_states(tokens, cache=theirs)
    torch.testing.assert_close(lean.main_states(tokens, ours), expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(ours, theirs, strict=True):
        assert one.lengths == other.lengths == [n + new for n in lengths]
        torch.testing.assert_close(one.kept, other.kept, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[9, 9], [9, 4]])
def test_mtp_states_are_those_of_the_module(lengths: list[int]) -> None:
    from dsv3_mini.model.rope import rotations
    from dsv3_mini.model.transformer import visible

    model = random_model(nano(num_nextn_predict_layers=2))
    few, tokens = FewTokens(model), random_tokens(model.cfg, 2, 3)
    beside = torch.randn(2, 3, model.cfg.hidden_size)
    for depth, module in enumerate(model.mtp):
        (theirs,), (ours,) = (caches(model, 2, 1) for _ in range(2))
        theirs.truncate(lengths)
        ours.truncate(lengths)
        positions = theirs.positions(3)
        turn, mask = rotations(model.cfg, positions), visible(positions, 12)
        expected, _ = module(model.embed_tokens(tokens), beside, turn, mask, theirs)
        torch.testing.assert_close(few.mtp_states(depth, tokens, beside, ours), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.kept, theirs.kept, rtol=1e-4, atol=1e-4)
        for places in ([2, 2], [0, 2]):
            ours.truncate(lengths)
            chosen = few.mtp_states(depth, tokens, beside, ours, places)
            wanted = torch.stack([row[place] for row, place in zip(expected, places, strict=True)])
            torch.testing.assert_close(chosen[:, 0], wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.kept, theirs.kept, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bf16_is_as_near_as_bf16_is() -> None:
    """Beside the FP32 model: no farther than twice what the model itself is in BF16."""
    exact = random_model(nano())
    model = random_model(nano()).to(torch.bfloat16)
    tokens, cache = random_tokens(exact.cfg, 2, 1), caches(exact, 2, len(exact.layers))
    wanted, _ = exact.main_states(tokens, cache=cache)

    def apart(states_of: Any) -> float:
        layers = caches(model, 2, len(model.layers))
        for layer in layers:
            layer.kept = layer.kept.to(torch.bfloat16)
        return (states_of(layers).float() - wanted).norm().item()

    assert apart(lambda c: FewTokens(model).main_states(tokens, c)) < 2 * apart(
        lambda c: model.main_states(tokens, cache=c)[0]
    )


def test_models_with_parts_of_their_own_are_run_as_they_are() -> None:
    assert fits(random_model(nano()))
    assert not fits(random_model(nano(), LoopExperts))
    watched, calls = random_model(nano()), []
    watched.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert not fits(watched)
    generate(watched, random_tokens(watched.cfg, 1, 4), 5)
    assert len(calls) == 5, "who watches a model sees every pass"


def test_what_generation_runs_is_this(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of the model for the prompt; the other passes are of few tokens."""
    model, passes = random_model(nano()), []
    original = FewTokens.main_states
    monkeypatch.setattr(
        FewTokens, "main_states", lambda self, tokens, cache: passes.append(1) or original(self, tokens, cache)
    )
    generate(model, random_tokens(model.cfg, 1, 4), 6)
    assert len(passes) == 5


@torch.no_grad()
def test_logits_of_the_model_that_ships_to_1e_5() -> None:
    """Along held-out stories, one token and three at a time, against the model that reads them at once."""
    from dsv3_mini.bench.generate import openings
    from dsv3_mini.data.shipped import shipped

    model, text = from_pretrained(shipped("tiny")).eval(), openings(1, 40)
    wanted = model(text).logits
    for step in (1, 3):
        few, cache = FewTokens(model), LatentCache.for_model(model.cfg, 1, 40, torch.float32, CPU)
        model.main_states(text[:, :10], cache=cache)
        states = [few.main_states(text[:, at : at + step], cache) for at in range(10, 40, step)]
        logits = model.lm_head(torch.cat(states, dim=1))
        assert (logits - wanted[:, 10:]).norm() / wanted[:, 10:].norm() < 1e-5


@torch.no_grad()
def test_what_is_folded_follows_the_model() -> None:
    """Weights are prepared for each text: a model that was trained on between two writes as it is now."""
    model, prompt = random_model(nano()), random_tokens(nano(), 1, 4)
    generate(model, prompt, 8)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter) * parameter.std())
    text = generate(model, prompt, 8)
    assert torch.equal(model(text).logits[:, 3:-1].argmax(-1), text[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("shape", [(300, 500), (129, 1017)])
def test_products_packed_and_plain_are_the_same(shape: tuple[int, int], rows: int) -> None:
    """Against float64: no farther than FP32 sums of so many terms are. A first product of other rows may choose the packing."""
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(rows, shape[1])
    exact = (x.double() @ weight.double().T).float()
    for first in (2, 40):
        product = FewProduct(weight)
        product(torch.randn(first, shape[1]))
        assert (product.packed is not None) == (weight.numel() in few_product.PACKED and product.packs)
        torch.testing.assert_close(product(x), exact, rtol=1e-5, atol=1e-4)
        total = torch.ones(rows, shape[0])
        assert product.add(total, x) is total
        torch.testing.assert_close(total, exact + 1, rtol=1e-5, atol=1e-4)


def test_what_is_too_small_too_large_or_not_fp32_is_not_packed() -> None:
    for weight in (torch.empty(8, 8), torch.empty(2**12, 2**12), torch.empty(512, 512).bfloat16()):
        assert not FewProduct(weight).packs
    assert FewProduct(torch.empty(512, 512)).packs == torch.backends.mkldnn.is_available()


def test_all_experts_are_computed_where_most_are_chosen() -> None:
    everyone = all_experts.AllExperts(random_model(nano()).layers[1].mlp)  # 8 experts, of which a token chooses 2
    assert [tokens for tokens in range(1, 70) if everyone.suits(tokens)] == list(range(3, 65))
    large = random_model(nano(moe_intermediate_size=4096, hidden_size=256)).layers[1].mlp
    assert not all_experts.AllExperts(large).suits(8), "so many weights come from memory, whoever chose them"
