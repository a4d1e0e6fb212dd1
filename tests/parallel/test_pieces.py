"""Checkpoints in pieces: what a kill while saving leaves, and what is said of a damaged one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from nano_runs import NANO, all_state, assert_bit_equal, nano_recipe, nano_trainer, small_tokenizer

from dsv3_mini.data.stream import TokenStream
from dsv3_mini.errors import CheckpointError
from dsv3_mini.parallel import checkpoint as pieces
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.parallel.team import Team
from dsv3_mini.train.checkpoint import checkpoints
from dsv3_mini.train.trainer import Trainer


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Team]:
    """A team of this process alone: it writes pieces as many do."""
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        yield Team.join(ParallelPlan(), NANO)
    finally:
        dist.destroy_process_group()


def trainer(folder: Path, team: Team) -> Trainer:
    """As `nano_trainer`, for a team."""
    recipe, tokenizer = nano_recipe(), small_tokenizer()

    def open_stream(context: int) -> TokenStream:
        return TokenStream(tokenizer, context, recipe.mixture, seed=recipe.seed, block_rows=16)

    return Trainer(folder, NANO, recipe, tokenizer, open_stream, replicas=team)


def test_a_kill_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path / "run", team)
    run.train_step()
    first = run.save()
    state = all_state(run)
    run.train_step()
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # all files are there, but not under their name
            run.save()
    assert len(list(first.parent.glob(".*.partial/shard-*"))) == 1
    resumed = trainer(tmp_path / "run", team)
    assert resumed.step == 1 and checkpoints(tmp_path / "run") == [first]
    assert_bit_equal(all_state(resumed), state)
    resumed.train_step()
    second = resumed.save()
    assert sorted(first.parent.iterdir()) == [first, second]  # the partial one is swept away


def test_pieces_and_whole_files_are_read_by_both(tmp_path: Path, team: Team) -> None:
    """One process goes on from pieces, and a team from what one process wrote: the same numbers, to the bit."""
    for folder, run in (("pieces", trainer(tmp_path / "pieces", team)), ("whole", nano_trainer(tmp_path / "whole"))):
        run.train_step()
        run.save()
        state = all_state(run)
        assert_bit_equal(all_state(nano_trainer(tmp_path / folder)), state)
        assert_bit_equal(all_state(trainer(tmp_path / folder, team)), state)


@pytest.mark.parametrize("alone", [True, False])
def test_damage_is_one_line_that_names_the_checkpoint(tmp_path: Path, team: Team, alone: bool) -> None:
    run = trainer(tmp_path / "run", team)
    run.train_step()
    folder = run.save()
    file = next(folder.glob("shard-*"))
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=f"^.*{folder.name}[^\n]*remove [^\n]* to resume from the one before$"
        ):
            nano_trainer(tmp_path / "run") if alone else trainer(tmp_path / "run", team)
    file.unlink()
    with pytest.raises(CheckpointError, match=folder.name):
        nano_trainer(tmp_path / "run") if alone else trainer(tmp_path / "run", team)
