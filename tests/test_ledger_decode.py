"""Decode steps against what torch counts, against the ledger's sums, and against the figures one gets by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger import cache_per_token, count_parameters, decode_flops_per_token
from dsv3_mini.ledger.decode import (
    ELEMENT,
    H800,
    WAYS,
    Machine,
    Work,
    attention_flops,
    crossing,
    decode_step,
    distinct_experts,
)

RELEASED = ModelConfig.preset("671b")
NANO = ModelConfig.preset("nano")
ODD = NANO.replace(num_attention_heads=3, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=7, kv_lora_rank=11)


@pytest.mark.parametrize("new, context", [(1, 1), (1, 40), (6, 40), (40, 40)])
def test_attention_flops_equal_what_torch_counts(new: int, context: int) -> None:
    heads, nope, rope, value, latent = 3, 5, 4, 7, 11

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device="meta")

    def attend(key_width: int, value_width: int) -> None:
        shares = zeros(heads, new, key_width) @ zeros(heads, key_width, context)
        _ = shares @ zeros(heads, context, value_width)

    counts = []
    for tokens, key_width, value_width in (
        (new, latent + rope, latent),
        (context, nope + rope, value),
        (new, nope + rope, value),
    ):
        with FlopCounterMode(display=False) as counter:
            _ = zeros(tokens, latent) @ zeros(latent, heads * (nope + value))  # the folds, or the up-projection
            attend(key_width, value_width)
        counts.append(counter.get_total_flops())
    flops = attention_flops(ODD, new, context)
    assert counts == [flops.by_way(way) for way in WAYS] == [flops.absorbed, flops.rebuilt, flops.heads_cached]


@pytest.mark.parametrize(
    "cfg", [RELEASED, ModelConfig.preset("tiny"), ModelConfig.preset("16b")], ids=["671b", "tiny", "16b"]
)
@pytest.mark.parametrize("context", [512, 4096, 131_072])
def test_crossing_is_where_the_two_are_equal(cfg: ModelConfig, context: int) -> None:
    equal = crossing(cfg, context)
    assert 1 < equal < context
    below, above = (attention_flops(cfg, new, context) for new in (math.floor(equal), math.ceil(equal)))
    assert below.absorbed <= below.rebuilt and above.absorbed >= above.rebuilt


def test_crossing_of_the_released_model() -> None:
    assert round(crossing(RELEASED, 1024), 1) == 146.3
    assert round(crossing(RELEASED, 10**9), 1) == round(512 * 256 / (1024 - 256), 1) == 170.7
    assert crossing(NANO.replace(kv_lora_rank=8), 100) == math.inf, "absorbed is never dearer on so narrow a latent"
    narrow = attention_flops(NANO.replace(kv_lora_rank=8), 100, 100)
    assert narrow.absorbed <= narrow.rebuilt


@pytest.mark.parametrize("context", [1, 300, 4096])
@pytest.mark.parametrize("cfg", [RELEASED, NANO], ids=["671b", "nano"])
def test_one_row_and_one_token_are_the_ledgers_flops(cfg: ModelConfig, context: int) -> None:
    ledger = decode_flops_per_token(cfg, context)
    weights = 2 * count_parameters(cfg).multiplied
    for way, attention in zip(
        WAYS, (ledger.absorbed_attention, ledger.re_expanded_attention, ledger.expanded_attention), strict=True
    ):
        assert sum(part.flops for part in decode_step(cfg, 1, context, way=way)) == weights + attention


def test_bytes_of_one_row_by_hand() -> None:
    """Batch 1: every weight that a token meets is read once, and the cache of one row."""
    context = 1000
    for way, kind in (("absorbed", "mla"), ("heads cached", "mha")):
        cache, *weights = decode_step(RELEASED, 1, context, way=way)
        assert cache.bytes == context * cache_per_token(RELEASED).bytes(kind)
        assert sum(part.bytes for part in weights) == pytest.approx(ELEMENT * count_parameters(RELEASED).multiplied)
    rebuilt = decode_step(RELEASED, 1, context, way="rebuilt")[0].bytes
    assert rebuilt == context * (70_272 + 61 * 2 * 2 * 128 * 256)


def test_rows_share_weights_and_not_caches() -> None:
    one, many = decode_step(RELEASED, 1, 4096), decode_step(RELEASED, 64, 4096)
    for part, of_many in zip(one, many, strict=True):
        assert part.name == of_many.name and of_many.flops == 64 * part.flops
    by_name = {part.name: (part, of_many) for part, of_many in zip(one, many, strict=True)}
    for name in ("attention's weights", "other weights"):
        part, of_many = by_name[name]
        assert of_many.bytes == part.bytes and part.intensity == 1 and of_many.intensity == 64
    part, of_many = by_name["attention over the cache"]
    assert of_many.bytes == 64 * part.bytes and of_many.intensity == part.intensity
    part, of_many = by_name["routed experts"]
    assert part.bytes < of_many.bytes < 64 * part.bytes


def test_intensities_of_the_released_model() -> None:
    assert decode_step(RELEASED, 7, 999)[0].intensity == pytest.approx(128 * 1088 / 576)
    assert decode_step(RELEASED, 7, 999, new=2)[0].intensity == pytest.approx(2 * 128 * 1088 / 576)
    assert decode_step(RELEASED, 7, 999, way="heads cached")[0].intensity == 1
    assert round(H800.ridge) == 295


def test_experts_by_simulation() -> None:
    cfg = ModelConfig.preset("tiny")
    random = torch.Generator().manual_seed(0)
    for tokens in (1, 4, 20):
        draws = torch.rand(4000, tokens, cfg.n_routed_experts, generator=random).topk(cfg.num_experts_per_tok).indices
        seen = torch.zeros(4000, cfg.n_routed_experts).scatter(1, draws.flatten(1), 1.0).sum(1).mean().item()
        assert distinct_experts(cfg, tokens) == pytest.approx(seen, rel=0.01)


def test_a_model_without_experts_has_three_parts() -> None:
    dense = NANO.replace(first_k_dense_replace=NANO.num_hidden_layers)
    parts = decode_step(dense, 2, 10)
    assert len(parts) == 3 and "routed experts" not in {part.name for part in parts}
    assert sum(part.flops for part in parts[1:]) == 2 * 2 * count_parameters(dense).multiplied


def test_the_roof() -> None:
    machine = Machine("m", flops_per_second=100.0, bytes_per_second=10.0)
    light, heavy = Work("light", 20, 10), Work("heavy", 1000, 10)
    assert machine.ridge == 10 and (machine.reached(2), machine.reached(50)) == (20, 100)
    assert (light.seconds(machine), heavy.seconds(machine)) == (1.0, 10.0)
    assert (light.limit(machine), heavy.limit(machine)) == ("memory", "compute")
    for work in (light, heavy):
        assert work.flops / work.seconds(machine) == machine.reached(work.intensity)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"batch": 0}, "batch"),
        ({"context": 0}, "context"),
        ({"new": 1.5}, "new"),
        ({"new": True}, "new"),
        ({"new": 11}, "new"),
        ({"way": "absorb"}, "way"),
    ],
)
def test_bad_input_is_named(arguments: dict, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = "):
        decode_step(NANO, **{"batch": 1, "context": 10, **arguments})
