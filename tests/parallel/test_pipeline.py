"""How a model is cut into stages and a batch into micro-batches. That stages train as one process: test_pipeline_team.py."""

from __future__ import annotations

import pytest
import torch

from dsv3_mini import DeepSeekV3, ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.pipeline import choose_microbatches, stage_ranks
from dsv3_mini.parallel.stages import Weighing, split_layers, stage_parts, take_stages
from dsv3_mini.parallel.torch_schedules import TORCH_SCHEDULES, V_SHAPED, stages_each
from dsv3_mini.train.balance import routers


def test_layers_are_dealt_evenly_and_mtp_counts() -> None:
    for preset, stages in (("671b", 16), ("671b", 32), ("671b", 61), ("16b", 4), ("nano", 2)):
        cfg = ModelConfig.preset(preset)
        parts = split_layers(cfg, stages)
        assert [layer for part in parts for layer in part] == list(range(cfg.num_hidden_layers))
        sizes = [len(part) for part in parts]
        sizes[-1] += cfg.num_nextn_predict_layers
        assert min(map(len, parts)) >= 1 and max(sizes) - min(sizes) <= 1
    assert [len(part) for part in split_layers(ModelConfig.preset("671b"), 16)] == [4] * 14 + [3, 2]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="62 stages of 61 layers"):
        split_layers(ModelConfig.preset("671b"), 62)


@pytest.mark.parametrize("name", TORCH_SCHEDULES)
def test_every_weight_lies_somewhere_and_only_the_embedding_twice(name: str) -> None:
    cfg, ranks = ModelConfig.preset("nano").replace(num_hidden_layers=4), 2
    model, rank_of = DeepSeekV3(cfg), stage_ranks(name, ranks)
    assert len(rank_of) == ranks * stages_each(name) == len(stage_parts(cfg, len(rank_of)))
    whole, held = dict(model.named_parameters()), []
    for rank in range(ranks):
        own = tuple(n for n, holder in enumerate(rank_of) if holder == rank)
        part = DeepSeekV3(cfg)
        stages = take_stages(part, len(rank_of), own)
        weights = dict(part.named_parameters())
        assert all(weight.shape == whole[name].shape for name, weight in weights.items())
        # A stage is made of what the model still has, and of nothing else.
        ids = {id(weight) for stage in stages.values() for weight in stage.parameters()}
        assert ids == {id(weight) for weight in weights.values()}
        # The routers of all layers are still there for their biases, under the names that the whole model has.
        assert [router.layer for router in routers(part)] == [router.layer for router in routers(model)]
        assert dict(part.named_buffers()).keys() == dict(model.named_buffers()).keys()
        held += weights
    twice = {name for name in held if held.count(name) > 1}
    assert set(held) == set(whole)
    assert twice == (set() if name in V_SHAPED else {"embed_tokens.weight"})


def test_a_model_without_mtp_has_one_embedding() -> None:
    cfg = ModelConfig.preset("nano").replace(num_hidden_layers=4, num_nextn_predict_layers=0)
    assert ["embed_tokens" in parts for parts in stage_parts(cfg, 2)] == [True, False]


@pytest.mark.parametrize(
    ("name", "ranks", "wanted", "most", "count"),
    [
        ("1F1B", 2, 6, 8, 6),
        ("1F1B", 4, 1, 8, 4),  # at least as many as stages
        ("DualPipeV", 2, 1, 8, 4),
        ("DualPipeV", 4, 6, 11, 8),
        ("Interleaved1F1B", 2, 5, 8, 6),  # whole rounds: upwards where there are rows for it
        ("Interleaved1F1B", 2, 5, 5, 4),  # else downwards
        ("GPipe", 4, 9, 3, 3),  # never more than rows
    ],
)
def test_micro_batches_are_as_many_as_the_schedule_takes(
    name: str, ranks: int, wanted: int, most: int, count: int
) -> None:
    assert choose_microbatches(name, ranks, wanted, most) == count


def test_too_few_rows_for_a_schedule_are_refused_in_a_line() -> None:
    words = (
        "3 rows are too few for a pipeline: torch makes no DualPipeV of 2 ranks and 3 microbatches: .*at least as many"
    )
    with pytest.raises(ConfigError, match=words) as caught:
        choose_microbatches("DualPipeV", 2, 1, 3)
    assert "\n" not in str(caught.value)


def test_rows_of_fewer_than_a_message_leave_no_trace() -> None:
    """A stage computes the rows that there are: what fills a message up changes neither its results nor its load."""
    cfg = ModelConfig.preset("nano").replace(num_hidden_layers=2)
    torch.manual_seed(0)
    stages = take_stages(DeepSeekV3(cfg), 2, (0, 1))
    weighing = Weighing((30, 27), rows=3, mtp=0.3, balance=0.01)
    tokens = torch.randint(0, 500, (3, 10))
    told = {}
    for rows in (3, 5):
        for stage in stages.values():
            stage.begin()
            stage.zero_grad()
        batch = dict(tokens=tokens, targets=tokens, weighing=weighing, rows=rows)
        hidden, balance = stages[0](**batch)
        assert len(hidden) == rows and not hidden[3:].any()
        loss = stages[1](hidden, balance, **batch)
        loss.sum().backward()
        gradients = [weight.grad.clone() for stage in stages.values() for weight in stage.parameters()]
        load = [load.tolist() for stage in stages.values() for load in stage.counter.load.values()]
        told[rows] = loss.detach(), gradients, load
    assert torch.equal(told[3][0], told[5][0]) and told[3][2] == told[5][2]
    assert sum(told[3][2][0]) == 3 * 10 * cfg.num_experts_per_tok
    assert all(torch.equal(a, b) for a, b in zip(told[3][1], told[5][1], strict=True))
