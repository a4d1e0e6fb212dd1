"""Lesson 09's runs: what they measure against loops, what ships against the bars, and that it still goes as recorded."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from itertools import islice

import pytest
import torch

from dsv3_mini.course import balance_runs as runs
from dsv3_mini.course.balance_runs import (
    ALPHAS,
    EVERY,
    GAMMAS,
    PRICE,
    RACE,
    SEEDS,
    SHAPE,
    STEPS,
    TARGET,
    WAYS,
    Frame,
    Recording,
    Score,
    Trial,
    Way,
    balance_loss,
    balance_steps,
    film_of,
    fresh_model,
    held_out,
    record,
    recorded,
    score,
    sequence_loads,
    table,
    training_batches,
    violations,
)
from dsv3_mini.data.packing import IGNORED
from dsv3_mini.errors import UserError
from dsv3_mini.model.router import Routing
from dsv3_mini.train.balance import max_violation, routers
from dsv3_mini.train.losses import training_losses

# ---- a run -------------------------------------------------------------------------------------------------------------


def test_shape_is_nano_without_what_later_lessons_add() -> None:
    from dsv3_mini.config import ModelConfig

    nano = ModelConfig.preset("nano")
    differs = {f.name for f in dataclasses.fields(nano) if getattr(SHAPE, f.name) != getattr(nano, f.name)}
    assert differs == {"vocab_size", "n_group", "topk_group", "num_nextn_predict_layers"}


def test_a_step_is_the_trainers_own_losses_and_one_move_of_gamma() -> None:
    """The first step against `training_losses`, the biases against the sign of what its own load says."""
    tokens, targets = training_batches(4)[0]
    frames = list(balance_steps(fresh_model(), training_batches(4), Way(gamma=0.5, alpha=0.1)))
    untouched = fresh_model()
    losses = training_losses(untouched, tokens, targets, 0.0, 0.1)
    assert frames[0].loss == pytest.approx(losses.main.item(), rel=1e-5)
    assert [r.load.tolist() for r in losses.routing] == frames[0].load.tolist()
    bias = torch.zeros(2, SHAPE.n_routed_experts)
    for frame in frames:
        mean = frame.load.sum(-1, keepdim=True) / frame.load.shape[-1]
        bias += torch.where(frame.load > mean, -0.5, torch.where(frame.load < mean, 0.5, 0.0))
        assert torch.equal(frame.bias, bias)
        assert frame.load.sum(-1).tolist() == [tokens.numel() * SHAPE.num_experts_per_tok] * 2
    assert [frame.number for frame in frames] == [1, 2, 3, 4]


def test_alpha_pulls_on_the_gates_and_zero_does_not() -> None:
    batches = training_batches(4)[:1]
    weights = {}
    for alpha in (0.0, 10.0):
        model = fresh_model()
        list(balance_steps(model, batches, Way(alpha=alpha)))
        weights[alpha] = routers(model)[0].weight.detach().clone()
    assert not torch.equal(weights[0.0], weights[10.0])


def test_a_loss_over_the_batch_is_one_long_sequence() -> None:
    scores = torch.rand(3, 5, 6)
    empty = torch.empty(0, dtype=torch.long)
    routing = Routing(1, scores, torch.zeros(3, 5, 2, dtype=torch.long), empty, empty)
    by_sequence = [balance_loss(dataclasses.replace(routing, scores=row[None]), "batch") for row in scores]
    assert balance_loss(routing, "sequence").item() == pytest.approx(sum(by_sequence).item() / 3, rel=1e-6)
    flat = dataclasses.replace(routing, scores=scores.reshape(1, 15, 6))
    assert balance_loss(routing, "batch").item() == pytest.approx(balance_loss(flat, "sequence").item(), rel=1e-6)


def test_models_start_alike_and_leave_the_callers_random_numbers() -> None:
    state = torch.get_rng_state()
    one, other, third = fresh_model(1), fresh_model(1), fresh_model(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, third.lm_head.weight)


# ---- what is measured --------------------------------------------------------------------------------------------------


def test_violations_are_max_violation_many_times() -> None:
    loads = torch.randint(1, 30, (3, 4, 5))
    expected = [[max_violation(load) for load in row] for row in loads]
    torch.testing.assert_close(violations(loads), torch.tensor(expected))


def test_score_is_what_loops_over_tokens_and_experts_give() -> None:
    model = fresh_model(3)
    with torch.no_grad():
        for router in routers(model):
            router.weight.normal_(0, 0.3)
            router.e_score_correction_bias.normal_(0, 0.1)
    experts, lost, kept = SHAPE.n_routed_experts, 0.0, 0
    loads = {domain: [[0] * experts for _ in range(2)] for domain in held_out()}
    alone: list[float] = []
    for domain, (tokens, targets) in held_out().items():
        for row, wanted in zip(tokens, targets, strict=True):
            with torch.no_grad():
                output = model(row[None])
            log_p = output.logits[0].log_softmax(-1)
            for position, target in enumerate(wanted.tolist()):
                if target != IGNORED:
                    lost, kept = lost - log_p[position, target].item(), kept + 1
            for layer, routing in enumerate(output.routing):
                own = [0] * experts
                for expert in routing.chosen.flatten().tolist():
                    own[expert] += 1
                    loads[domain][layer][expert] += 1
                alone.append(max(own) * experts / sum(own) - 1)
    got = score(model)
    assert got.loss == pytest.approx(lost / kept, rel=1e-4)
    whole = [[a + b for a, b in zip(*layers, strict=True)] for layers in zip(*loads.values(), strict=True)]
    assert got.max_vio == pytest.approx(sum(max(load) * experts / sum(load) - 1 for load in whole) / 2, rel=1e-5)
    assert got.sequence_vio == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    moved = 0.0
    for stories, sums in zip(*loads.values(), strict=True):
        moved += sum(max(a / sum(stories) - b / sum(sums), 0) for a, b in zip(stories, sums, strict=True)) / 2
    assert got.apart == pytest.approx(moved, rel=1e-5)


def test_loads_of_sequences_add_up_to_the_load_of_the_batch() -> None:
    model, tokens = fresh_model(), held_out()["sums"][0][:4]
    with torch.no_grad():
        routing = model(tokens).routing
    loads = sequence_loads(model, tokens)
    assert loads.shape == (2, 4, SHAPE.n_routed_experts)
    assert [load.tolist() for load in loads.sum(1).long()] == [r.load.tolist() for r in routing]


def test_held_out_text_is_of_both_domains_in_the_shares_of_training() -> None:
    rows = {domain: len(tokens) for domain, (tokens, _) in held_out().items()}
    assert rows == runs.HELD_OUT_ROWS
    assert rows["stories"] / sum(rows.values()) == pytest.approx(runs.MIXTURE["stories"])


# ---- films and their file ----------------------------------------------------------------------------------------------


def frames(count: int, gamma: float) -> list[Frame]:
    moves = torch.randint(-1, 2, (count, 2, 4)).cumsum(0)
    return [Frame(i + 1, 5.0 - i / 4, torch.randint(1, 20, (2, 4)), gamma * moves[i].float()) for i in range(count)]


def test_a_frame_is_two_steps_together() -> None:
    steps = frames(5, 0.25)
    film = film_of(steps, Way(0.25, 0.5), Score(1, 2, 3, 4))
    assert EVERY == 2 and len(film) == 2, "the fifth step fills no frame"
    assert (film.gamma, film.alpha) == (0.25, 0.5)
    assert film.loss.tolist() == pytest.approx([4.875, 4.375])
    assert torch.equal(film.load[1], steps[2].load + steps[3].load)
    assert torch.equal(film.bias[1], steps[3].bias)
    assert film.share[0].mean(-1).tolist() == pytest.approx([1, 1])
    assert film.max_vio[1, 0].item() == pytest.approx(max_violation(film.load[1, 0]))


def test_a_recording_comes_back_as_it_was_written() -> None:
    films = tuple(film_of(frames(6, g), Way(g, a), Score(2.5, g, a, 0.5)) for g in (0.0, 0.001) for a in (0.0, 0.1))
    films = tuple(f if f.gamma else dataclasses.replace(f, bias=torch.zeros_like(f.bias)) for f in films)
    recording = Recording(films, (Trial(WAYS["biases"], 1, Score(3, 0.25, 1, 0)),))
    text = recording.to_text()
    back = Recording.from_text(text)
    assert json.loads(text)["made_by"] == runs.COMMAND
    assert back.to_text() == text and back.trials == recording.trials
    for one, other in zip(back.films, films, strict=True):
        assert torch.equal(one.load, other.load) and one.score == other.score
        torch.testing.assert_close(one.bias, other.bias)
        torch.testing.assert_close(one.loss, other.loss, atol=6e-4, rtol=0)
    assert back.gammas == [0.0, 0.001] and back.alphas == [0.0, 0.1]
    assert back.film(0.001, 0.1).score.max_vio == 0.001
    with pytest.raises(UserError, match="gamma = 0.5, alpha = 0 was not recorded"):
        back.film(0.5)


def test_medians_are_number_by_number_and_of_one_way() -> None:
    scores = [Score(3, 1, 5, 0), Score(1, 2, 4, 0), Score(2, 9, 6, 0)]
    way = Way(gamma=1)
    trials = [Trial(way, seed, each) for seed, each in enumerate(scores)] + [Trial(Way(), 0, Score(9, 9, 9, 9))]
    assert Recording((), tuple(trials)).median(way) == Score(2, 2, 5, 0)


def test_a_gamma_reaches_only_where_balance_and_loss_both_hold() -> None:
    def film(gamma: float, vio: float, loss: float) -> runs.Film:
        return film_of(frames(2, gamma), Way(gamma), Score(loss, vio, 0, 0))

    even, dear = TARGET - 0.01, 2 * (1 + PRICE) + 0.01
    recording = Recording((film(0.0, 2, 2), film(0.1, even, 2), film(0.2, TARGET + 0.1, 2), film(0.3, even, dear)), ())
    assert [recording.reaches(gamma) for gamma in (0.0, 0.1, 0.2, 0.3)] == [False, True, False, False]


def test_recording_trains_every_pair_and_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """With runs of four steps, in processes of their own."""
    for name, value in {"STEPS": 4, "GAMMAS": (0.0, 0.01), "ALPHAS": (0.0,), "SEEDS": (0, 1)}.items():
        monkeypatch.setattr(runs, name, value)
    monkeypatch.setattr(runs, "WAYS", {name: WAYS[name] for name in ("left alone", "biases")})
    monkeypatch.setattr(runs, "_train", short_run)
    recording = record(workers=1)
    assert [(f.gamma, f.alpha, len(f)) for f in recording.films] == [(0.0, 0.0, 2), (0.01, 0.0, 2)]
    assert [(t.way, t.seed) for t in recording.trials] == [(w, s) for w in runs.WAYS.values() for s in (0, 1)]
    assert recording.trials[2].score == recording.film(0.01).score, "a run is not trained twice"
    assert "biases" in table(recording)


def short_run(task: tuple[Way, int]) -> runs.Film:
    way, seed = task
    return runs.train(way, seed, steps=4)


# ---- what ships --------------------------------------------------------------------------------------------------------


def test_what_ships_is_what_the_module_records() -> None:
    recording = recorded()
    assert recording.gammas == sorted(GAMMAS) and recording.alphas == sorted(ALPHAS)
    assert len(recording.films) == len(GAMMAS) * len(ALPHAS)
    assert all(len(film) == STEPS // EVERY for film in recording.films)
    assert sorted((*dataclasses.astuple(t.way), t.seed) for t in recording.trials) == sorted(
        (*dataclasses.astuple(way), seed) for way in WAYS.values() for seed in SEEDS
    )
    assert set(RACE) <= set(WAYS) and len(SEEDS) >= 3
    film = recording.film(WAYS["biases"].gamma)
    seed_0 = next(t for t in recording.trials if t.way == WAYS["biases"] and t.seed == 0)
    assert film.score == seed_0.score
    per_frame = EVERY * runs.ROWS * runs.CONTEXT * SHAPE.num_experts_per_tok
    assert set(film.load.sum(-1).flatten().tolist()) == {per_frame}


def test_the_bars_hold_as_medians_over_three_seeds() -> None:
    medians = {name: recorded().median(way) for name, way in WAYS.items()}
    alone, biases = medians["left alone"], medians["biases"]
    assert alone.max_vio > 1.5
    assert biases.max_vio < 0.4
    assert biases.loss <= 1.01 * alone.loss
    by_loss = medians["loss over sequences"]
    assert abs(by_loss.max_vio - biases.max_vio) < 0.2, "of the same balance"
    assert by_loss.loss >= biases.loss


@pytest.mark.slow
def test_it_still_goes_as_it_was_recorded() -> None:
    """The first steps anew: another processor adds in another order, so that single choices may differ."""
    film, way = recorded().film(WAYS["biases"].gamma), WAYS["biases"]
    steps = list(islice(balance_steps(fresh_model(), training_batches(), way), 20))
    now = film_of(steps, way, film.score)
    torch.testing.assert_close(now.loss, film.loss[:10], atol=0.05, rtol=0)
    assert (now.share - film.share[:10]).abs().mean() < 0.05


def test_the_command_prints_the_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsv3_mini.course.balance_runs", "--table"], capture_output=True, text=True, check=True
    )
    assert done.stdout == table(recorded()) + "\n" and all(name in done.stdout for name in WAYS)
