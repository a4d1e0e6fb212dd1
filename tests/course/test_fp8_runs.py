"""Lesson 16's runs: what they start from and train on, what they measure against formulas, and what ships against the bar."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice

import pytest
import torch

from dsv3_mini.config import ModelConfig
from dsv3_mini.course import fp8_runs as runs
from dsv3_mini.course.fp8_runs import (
    BASE,
    LINE,
    REPORTS,
    RESULTS,
    SEEDS,
    SIZES,
    WAYS,
    YARDSTICK,
    Recording,
    Run,
    Size,
    differences,
    fresh_model,
    gradients,
    held_out_gap,
    layer_errors,
    part_of,
    record,
    recorded,
    relative_gap,
    table,
    train,
    training_batches,
    training_steps,
)
from dsv3_mini.data.shipped import shipped
from dsv3_mini.errors import UserError
from dsv3_mini.fp8.linear import FP8Linear, Fp32Weights
from dsv3_mini.fp8.recipe import ABLATIONS, REPORT
from dsv3_mini.hub import from_pretrained
from dsv3_mini.model.router import Router
from dsv3_mini.train.losses import training_losses
from dsv3_mini.train.recipe import Recipe

# ---- what a run starts from --------------------------------------------------------------------------------------------


def test_the_ways_are_bf16_fp32_the_reports_and_every_ablation() -> None:
    assert list(WAYS)[:3] == [BASE, YARDSTICK, REPORTS]
    assert WAYS[BASE].recipe is WAYS[YARDSTICK].recipe is None and WAYS[REPORTS].recipe == REPORT
    assert set(WAYS) - {BASE, YARDSTICK, REPORTS} == set(ABLATIONS) - {"the report's"}
    assert {WAYS[name].dtype for name in WAYS if name != YARDSTICK} == {torch.bfloat16}
    assert WAYS[YARDSTICK].dtype == torch.float32
    assert [WAYS[name].moments for name in (BASE, YARDSTICK, REPORTS)] == [torch.float32, torch.float32, torch.bfloat16]


def test_tiny_is_the_preset_as_the_command_begins_it() -> None:
    tiny = SIZES["tiny"]
    assert tiny.cfg == ModelConfig.preset("tiny") and tiny.recipe == Recipe.preset("tiny") and tiny.steps >= 300
    assert {BASE, YARDSTICK, REPORTS} == set(tiny.ways)
    on = SIZES["tiny-trained"]
    assert on.cfg == tiny.cfg and on.steps >= 300 and on.ways == (*tiny.ways, "per-tensor scaling")


def test_all_ways_start_from_the_same_weights_in_their_own_numbers() -> None:
    state = torch.get_rng_state()
    plain, start = fresh_model("nano", YARDSTICK, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for way in (BASE, REPORTS):
        model, own_start = fresh_model("nano", way, seed=3)
        assert all(torch.equal(own_start[name], weight) for name, weight in start.items())
        high = {id(p) for m in model.modules() if isinstance(m, Fp32Weights) for p in m.parameters()}
        assert bool(high) == (way == REPORTS)
        for name, parameter in model.named_parameters():
            wanted = start[name] if id(parameter) in high else start[name].bfloat16()
            assert torch.equal(parameter, wanted), name
        biases = [m.e_score_correction_bias.dtype for m in model.modules() if isinstance(m, Router)]
        assert biases and set(biases) == {torch.float32}
    other, _ = fresh_model("nano", YARDSTICK, seed=4)
    assert not torch.equal(other.lm_head.weight, plain.lm_head.weight)
    ablated, _ = fresh_model("nano", "E5M2 gradients")
    linears = [m for m in ablated.modules() if isinstance(m, FP8Linear)]
    assert linears and all(m.recipe == ABLATIONS["E5M2 gradients"] for m in linears)


def test_runs_that_go_on_start_from_the_model_that_ships() -> None:
    ships = from_pretrained(shipped("tiny")).state_dict()
    for way in (YARDSTICK, REPORTS):
        model, start = fresh_model("tiny-trained", way, seed=1)
        assert all(torch.equal(weight, ships[name]) for name, weight in start.items())
        biases = [name for name in ships if name.endswith("e_score_correction_bias")]
        assert biases and all(torch.equal(model.state_dict()[name], ships[name]) for name in biases)


def test_steps_are_the_trainers_own_losses_with_the_recipes_settings() -> None:
    size, batches = SIZES["nano"], training_batches("nano", 3)
    model, start = fresh_model("nano", YARDSTICK)
    expected = training_losses(model, *batches[0], 0.0, size.recipe.alpha).main.item()
    before = model.lm_head.weight.detach().clone()
    steps = []
    for step in training_steps(model, start, batches, size.recipe):
        steps.append(step)
        if step.number == 1:
            moved = model.lm_head.weight.detach() - before
            # Its schedule begins at a learning rate of 0, and biases move by gamma in the first step all the same.
            assert not moved.any()
            biases = torch.cat([m.e_score_correction_bias for m in model.modules() if isinstance(m, Router)])
            assert all(abs(bias) == pytest.approx(0.01) or bias == 0 for bias in biases.tolist()) and biases.any()
    assert [step.number for step in steps] == [1, 2, 3] and steps[0].loss == pytest.approx(expected, rel=1e-6)
    assert not torch.equal(model.lm_head.weight, before)


def test_text_is_the_same_each_time_and_fits_the_recipe() -> None:
    size = SIZES["nano"]
    first = training_batches("nano", 2, 1)
    training_batches.cache_clear()
    again, other = training_batches("nano", 2, 1), training_batches("nano", 2, 2)
    for (tokens, targets), (same_tokens, same_targets), (others, _) in zip(first, again, other, strict=True):
        assert tokens.shape == (round(size.recipe.batch_size(0)), round(size.recipe.context(0)))
        assert torch.equal(tokens, same_tokens) and torch.equal(targets, same_targets)
        assert not torch.equal(tokens, others) and int(tokens.max()) < size.cfg.vocab_size


def test_a_short_run_in_fp8_learns() -> None:
    run = train("nano", REPORTS, steps=14)
    assert len(run.loss) == 14 and run.loss[-1] < run.loss[0] - 0.3
    assert 0 < run.held_out < run.loss[0]


# ---- what is measured --------------------------------------------------------------------------------------------------


def test_the_gap_is_of_the_means_of_the_last_third() -> None:
    base, other = [9.0, 9.0, 9.0, 9.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0, 3.0, 3.6]
    assert relative_gap(other, base) == pytest.approx(0.1)
    assert relative_gap([2.0], [4.0]) == pytest.approx(-0.5)


def test_errors_of_a_layer_are_those_of_its_definition() -> None:
    """y of the report's recipe, token by token, anew from `quantize`; the gradients within what two and three roundings give."""
    found = layer_errors(REPORT)
    assert list(found) == list(RESULTS)
    errors = [off.error for off in found.values()]
    assert errors[0] == pytest.approx(0.025 * 2**0.5, rel=0.15) and errors[1] == pytest.approx(errors[0], rel=0.1)
    assert errors[2] == pytest.approx(0.025 * 3**0.5, rel=0.15)
    assert all(abs(off.missing) < 0.005 for off in found.values())


def test_loud_tokens_hurt_only_where_they_share_a_scale() -> None:
    loud = {name: layer_errors(recipe, 1e6) for name, recipe in ABLATIONS.items() if name != "no promotion"}
    y, dx, _ = RESULTS
    tame = layer_errors(REPORT)
    for result in (y, dx):
        assert loud["the report's"][result].error == pytest.approx(tame[result].error, rel=0.1)
        assert loud["per-tensor scaling"][result].error > 0.9
    assert loud["block-wise Dgrad"][y] == loud["the report's"][y] and loud["block-wise Dgrad"][dx].missing > 0.9
    assert loud["E5M2 gradients"][dx].error < 0.1


def test_e5m2_is_less_exact_and_never_promoting_takes_something_away() -> None:
    _, dx, dw = RESULTS
    tame, five = layer_errors(REPORT), layer_errors(ABLATIONS["E5M2 gradients"])
    # A mantissa bit less doubles what the gradient's rounding does; the weight's stays: sqrt(5 / 2) in all.
    assert five[dx].error / tame[dx].error == pytest.approx(2.5**0.5, rel=0.1)
    never = layer_errors(ABLATIONS["no promotion"])
    # 2,048 terms: cuts towards zero take away, and next to rounding it is very little.
    assert 0.0002 < never[dw].missing - tame[dw].missing < 0.005


def test_off_is_the_median_row_and_its_projection() -> None:
    right = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    got = torch.tensor([[3.0, 4.0], [0.5, 0.0], [0.0, 0.0]])
    assert runs._off(got, right) == pytest.approx((0.5, 0.5))


def test_gradients_are_backwards_and_differences_relative_to_the_first() -> None:
    model, _ = fresh_model("nano", YARDSTICK)
    batch = training_batches("nano", 2)[1]
    found = gradients(model, *batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    training_losses(model, *batch, 0.0, 0.0).total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    parts = {part_of(name) for name in found}
    assert parts == {"norms", "attention", "routed experts", "router", "other feed-forwards", "embedding", "head"}
    assert differences(found, found) == dict.fromkeys(parts, 0.0)
    longer = {name: g * (1.25 if part_of(name) == "head" else 1.0) for name, g in found.items()}
    assert differences(found, longer) == pytest.approx({**dict.fromkeys(parts, 0.0), "head": 0.25})


def test_parts_go_by_the_name_and_norms_come_first() -> None:
    names = {
        "layers.0.self_attn.q_proj.q_a_layernorm.weight": "norms",
        "layers.0.self_attn.o_proj.weight": "attention",
        "layers.1.mlp.gate.weight": "router",
        "layers.0.mlp.gate_up_proj.weight": "other feed-forwards",
        "layers.1.mlp.shared_experts.down_proj.weight": "other feed-forwards",
        "layers.1.mlp.experts.down_proj": "routed experts",
        "norm.weight": "norms",
    }
    assert {name: part_of(name) for name in names} == names


# ---- a recording -------------------------------------------------------------------------------------------------------


def small() -> Recording:
    return Recording(
        (
            Run("nano", BASE, 0, (4.0, 3.0, 2.0), 2.0),
            Run("nano", REPORTS, 0, (4.0, 3.0, 2.01), 2.02),
            Run("nano", BASE, 1, (4.0, 3.0, 2.5), 2.0),
            Run("nano", REPORTS, 1, (4.0, 3.0, 2.45), 1.96),
            Run("tiny", BASE, 0, (4.0,), 4.0),
        )
    )


def test_a_recording_comes_back_as_it_was_written() -> None:
    text = small().to_text()
    assert Recording.from_text(text) == small() and json.loads(text)["made_by"] == runs.COMMAND
    assert small().sizes == ["nano", "tiny"] and small().largest == "tiny"
    assert small().seeds("nano") == [0, 1] and small().ways("nano") == [BASE, REPORTS]
    assert list(small().losses("nano", 1)) == [BASE, REPORTS]
    with pytest.raises(UserError, match="way 'FP8', seed 0 was not recorded"):
        small().run("tiny", "FP8", 0)


def test_gaps_are_of_the_same_seed_and_the_table_has_them_all() -> None:
    assert small().gap("nano", REPORTS, 0) == pytest.approx(0.005)
    assert small().gap("nano", REPORTS, 1) == pytest.approx(-0.02)
    assert held_out_gap(small(), "nano", REPORTS) == pytest.approx((0.01 - 0.02) / 2)
    lines = table(small()).split("\n")
    assert lines[0].split() == ["nano,", "3", "steps", "seed", "0", "seed", "1", "all", "held", "out"]
    # All: (2.01 + 2.45) / (2.0 + 2.5) - 1, which is not the mean of the two.
    assert lines[1].split() == [REPORTS, "+0.500%", "-2.000%", "-0.889%", "-0.500%"]


def test_recording_trains_every_way_of_a_size_and_keeps_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two ways of two steps, in a process of their own, over a file that holds a run of another size."""
    nano = SIZES["nano"]
    short = Size(nano.cfg, nano.recipe, 2, True, (BASE, REPORTS), 2)
    monkeypatch.setitem(runs.SIZES, "nano", short)
    out = tmp_path / "runs.json"
    old = (Run("tiny", BASE, 0, (4.0,), 4.0), Run("nano", BASE, 7, (1.0,), 1.0), Run("nano", REPORTS, 1, (9.0,), 9.0))
    out.write_text(Recording(old).to_text())
    assert runs.main(["--sizes", "nano", "--seeds", "0", "1", "--workers", "1", "--out", str(out)]) == 0
    kept = Recording.from_text(out.read_text())
    assert [(r.size, r.seed, r.way, len(r.loss)) for r in kept.runs] == [
        *(("nano", seed, way, 2) for seed in (0, 1) for way in (BASE, REPORTS)),
        ("nano", 7, BASE, 1),
        ("tiny", 0, BASE, 1),
    ]
    assert table(kept) in capsys.readouterr().out
    assert kept.run("nano", BASE, 0).loss != kept.run("nano", BASE, 1).loss
    (first, _) = record(["nano"], [0], 1, steps=1)
    assert first.loss[0] == pytest.approx(kept.run("nano", BASE, 0).loss[0], abs=1e-4)


def test_a_recording_that_is_stopped_keeps_what_has_ended(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def stopped(*_):
        yield Run("nano", BASE, 0, (4.0,), 4.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "record", stopped)
    out = tmp_path / "runs.json"
    with pytest.raises(KeyboardInterrupt):
        runs.main(["--sizes", "nano", "--out", str(out)])
    assert Recording.from_text(out.read_text()).runs == (Run("nano", BASE, 0, (4.0,), 4.0),)


# ---- what ships --------------------------------------------------------------------------------------------------------


def test_what_ships_holds_every_way_of_its_sizes_for_the_same_seeds() -> None:
    recording = recorded()
    assert "nano" in recording.sizes
    for size in recording.sizes:
        assert recording.ways(size) == list(SIZES[size].ways)
        assert set(recording.seeds(size)) <= set(SEEDS)
        for seed in recording.seeds(size):
            lengths = {len(losses) for losses in recording.losses(size, seed).values()}
            assert lengths == {SIZES[size].steps}
            first = [losses[0] for losses in recording.losses(size, seed).values()]
            assert max(first) - min(first) < 0.02, "the same weights and text, before the first step"


def test_fp8_stays_within_the_reports_line_of_bf16_at_tiny() -> None:
    """The bar of the issue: 300 steps or more, the same data and seeds, less than 0.25% over the last third.

    From new weights single runs of a size so small drift farther than that, FP32 as far as FP8: there it is all seeds
    together. From trained weights it is each.
    """
    for size in ("tiny", "tiny-trained"):
        assert all(len(recorded().run(size, REPORTS, seed).loss) >= 300 for seed in recorded().seeds(size))
    assert len(recorded().seeds("tiny")) == 3 and abs(recorded().mean_gap("tiny", REPORTS)) < LINE
    assert all(abs(recorded().gap("tiny-trained", REPORTS, s)) < LINE for s in recorded().seeds("tiny-trained"))


@pytest.mark.slow
def test_it_still_goes_as_it_was_recorded() -> None:
    """The first steps anew: another processor adds in another order."""
    model, start = fresh_model("nano", REPORTS)
    steps = training_steps(
        model, start, training_batches("nano", SIZES["nano"].steps), SIZES["nano"].recipe, torch.bfloat16
    )
    now = [step.loss for step in islice(steps, 12)]
    assert now == pytest.approx(recorded().run("nano", REPORTS, 0).loss[:12], abs=0.03)


def test_the_command_prints_the_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsv3_mini.course.fp8_runs", "--table"], capture_output=True, text=True, check=True
    )
    assert done.stdout == table(recorded()) + "\n" and "no promotion" in done.stdout
