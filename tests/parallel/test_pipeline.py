"""A model in stages on two ranks takes the same steps as the whole one in one process: losses, weights, biases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dsv3_mini import DeepSeekV3, ModelConfig
from dsv3_mini.data.packing import IGNORED
from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.pipeline import Pipeline, split_layers
from dsv3_mini.parallel.schedules.from_torch import TORCH_SCHEDULES
from dsv3_mini.train.balance import LoadCounter, update_biases
from dsv3_mini.train.losses import training_losses

STEPS, ROWS, LENGTH, MICROBATCHES = 5, 8, 12, 4
MTP, BALANCE, GAMMA = 0.3, 0.01, 0.01  # weights large enough to be seen in 1e-5


def config() -> ModelConfig:
    return ModelConfig.preset("nano").replace(num_hidden_layers=5)


def fresh() -> DeepSeekV3:
    torch.manual_seed(3)
    return DeepSeekV3(config())


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths, so that a mean over micro-batches is not the mean over the batch."""
    draw = torch.Generator().manual_seed(step)
    rows = torch.randint(0, config().vocab_size, (ROWS, LENGTH + 1), generator=draw)
    tokens, targets = rows[:, :-1], rows[:, 1:].clone()
    for row, kept in enumerate(torch.randint(4, LENGTH + 1, (ROWS,), generator=draw).tolist()):
        targets[row, kept:] = IGNORED
    return tokens, targets


def alone() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Five steps of the whole model, its batch in one piece."""
    model, losses = fresh(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        tokens, targets = batch(step)
        found, counter = training_losses(model, tokens, targets, MTP, BALANCE), LoadCounter()
        found.total.backward()
        counter.add(found.routing)
        optimizer.step()
        optimizer.zero_grad()
        update_biases(model, counter.load, GAMMA)
        losses.append(float(found.total.detach()))
    return losses, model.state_dict()


def one_rank(rank: int, ranks: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    pipeline = Pipeline(fresh(), name, MICROBATCHES, ROWS, LENGTH)
    optimizer = torch.optim.AdamW(pipeline.named_parameters().values(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        losses.append(float(pipeline.step(*batch(step), MTP, BALANCE)))
        optimizer.step()
        optimizer.zero_grad()
        pipeline.update_biases(GAMMA)
    state = {key: value for stage in pipeline.stages.values() for key, value in stage.state_dict().items()}
    torch.save((losses, state), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def whole() -> tuple[list[float], dict[str, torch.Tensor]]:
    return alone()


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCH_SCHEDULES)
def test_stages_on_two_ranks_take_the_steps_of_one_process(
    name: str, whole: tuple[list[float], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    mp.spawn(one_rank, args=(2, name, str(tmp_path)), nprocs=2)
    losses, wanted = whole
    found: dict[str, torch.Tensor] = {}
    for rank in range(2):
        told, state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert told == pytest.approx(losses, abs=1e-5)
        for key, value in state.items():
            if key in found:
                assert key == "embed_tokens.weight" and torch.allclose(found[key], value, atol=1e-6), (
                    "two copies, as one"
                )
            found[key] = value
    assert set(found) == set(wanted), "every weight lies somewhere"
    biases = [key for key in wanted if key.endswith("e_score_correction_bias")]
    assert len(biases) >= 3 and all(wanted[key].abs().max() > 0 for key in biases)
    for key, value in wanted.items():
        if key in biases:
            assert torch.equal(found[key], value), key
        else:
            assert (found[key] - value).abs().max() < 1e-5, key


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
