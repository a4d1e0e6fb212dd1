"""The trainer: what it learns, what it logs, what it refuses, and how it stops."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from nano_runs import NANO, all_state, assert_bit_equal, nano_recipe, nano_trainer, small_tokenizer
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.data.packing import inputs_and_targets
from dsv3_mini.errors import CheckpointError, ConfigError, UserError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.train.checkpoint import checkpoints
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.run_log import RunLog
from dsv3_mini.train.schedules import Piece, Schedule, constant, steps
from dsv3_mini.train.trainer import Diverged, Observer, StepReport, Trainer

NAN = float("nan")


class Recorder(Observer):
    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.evaluated: list[int] = []
        self.told: list[dict[str, Any]] = []

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        self.evaluated.append(trainer.step)
        return {"score": trainer.step / 2}

    def on_evaluation(self, scores: dict[str, Any]) -> None:
        self.told.append(scores)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below a folder, and what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- learning --------------------------------------------------------------------------------------------------------


def test_a_run_of_seconds_learns_more_than_how_often_tokens_come(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "run", nano_recipe(steps=90, batch=8, seq_len=64, gamma=constant("gamma", 0.02)))
    recorder, targets = Recorder(), Counter()
    next_batch = trainer.stream.next_batch

    def watched(batch_size: int) -> Tensor:
        rows = next_batch(batch_size)
        _, target = inputs_and_targets(rows, trainer.tokenizer.pad_id)
        targets.update(target[target >= 0].tolist())
        return rows

    trainer.stream.next_batch = watched
    assert trainer.run([recorder])
    total = sum(targets.values())
    unigram = -sum(n / total * math.log(n / total) for n in targets.values())
    losses, mtp_losses = ([getattr(r, name) for r in recorder.reports] for name in ("loss", "mtp_loss"))
    assert losses[0] == pytest.approx(math.log(512), abs=0.3) == mtp_losses[0], "an untrained model knows nothing"
    assert sum(losses[-10:]) / 10 < 0.75 * unigram and sum(mtp_losses[-10:]) / 10 < 0.8 * unigram
    loads = [torch.tensor([r.load[layer] for r in recorder.reports[-20:]]).sum(0) for layer in (1, 2, 3)]
    assert all((load > 0.02 * load.sum()).all() for load in loads), "every expert works"
    assert len(losses) == 90 and all(math.isfinite(r.grad_norm) and r.grad_norm > 0 for r in recorder.reports)


def test_runs_of_one_seed_are_equal_and_of_another_are_not(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> dict[str, Tensor]:
        trainer = nano_trainer(tmp_path / name, nano_recipe(steps=3, seed=seed))
        trainer.run()
        return all_state(trainer)

    first = run("first", 5)
    torch.manual_seed(99)
    assert_bit_equal(first, run("second", 5))
    other = run("other", 6)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_bf16_starts_where_fp32_starts_and_learns_as_well(tmp_path: Path) -> None:
    runs = {p: nano_trainer(tmp_path / p, nano_recipe(steps=15, precision=p)) for p in ("fp32", "bf16")}
    for name, master in runs["bf16"].optimizer.masters.items():
        assert torch.equal(master, runs["fp32"].optimizer.masters[name]), name
    losses = {}
    for precision, trainer in runs.items():
        losses[precision] = [trainer.train_step().loss for _ in range(15)]
    assert all(p.dtype == torch.bfloat16 for p in runs["bf16"].model.parameters())
    assert losses["bf16"][0] == pytest.approx(losses["fp32"][0], rel=2e-3)
    assert sum(losses["bf16"][-5:]) == pytest.approx(sum(losses["fp32"][-5:]), rel=0.05)
    assert losses["bf16"][-1] < losses["bf16"][0] - 1


# ---- a step ----------------------------------------------------------------------------------------------------------


def test_every_step_takes_its_settings_from_the_tokens_seen(tmp_path: Path) -> None:
    recipe = nano_recipe(
        total_tokens=1200,
        learning_rate=Schedule("learning_rate", (Piece(400, 0.0, 1e-3), Piece(1200, 1e-3, 1e-4, "cosine"))),
        batch_size=Schedule("batch_size", (Piece(600, 2, 6),)),
        context=steps("context", 16, (500, 32)),
        gamma=steps("gamma", 0.01, (900, 0.0)),
        mtp_lambda=steps("mtp_lambda", 0.3, (700, 0.0)),
    )
    recorder = Recorder()
    nano_trainer(tmp_path / "run", recipe).run([recorder])
    tokens = 0
    for number, report in enumerate(recorder.reports, start=1):
        assert report.step == number
        assert report.learning_rate == recipe.learning_rate(tokens) and report.gamma == recipe.gamma(tokens)
        assert report.mtp_lambda == recipe.mtp_lambda(tokens) and (report.mtp_loss > 0) == (tokens < 700)
        assert report.batch_size == round(2 + 4 * min(tokens / 600, 1))
        tokens += report.batch_size * (16 if tokens < 500 else 32)
        assert report.tokens == tokens
        excess = {layer: max(load) * 8 / sum(load) - 1 for layer, load in report.load.items()}
        assert report.max_vio == pytest.approx(excess, abs=1e-6)
    assert tokens >= 1200 > tokens - report.batch_size * 32
    assert {r.batch_size for r in recorder.reports} > {2, 6}


def test_a_learning_rate_of_zero_moves_biases_alone(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "run", nano_recipe(learning_rate=constant("learning_rate", 0.0)))
    before = all_state(trainer)
    trainer.train_step()
    after = all_state(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("bias" in name for name in moved)


def test_the_averaged_model_is_the_average_with_the_biases_of_now(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "run", nano_recipe(ema_decay=0.5, precision="bf16"))
    for _ in range(4):
        trainer.train_step()
    averaged = trainer.averaged_model()
    assert not averaged.training
    for name, parameter in averaged.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, trainer.optimizer.ema[name]), name
        assert name.endswith("norm.weight") or not torch.equal(parameter, trainer.optimizer.masters[name]), name
    for name, buffer in averaged.named_buffers():
        assert torch.equal(buffer, trainer.model.get_buffer(name)) and buffer.any(), name
    trainer.train_step()
    assert not torch.equal(averaged.lm_head.weight, trainer.optimizer.ema["lm_head.weight"]), "a copy, not a view"


# ---- run, log, observers ---------------------------------------------------------------------------------------------


def test_the_log_has_every_logged_step_and_evaluation_once(tmp_path: Path) -> None:
    recorder, second = Recorder(), Recorder()
    recipe = nano_recipe(steps=10, log_every=3, evaluate_every=4 * 4 * 32)
    assert nano_trainer(tmp_path / "run", recipe).run([recorder, second])
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 3, 6, 9]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [(line["step"], line["tokens"], line["score"]) for line in evaluations] == [
        (4, 512, 2.0),
        (8, 1024, 4.0),
        (10, 1280, 5.0),  # the end is always measured
    ]
    assert recorder.evaluated == second.evaluated == [4, 8, 10]
    assert recorder.told == second.told == [{"score": 2.0}, {"score": 4.0}, {"score": 5.0}]
    for line in lines:
        if line["kind"] == "step":
            report = recorder.reports[line["step"] - 1]
            assert line["loss"] == pytest.approx(report.loss, abs=1e-6)
            assert line["load"] == {str(layer): load for layer, load in report.load.items()}
            assert line["max_vio"].keys() == {"1", "2", "3"}


@pytest.mark.parametrize("cut_off", ['{"kind": "step", "st', "\x00\x00\x00", "[1, 2]", "null", '{"step": null}'])
def test_a_resumed_log_drops_what_came_after_its_checkpoint(cut_off: str, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    lines = [json.dumps({"kind": kind, "step": s}) for s in (1, 2, 3, 4) for kind in ("step", "evaluation")]
    file.write_text("\n".join(lines) + "\n" + cut_off)
    with RunLog(file, 3) as log:
        log.write({"kind": "step", "step": 4})
    kept = [(line["kind"], line["step"]) for line in map(json.loads, file.read_text().splitlines())]
    assert kept == [(kind, s) for s in (1, 2, 3) for kind in ("step", "evaluation")] + [("step", 4)]


def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_same_end(tmp_path: Path) -> None:
    recipe = nano_recipe(steps=9, checkpoint_every=4 * 4 * 32, evaluate_every=5 * 4 * 32)
    unbroken = nano_trainer(tmp_path / "unbroken", recipe)
    assert unbroken.run([Recorder()])
    for stop_after in (2, 2, 3):  # at first before any checkpoint was due
        trainer, asked = nano_trainer(tmp_path / "broken", recipe), Recorder()
        begun_at = trainer.step

        def enough(asked: Recorder = asked, count: int = stop_after) -> bool:
            return len(asked.reports) >= count

        assert trainer.run([asked], enough) is False
        assert checkpoints(tmp_path / "broken")[-1].name == f"step-{trainer.step:08d}"
        assert trainer.step == begun_at + stop_after
    last = nano_trainer(tmp_path / "broken", recipe)
    assert last.step == 7 and last.run([Recorder()]) is True
    assert_bit_equal(all_state(last), all_state(unbroken))

    def without_times(line: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds")}

    assert list(map(without_times, log_of(last.folder))) == list(map(without_times, log_of(unbroken.folder)))


def test_a_run_that_has_ended_stays_as_it_is(tmp_path: Path) -> None:
    recipe = nano_recipe(steps=2)
    nano_trainer(tmp_path / "run", recipe).run()
    before = fingerprint(tmp_path / "run")
    again = nano_trainer(tmp_path / "run", recipe)
    assert again.step == 2 and again.run() is True
    assert fingerprint(tmp_path / "run") == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_across_a_longer_context_is_to_the_bit(precision: str, tmp_path: Path) -> None:
    context = steps("context", 16, (4 * 4 * 16, 32))
    recipe = nano_recipe(total_tokens=4 * (4 * 16 + 4 * 32), context=context, precision=precision)
    unbroken = nano_trainer(tmp_path / "unbroken", recipe)
    unbroken.run()
    for stop_at in (3, 4, 6):
        trainer = nano_trainer(tmp_path / "broken", recipe)
        assert trainer.stream.seq_len == (32 if trainer.step > 4 else 16)
        while trainer.step < stop_at:
            trainer.train_step()
        trainer.save()
    last = nano_trainer(tmp_path / "broken", recipe)
    assert last.run() and last.step == unbroken.step == 8
    assert last.stream.state_dict()["block"] > 0, "the longer rows are of new documents"
    assert_bit_equal(all_state(last), all_state(unbroken))


# ---- numbers that are none -------------------------------------------------------------------------------------------


def stopped_by_nan(trainer: Trainer) -> str:
    """Run until it diverges; nothing on disk may change but the lines of good steps."""
    kept = fingerprint(trainer.folder / "checkpoints")
    with pytest.raises(Diverged) as caught:
        trainer.run([Recorder()])
    assert fingerprint(trainer.folder / "checkpoints") == kept
    return one_line(caught)


def test_a_poisoned_weight_stops_the_run_by_name(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "run")
    trainer.train_step()
    with torch.no_grad():
        trainer.model.layers[1].mlp.experts.down_proj[2, 3, 4] = NAN
    message = stopped_by_nan(trainer)
    assert message.startswith("step 2: loss is nan, first seen in weight layers.1.mlp.experts.down_proj")
    assert "no checkpoint was written yet" in message


def test_the_last_good_checkpoint_is_named_and_resumes(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "run")
    for _ in range(3):
        trainer.train_step()
    good = trainer.save()
    saved = all_state(trainer)
    trainer.train_step()
    with torch.no_grad():
        trainer.model.norm.weight[0] = float("inf")
    message = stopped_by_nan(trainer)
    assert message.startswith("step 5: ") and "weight norm.weight" in message and str(good) in message
    resumed = nano_trainer(tmp_path / "run")
    assert resumed.step == 3
    assert_bit_equal(all_state(resumed), saved)
    assert all(math.isfinite(resumed.train_step().loss) for _ in range(3))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_explodes_is_named_and_reaches_no_weight(precision: str, tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "run", nano_recipe(precision=precision))
    trainer.train_step()
    before = all_state(trainer)
    trainer.model.layers[2].mlp.gate.weight.register_hook(lambda gradient: gradient * float("inf"))
    message = stopped_by_nan(trainer)
    assert message.startswith("step 2: gradient norm is nan") or message.startswith("step 2: gradient norm is inf")
    assert "first seen in gradient of layers.2.mlp.gate.weight" in message
    assert_bit_equal(all_state(trainer), before)


def test_an_activation_that_overflows_is_told_from_a_bad_weight(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "run")
    trainer.train_step()
    with torch.no_grad():
        trainer.model.layers[0].mlp.gate_up_proj.weight.fill_(3e38)
    assert "an activation (all weights and gradients are finite)" in stopped_by_nan(trainer)


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg, recipe, file, field",
    [
        (NANO.replace(moe_intermediate_size=64), nano_recipe(), "config.json", "moe_intermediate_size"),
        (NANO.replace(n_group=2), nano_recipe(), "config.json", "n_group"),
        (NANO, nano_recipe(steps=9), "recipe.json", "total_tokens"),
        (NANO, nano_recipe(seed=1), "recipe.json", "seed"),
        (NANO, nano_recipe(mixture={"stories": 1.0}), "recipe.json", "mixture"),
        (NANO, nano_recipe(gamma=constant("gamma", 0.02)), "recipe.json", "gamma"),
        (NANO, nano_recipe(betas=(0.9, 0.96)), "recipe.json", "betas"),
        (NANO, nano_recipe(precision="bf16"), "recipe.json", "precision"),
    ],
)
def test_another_runs_folder_is_refused_and_left_alone(
    cfg: ModelConfig, recipe: Recipe, file: str, field: str, tmp_path: Path
) -> None:
    trainer = nano_trainer(tmp_path / "run")
    trainer.train_step()
    trainer.save()
    before = fingerprint(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        nano_trainer(tmp_path / "run", recipe, cfg)
    message = one_line(caught)
    assert f"{tmp_path / 'run' / file} is of another run ({field} differs)" in message
    assert fingerprint(tmp_path / "run") == before


def test_a_folder_that_holds_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("\\documentclass{article}")
    with pytest.raises(ConfigError, match="thesis is not empty and holds no run: choose another --out"):
        nano_trainer(tmp_path / "thesis")
    with pytest.raises(ConfigError, match=r"thesis.tex is a file: choose another --out"):
        nano_trainer(tmp_path / "thesis" / "thesis.tex")
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "thesis.tex"]


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size = 500 is less than the tokenizer's 512 tokens"):
        nano_trainer(tmp_path / "run", cfg=NANO.replace(vocab_size=500))
    with pytest.raises(UserError, match="nowhere"):
        nano_trainer(tmp_path / "run", nano_recipe(mixture={str(tmp_path / "nowhere"): 1.0}))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("left", [[], ["config.json"], ["config.json", "recipe.json.partial"], ["config.json.partial"]])
def test_a_run_that_was_killed_as_it_began_can_begin_again(left: list[str], tmp_path: Path) -> None:
    whole = nano_trainer(tmp_path / "whole")
    (tmp_path / "run").mkdir()
    for name in left:
        text = (whole.folder / name.removesuffix(".partial")).read_text()
        (tmp_path / "run" / name).write_text(text[:20] if name.endswith(".partial") else text)
    trainer = nano_trainer(tmp_path / "run")
    assert trainer.step == 0
    assert sorted(path.name for path in trainer.folder.iterdir()) == ["config.json", "recipe.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "3", '"text"'])
@pytest.mark.parametrize("name", ["config.json", "recipe.json"])
def test_a_damaged_record_is_named(name: str, text: str, tmp_path: Path) -> None:
    nano_trainer(tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        nano_trainer(tmp_path / "run")
    assert str(tmp_path / "run" / name) in one_line(caught)


def test_damaged_checkpoints_are_named_and_the_one_before_resumes(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "run")
    for _ in range(2):
        trainer.train_step()
        trainer.save()
    first, second = checkpoints(tmp_path / "run")
    file = second / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = fingerprint(tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        nano_trainer(tmp_path / "run")
    assert str(file) in one_line(caught) and "remove step-00000002" in one_line(caught)
    assert fingerprint(tmp_path / "run") == before
    for path in second.iterdir():
        path.unlink()
    second.rmdir()
    assert nano_trainer(tmp_path / "run").step == 1


def test_fresh_trainers_save_and_resume_before_their_first_step(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "run")
    assert trainer.run(should_stop=lambda: True) is False
    resumed = nano_trainer(tmp_path / "run")
    assert resumed.step == 0 and resumed.last_saved is not None
    assert_bit_equal(all_state(resumed), all_state(trainer))
    trainer.train_step()
    resumed.train_step()
    assert_bit_equal(all_state(resumed), all_state(trainer))


def test_default_stream_reads_the_recipes_mixture(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "run", NANO, nano_recipe(seed=3), small_tokenizer())
    assert trainer.stream.mixture == {"stories": 0.6, "sums": 0.4} and trainer.stream.seed == 3
    assert isinstance(trainer.model, DeepSeekV3) and math.isfinite(trainer.train_step().loss)


# ---- what a small model starts with ------------------------------------------------------------------------------------


def test_mtp_rests_while_its_weight_is_zero(tmp_path: Path) -> None:
    """Not a bit of it moves, not even by weight decay; then it trains as all else does."""
    recipe = nano_recipe(steps=6, mtp_lambda=steps("mtp_lambda", 0.0, (3 * 4 * 32, 0.3)))
    trainer = nano_trainer(tmp_path / "run", recipe)
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    for _ in range(3):
        report = trainer.train_step()
        assert report.mtp_loss == 0 and set(report.load) == {1, 2}
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, start[name]) == name.startswith("mtp."), name
    report = trainer.train_step()
    assert report.mtp_loss > 0 and set(report.load) == {1, 2, 3}
    assert not any(torch.equal(p, start[n]) for n, p in trainer.model.named_parameters() if p.ndim > 1)


def test_resting_weights_get_no_gradient_to_share(tmp_path: Path) -> None:
    optimizer = nano_trainer(tmp_path / "run").optimizer
    shared = optimizer.gradients(resting="mtp.")
    assert len(shared) == sum(not name.startswith("mtp.") for name in optimizer.masters)
    for name, master in optimizer.masters.items():
        assert (master.grad is None) == name.startswith("mtp.")
    assert len(optimizer.gradients()) == len(optimizer.masters)


def test_the_head_can_start_as_the_embedding(tmp_path: Path) -> None:
    for copied in (True, False):
        trainer = nano_trainer(tmp_path / str(copied), nano_recipe(head_from_embedding=copied))
        head, embedding = trainer.model.lm_head.weight, trainer.model.embed_tokens.weight
        assert torch.equal(head, embedding) == copied
        trainer.train_step()
        assert not torch.equal(head, embedding), "they part with the first step"
