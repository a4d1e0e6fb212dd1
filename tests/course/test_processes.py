"""Real processes: one start of four, and everything that lesson 18 asks of them. Bars: sums in another order, 1e-5."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsv3_mini.course import ring, shared_training
from dsv3_mini.course.processes import Processes, same_on
from dsv3_mini.course.ranks import Rank, run
from dsv3_mini.course.ring import all_gather
from dsv3_mini.errors import UserError

COUNT = 4  # must divide nano's eight experts


@pytest.fixture(scope="module")
def team() -> Iterator[Processes]:
    with Processes(COUNT) as team:
        yield team


def at_home(work, source: str):
    """As if it had been written in a notebook: it travels as text."""
    work.__module__ = "__main__"
    assert source in work.__qualname__
    return work


def test_programs_have_the_results_of_simulated_ranks(team: Processes) -> None:
    xs = [torch.randn(2 * COUNT) for _ in range(COUNT)]
    rows = [x.view(COUNT, 2) for x in xs]
    for program, inputs in ((ring.all_reduce, xs), (ring.all_to_all, rows), (ring.broadcast_tree, xs)):
        for got, wanted in zip(team.run(program, inputs), run(program, inputs).results, strict=True):
            assert torch.equal(got, wanted), program.__name__


def test_torchs_own_do_what_their_names_say(team: Processes) -> None:
    rows = [torch.randn(COUNT, 2) for _ in range(COUNT)]
    table = torch.stack(rows)
    for rank, got in enumerate(team.run(shared_training.with_torch, rows)):
        wanted = (rows[0], table.sum(0), table.sum(0)[rank], table[:, 0], table[:, rank])
        for (name, x), right in zip(got.items(), wanted, strict=True):
            torch.testing.assert_close(x, right, msg=name)


def test_what_was_written_in_a_notebook_travels(team: Processes, capsys: pytest.CaptureFixture[str]) -> None:
    def mine(me: Rank, x: Tensor) -> Tensor:
        return all_gather(me, x)

    def blank(me: Rank, x: Tensor) -> Tensor:
        raise NotImplementedError

    def late(me: Rank, x: Tensor) -> Tensor:
        return all_gather(me, x) + (me.number == 1)

    xs = [torch.randn(2) for _ in range(COUNT)]
    assert torch.equal(team.run(at_home(mine, "mine"), xs)[2], torch.stack(xs))
    same_on(team, at_home(blank, "blank"), ring.all_gather, xs)
    same_on(team, at_home(late, "late"), ring.all_gather, xs)
    same_on(team, ring.all_gather, ring.all_gather, xs)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "○ blank is still blank: nothing to run yet"
    assert said[1].startswith("✗ item 1: ") and said[2].startswith("✓ 4 processes ran all_gather")


def test_the_sum_of_shares_is_the_big_batchs_gradient(team: Processes) -> None:
    batch = shared_training.random_rows(5)
    model = shared_training.fresh_model()
    shared_training.backward(model, batch, batch)
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for summed in team.run(shared_training.gradient_of_rows, [batch] * COUNT):
        torch.testing.assert_close(summed, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_shared_step_is_the_step_of_one(team: Processes, zero: int) -> None:
    batch = shared_training.random_rows(2 * COUNT)
    model = shared_training.fresh_model()
    shared_training.backward(model, batch, batch)
    took = team.run(shared_training.shared_step, [zero] * COUNT, [batch] * COUNT, [2] * COUNT)
    total = sum(p.numel() for p in model.parameters())
    for name, p in model.named_parameters():
        moved = shared_training.RATE * p.grad
        torch.testing.assert_close(took[1]["after"][name], p.detach() - moved, rtol=0, atol=1e-5, msg=name)
    assert sum(each["momentum"] for each in took) == total, "each number's momentum lies on one rank"
    assert sum(each["gradients"] for each in took) == (COUNT * total if zero == 1 else total)
    assert (took[0]["weights"] < total) == (zero == 3)
    assert [took[0]["sums"], took[0]["gathers"]] == {1: [1, 1], 2: [2, 1], 3: [2, 4]}[zero]


def test_axes_are_those_of_the_plan(team: Processes) -> None:
    found = team.run(shared_training.axes, [{"dp_shard": 4, "ep": 4}] * COUNT)
    assert found[1]["dp_shard"] == found[1]["ep_place"] == [0, 1, 2, 3]
    assert found[1]["dp_replicate"] == found[1]["expert_shard"] == [1]


def test_who_waits_in_vain_gives_up_and_the_others_go_on(team: Processes) -> None:
    said = team.run(shared_training.not_all_come, [0.5] * COUNT)
    assert said == ["gave up waiting"] * (COUNT - 1) + ["went home early"]
    xs = [torch.ones(COUNT)] * COUNT
    assert torch.equal(team.run(ring.all_reduce, xs)[0], COUNT * xs[0])


def test_one_that_fails_is_named_and_ends_all(capfd: pytest.CaptureFixture[str]) -> None:
    """Last: it starts processes of its own, as they are ended."""

    def fails(me: Rank, x: Tensor) -> Tensor:
        return me.receive(0) if me.number else 1 / 0

    team = Processes(2)
    with pytest.raises(UserError, match=r"rank 0 of 2 failed: ZeroDivisionError: division by zero \(fails, line"):
        team.run(at_home(fails, "fails"), [torch.ones(1)] * 2)
    with pytest.raises(UserError, match="these processes have ended"):
        team.run(ring.all_reduce, [torch.ones(2)] * 2)
    team.close()
