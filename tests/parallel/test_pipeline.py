"""A model in stages on two ranks takes the same steps as the whole one in one process: losses, weights, biases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3_mini import DeepSeekV3, ModelConfig
from dsv3_mini.data.packing import IGNORED
from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.pipeline import Pipeline, split_layers
from dsv3_mini.parallel.schedules.from_torch import TORCH_SCHEDULES, V_SHAPED
from dsv3_mini.train.balance import LoadCounter, update_biases
from dsv3_mini.train.losses import training_losses

STEPS, ROWS, LENGTH = 5, 8, 12
MTP, BALANCE, GAMMA = 0.3, 0.01, 0.01  # weights large enough to be seen in 1e-5
SIZES = {2: (5, 4), 4: (8, 8)}  # ranks: layers, which 2 stages a rank share out unevenly with MTP's, and micro-batches

RUNS = (*((name, MTP) for name in TORCH_SCHEDULES), ("1F1B", 0.0))  # the last one without MTP
Told = tuple[list[float], dict[str, torch.Tensor]]  # the loss of each step, and the weights and biases in the end


def fresh(ranks: int) -> DeepSeekV3:
    torch.manual_seed(3)
    return DeepSeekV3(ModelConfig.preset("nano").replace(num_hidden_layers=SIZES[ranks][0]))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths, so that a mean over micro-batches is not the mean over the batch."""
    draw = torch.Generator().manual_seed(step)
    rows = torch.randint(0, ModelConfig.preset("nano").vocab_size, (ROWS, LENGTH + 1), generator=draw)
    tokens, targets = rows[:, :-1], rows[:, 1:].clone()
    for row, kept in enumerate(torch.randint(4, LENGTH + 1, (ROWS,), generator=draw).tolist()):
        targets[row, kept:] = IGNORED
    return tokens, targets


def alone(ranks: int, parts: int, mtp: float = MTP) -> Told:
    """Five steps of the whole model in one process, its batch in so many micro-batches."""
    model, losses = fresh(ranks), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        tokens, targets = batch(step)
        counter, total = LoadCounter(), 0.0
        for own, wanted in zip(tokens.chunk(parts), targets.chunk(parts), strict=True):
            found = training_losses(model, own, wanted, mtp, BALANCE, batch_targets=targets)
            found.total.backward()
            counter.add(found.routing)
            total += float(found.total.detach())
        optimizer.step()
        optimizer.zero_grad()
        update_biases(model, counter.load, GAMMA)
        losses.append(total)
    return losses, model.state_dict()


def in_stages(ranks: int, name: str, mtp: float) -> Told:
    """The same steps, of this rank's part."""
    pipeline = Pipeline(fresh(ranks), name, SIZES[ranks][1], ROWS, LENGTH)
    optimizer = torch.optim.AdamW(pipeline.named_parameters().values(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        losses.append(float(pipeline.step(*batch(step), mtp, BALANCE)))
        optimizer.step()
        optimizer.zero_grad()
        pipeline.update_biases(GAMMA)
    return losses, {key: value for stage in pipeline.stages.values() for key, value in stage.state_dict().items()}


def one_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    for name, mtp in RUNS:
        torch.save(in_stages(ranks, name, mtp), f"{folder}/{name}-{mtp}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SIZES, ids=lambda ranks: f"{ranks} ranks")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, dict[float, Told]]:
    """What each rank has after the steps, under every schedule, in a folder; and what one process has.

    The one process takes the same micro-batches, so that it adds gradients in nearly the same order. Adam makes steps of one
    size out of gradients of any size: where one is next to nothing, another order of adding is another step.
    """
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    mp.spawn(one_rank, args=(ranks, str(folder)), nprocs=ranks)
    return folder, ranks, {mtp: alone(ranks, SIZES[ranks][1], mtp) for mtp in (MTP, 0.0)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mtp"), RUNS)
def test_stages_take_the_steps_of_one_process(
    name: str, mtp: float, trained: tuple[Path, int, dict[float, Told]]
) -> None:
    folder, ranks, (losses, wanted) = *trained[:2], trained[2][mtp]
    found: dict[str, torch.Tensor] = {}
    for rank in range(ranks):
        told, state = torch.load(folder / f"{name}-{mtp}-{rank}.pt", weights_only=True)
        assert told == pytest.approx(losses, abs=1e-5)
        for key, value in state.items():
            assert key not in found or key == "embed_tokens.weight", "only the embedding may be on two ranks"
            assert key not in found or name not in V_SHAPED, "and in a V not even that"
            assert torch.equal(found.setdefault(key, value), value), "two copies that are as one"
    assert set(found) == set(wanted), "every weight lies somewhere"
    biases = [key for key in wanted if key.endswith("e_score_correction_bias")]
    moved = [key for key in biases if mtp or not key.startswith("mtp.")]
    assert len(moved) >= 3 and all(wanted[key].abs().max() > 0 for key in moved)
    for key, value in wanted.items():
        if key in biases:
            assert torch.equal(found[key], value), key
        else:
            assert (found[key] - value).abs().max() < 1e-5, key


def test_a_batch_in_one_piece_has_the_same_losses() -> None:
    """What the ranks are compared with does not itself hang on how the batch is cut."""
    for ranks, (_, microbatches) in SIZES.items():
        assert alone(ranks, microbatches)[0] == pytest.approx(alone(ranks, 1)[0], abs=1e-5)


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


@pytest.mark.parametrize(
    ("name", "microbatches", "words"),
    [
        ("DualPipe", 4, "schedule = 'DualPipe' is none of torch's: choose one of GPipe"),
        ("1F1B", 3, "8 rows cannot be cut into 3 equal micro-batches"),
        ("1F1B", 0, "8 rows cannot be cut into 0 equal"),
        ("DualPipeV", 2, "torch makes no DualPipeV of 2 ranks: .*at least as many microbatches as stages"),
        ("1F1B", 1, "torch makes no 1F1B of 2 ranks: "),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused_in_a_line(name: str, microbatches: int, words: str) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ConfigError, match=words) as caught:
            Pipeline(fresh(2), name, microbatches, ROWS, LENGTH)
    finally:
        dist.destroy_process_group()
    assert "\n" not in str(caught.value)
