"""The bias rule against a loop over experts, and what it must never do: count twice, move in eval, feel a gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nano_runs import NANO, nano_recipe, nano_trainer
from random_models import nano, random_model, random_tokens
from torch import Tensor

import dsv3_mini.train.trainer as trainer_module
from dsv3_mini.evaluate.bits_per_byte import bits_per_byte
from dsv3_mini.inference import generate
from dsv3_mini.model.router import Routing
from dsv3_mini.train.balance import LoadCounter, max_violation, mean_bias_spread, routers, update_biases
from dsv3_mini.train.schedules import constant
from dsv3_mini.train.trainer import Trainer


def biases(trainer: Trainer) -> dict[int, Tensor]:
    return {router.layer: router.e_score_correction_bias.clone() for router in routers(trainer.model)}


def moved_by_loop(before: list[float], load: list[int], gamma: float) -> list[float]:
    """Report section 2.1.2: overloaded experts lose gamma, underloaded ones gain it."""
    after = []
    for bias, count in zip(before, load, strict=True):
        if count * len(load) > sum(load):
            bias -= gamma
        elif count * len(load) < sum(load):
            bias += gamma
        after.append(bias)
    return after


def test_biases_follow_the_sign_rule() -> None:
    model = random_model(nano())
    before = {r.layer: r.e_score_correction_bias.tolist() for r in routers(model)}
    assert list(before) == [1, 2, 3], "the MTP layer's gate is one of them"
    load = {1: [9, 1, 4, 4, 4, 4, 4, 2], 2: [4] * 8, 3: [32, 0, 0, 0, 0, 0, 0, 0]}
    update_biases(model, {layer: torch.tensor(counts) for layer, counts in load.items()}, 0.125)
    for router in routers(model):
        expected = moved_by_loop(before[router.layer], load[router.layer], 0.125)
        torch.testing.assert_close(router.e_score_correction_bias, torch.tensor(expected), rtol=0, atol=1e-7)
    assert routers(model)[1].e_score_correction_bias.tolist() == before[2], "an even load moves nothing"


def test_gamma_zero_and_models_without_biases_are_left_alone() -> None:
    model = random_model(nano())
    before = [r.e_score_correction_bias.clone() for r in routers(model)]
    update_biases(model, {}, 0.0)
    update_biases(model, {}, 0.1)  # no load was counted, as of MTP's layer while its weight is 0
    assert all(torch.equal(r.e_score_correction_bias, b) for r, b in zip(routers(model), before, strict=True))
    without = random_model(nano(topk_method="aux_loss"))
    update_biases(without, {}, 0.1)
    assert mean_bias_spread(without) == 0


def test_counter_adds_micro_batches_layer_by_layer() -> None:
    counter, expected = LoadCounter(), {1: torch.zeros(4), 2: torch.zeros(4)}
    for step in range(3):
        routings = []
        for layer in (1, 2):
            load = torch.tensor([step, layer, step * layer, 7])
            expected[layer] += load
            empty = torch.empty(0)
            routings.append(Routing(layer, empty, empty.long(), empty, load))
        first = routings[0].load.clone()
        counter.add(routings)
        assert torch.equal(routings[0].load, first), "what is counted stays as it was"
    assert {layer: load.tolist() for layer, load in counter.load.items()} == {
        k: v.tolist() for k, v in expected.items()
    }


def test_max_violation_is_its_definition() -> None:
    assert max_violation(torch.tensor([5, 5, 5, 5])) == 0
    assert max_violation(torch.tensor([20, 0, 0, 0])) == 3, "collapse onto one of e experts is e - 1"
    assert max_violation(torch.tensor([6, 4, 5, 5])) == pytest.approx(0.2)


def test_bias_spread_is_the_mean_of_standard_deviations() -> None:
    model = random_model(nano())
    spreads = []
    for router in routers(model):
        values = router.e_score_correction_bias.tolist()
        mean = sum(values) / len(values)
        spreads.append((sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5)
    assert mean_bias_spread(model).item() == pytest.approx(sum(spreads) / 3, rel=1e-5)


def test_the_rule_brings_a_collapsed_gate_back() -> None:
    """Weights stand still, only biases move: the load must even out, in every layer, the MTP layer too."""
    model, tokens = random_model(nano()), random_tokens(nano(), rows=2, length=64)
    with torch.no_grad():
        for router in routers(model):
            router.e_score_correction_bias.copy_(torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]))  # everybody goes to 0 and 1
        worst = []
        for _ in range(60):
            load = {r.layer: r.load for r in model(tokens).routing}
            worst.append(max(map(max_violation, load.values())))
            update_biases(model, load, 0.02)
    assert worst[0] == pytest.approx(3.0) and worst[-1] < 0.5


# ---- inside a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_update_a_step_from_the_load_of_the_whole_batch(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def watched(model: object, load: dict[int, Tensor], gamma: float) -> None:
        calls.append({layer: counted.tolist() for layer, counted in load.items()})
        update_biases(model, load, gamma)

    monkeypatch.setattr(trainer_module, "update_biases", watched)
    trainer = nano_trainer(tmp_path / "run", nano_recipe(batch=5, micro_batch=2, precision=precision))
    expected = {layer: bias.tolist() for layer, bias in biases(trainer).items()}
    for step in range(1, 5):
        report = trainer.train_step()
        assert len(calls) == step and calls[-1] == report.load
        # k = 2 choices a token; the MTP layer reads one token less of each of the 5 rows of 32.
        assert {layer: sum(load) for layer, load in report.load.items()} == {1: 320, 2: 320, 3: 310}
        for layer, bias in biases(trainer).items():
            expected[layer] = moved_by_loop(expected[layer], report.load[layer], 0.01)
            assert bias.dtype == torch.float32
            torch.testing.assert_close(bias, torch.tensor(expected[layer]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_change_nothing(micro_batch: int, tmp_path: Path) -> None:
    def run(name: str, size: int) -> Trainer:
        # alpha is large, so that a balance loss that is weighed by rows and not by tokens would show.
        trainer = nano_trainer(tmp_path / name, nano_recipe(batch=6, micro_batch=size, alpha=0.1))
        for _ in range(5):
            losses.setdefault(name, []).append(trainer.train_step())
        return trainer

    losses: dict[str, list] = {}
    whole, cut = run("whole", 6), run("cut", micro_batch)
    for one, other in zip(losses["whole"], losses["cut"], strict=True):
        assert one.load == other.load
        for field in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-5), field
    for layer, bias in biases(whole).items():
        assert torch.equal(bias, biases(cut)[layer]) and bias.any()
    for (name, p), q in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        # Adam divides by the gradient's own size, which blows rounding up where that size is next to nothing.
        assert (p - q).norm() < 1e-4 * p.norm(), name
        assert (p - q).abs().median() < 1e-6, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_biases_are_no_business_of_gradients_or_the_optimizer(precision: str, tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "run", nano_recipe(precision=precision))
    trainer.train_step()
    assert not any("bias" in name for name in trainer.optimizer.tensors())
    updated = {id(p) for group in trainer.optimizer.adamw.param_groups for p in group["params"]}
    for router in routers(trainer.model):
        bias = router.e_score_correction_bias
        assert not bias.requires_grad and bias.grad is None and id(bias) not in updated and bias.dtype == torch.float32
    before = biases(trainer)
    trainer.recipe = nano_recipe(precision=precision, gamma=constant("gamma", 0.0))
    trainer.train_step()
    assert all(torch.equal(bias, before[layer]) for layer, bias in biases(trainer).items())


def test_nothing_moves_while_a_model_is_measured(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "run")
    trainer.train_step()
    before, weights = biases(trainer), [p.detach().clone() for p in trainer.model.parameters()]
    rows = random_tokens(NANO, rows=3, length=33)
    averaged = trainer.averaged_model()
    for model in (trainer.model, averaged):
        model(rows)
        bits_per_byte(model, rows, 99, trainer.tokenizer.pad_id)
        generate(model, rows[:, :4], 5)
    assert all(torch.equal(bias, before[layer]) for layer, bias in biases(trainer).items())
    for router in routers(averaged):
        assert torch.equal(router.e_score_correction_bias, before[router.layer])
    assert all(torch.equal(p, w) for p, w in zip(trainer.model.parameters(), weights, strict=True))
