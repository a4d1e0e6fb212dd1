"""Lesson 13's pictures, read back from their artists; its board, trained, paused and begun again; its explorer, moved."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nano_runs import MIXTURE, NANO, all_state, assert_bit_equal, small_tokenizer

from dsv3_mini.course.pretrain_run import TOKENS, run_recipe, shipped_run
from dsv3_mini.errors import ConfigError, UserError
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.schedules import constant
from dsv3_mini.viz.figures.pretrain import (
    board_figure,
    by_layer,
    curve_of,
    favourites,
    plain,
    resume_figure,
    schedules_figure,
    specialisation_figure,
    unit_of,
)
from dsv3_mini.viz.figures.training import smooth
from dsv3_mini.viz.style import COLOURS, DOMAIN_COLOURS
from dsv3_mini.viz.widgets.page import EXPORT
from dsv3_mini.viz.widgets.pretrain import MODULE, POINTS, SHOWN, TrainingBoard, specialisation_explorer


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def step_line(step: int, mtp: bool = True) -> dict[str, Any]:
    layers = ("1", "2", "3") if mtp else ("1", "2")
    load = {layer: [step + 3 * expert + int(layer) for expert in range(4)] for layer in layers}
    vio = {layer: max(counts) * 4 / sum(counts) - 1 for layer, counts in load.items()}
    bias = {layer: [0.01 * (expert - 1) for expert in range(4)] for layer in layers}
    return {
        "kind": "step", "step": step, "tokens": 500 * step, "loss": 9.0 - step / 10, "mtp_loss": 8.5 if mtp else 0.0,
        "grad_norm": 3 / step, "learning_rate": 0.001 * step, "batch_size": 8, "gamma": 0.01, "mtp_lambda": 0.3,
        "load": load, "max_vio": vio, "bias": bias,
    }  # fmt: skip


def evaluation(tokens: int, **judged: float) -> dict[str, Any]:
    loss = {"stories": 8.0 - tokens / 5000, "sums": 7.0 - tokens / 5000}
    bits = {domain: value / 2 for domain, value in loss.items()}
    return {"kind": "evaluation", "tokens": tokens, "validation_loss": loss, "bits_per_byte": bits, "judged": judged}


STEPS = [step_line(step, mtp=step > 4) for step in range(1, 13)]
SCORES = [evaluation(tokens, sentences_well_formed=tokens / 12_000) for tokens in (0, 3000, 6000)]

# ---- schedules ---------------------------------------------------------------------------------------------------------


def test_schedules_are_drawn_to_the_recipes_end_with_upright_jumps() -> None:
    report, own = Recipe.preset("deepseek-v3"), Recipe.preset("tiny")
    figure = schedules_figure({"deepseek-v3": report, "tiny": own})
    assert "14.8 trillion tokens" in texts(figure) and f"{own.total_tokens / 1e6:g} million tokens" in texts(figure)
    for column, (recipe, unit) in enumerate(((report, 1e12), (own, 1e6))):
        for row, name in enumerate(("learning_rate", "batch_size", "gamma", "mtp_lambda")):
            axes, schedule = figure.axes[2 * row + column], getattr(recipe, name)
            (line,) = axes.lines
            curve = curve_of(schedule, recipe.total_tokens)
            assert list(line.get_xdata()) == [place / unit for place in curve.tokens]
            assert list(line.get_ydata()) == curve.values == [schedule(place) for place in curve.tokens]
    rate = curve_of(report.learning_rate, report.total_tokens)
    high = [value for value in rate.values if value == pytest.approx(2.2e-4)]
    assert len(high) > 200, "flat to 10T of 14.8T"
    end = report.learning_rate.pieces[3].until
    at = rate.tokens.index(end)
    assert rate.values[at] == 7.3e-6 and rate.values[at - 1] == pytest.approx(2.2e-5)
    assert rate.tokens[at - 1] == pytest.approx(end, rel=1e-8)
    assert (rate.tokens[0], rate.tokens[-1]) == (0, report.total_tokens) and rate.values[-1] == 7.3e-6


def test_units() -> None:
    assert [unit_of(n) for n in (14.8e12, 2.5e9, 20e6, 1e3, 3)] == [
        (1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1.0, "token"),
    ]  # fmt: skip


# ---- the board's picture -----------------------------------------------------------------------------------------------


def test_the_board_shows_the_lines_of_a_log() -> None:
    figure = board_figure(STEPS, SCORES, "A title", at=2, words="He said.\nYes")
    shown = texts(figure)
    assert "A title" in shown and "He said.¶Yes" in shown
    tokens = [line["tokens"] / 1000 for line in STEPS]
    raw, mean, mtp, stories, sums = panel(figure, "Loss").lines[:5]
    losses = [line["loss"] for line in STEPS]
    assert list(raw.get_ydata()) == losses and list(raw.get_xdata()) == tokens
    assert list(mean.get_ydata()) == pytest.approx(smooth(losses))
    assert list(mtp.get_xdata()) == tokens[4:], "it rests in the first four steps"
    assert list(stories.get_ydata()) == [8.0, 7.4, 6.8] and stories.get_color() == DOMAIN_COLOURS["stories"]
    assert list(sums.get_xdata()) == [0.0, 3.0, 6.0]
    assert list(panel(figure, "Held-out").lines[1].get_ydata()) == [3.5, 3.2, 2.9]
    assert list(panel(figure, "Judged").lines[0].get_ydata()) == [0.0, 25.0, 50.0]
    norm = panel(figure, "Gradient norm")
    assert norm.get_yscale() == "log" and list(norm.lines[0].get_ydata()) == [line["grad_norm"] for line in STEPS]
    assert list(norm.lines[2].get_ydata()) == [1.0, 1.0]
    assert list(panel(figure, "Learning rate").lines[0].get_ydata()) == [line["learning_rate"] for line in STEPS]
    imbalance = panel(figure, "Imbalance").lines
    assert [len(line.get_xdata()) for line in imbalance[:3]] == [12, 12, 8]
    assert all(axes.lines[-1].get_xdata()[0] == 1.5 for axes in (panel(figure, "Loss"), panel(figure, "Imbalance")))
    load, bias = panel(figure, "Load").images[0], panel(figure, "Bias").images[0]
    counts = np.array([STEPS[2]["load"][layer] for layer in ("1", "2")])
    np.testing.assert_allclose(load.get_array(), counts / counts.mean(1, keepdims=True))
    np.testing.assert_allclose(bias.get_array(), [STEPS[2]["bias"][layer] for layer in ("1", "2")])
    assert bias.get_clim() == (-0.02, 0.02)
    sizes = [text.get_fontsize() for text in figure.findobj(lambda a: hasattr(a, "get_fontsize")) if text.get_text()]
    assert min(sizes) >= 11


def test_the_board_can_be_drawn_before_the_first_step_and_without_biases() -> None:
    figure = board_figure([], [evaluation(0)], "Nothing yet")
    assert not panel(figure, "Load").images and "not logged" in texts(figure)
    given = board_figure(STEPS, [], "Given", bias={1: [0.5, -0.25, 0, 0]})
    assert panel(given, "Bias").images[0].get_array().shape == (1, 4) and panel(given, "Load").images[
        0
    ].get_array().shape == (3, 4)
    assert "it rests" not in texts(given)


def test_the_shipped_runs_log_can_be_drawn() -> None:
    lines = shipped_run()
    steps, scores = ([line for line in lines if line["kind"] == kind] for kind in ("step", "evaluation"))
    figure = board_figure(steps, scores, "The run", words=scores[-1]["sample"])
    assert len(panel(figure, "Judged").lines) == 3 and len(panel(figure, "Loss").lines) == 3 + 4
    assert set(by_layer(steps)) == {"1", "2", "3", "4"}


def test_text_that_no_font_has_becomes_dots() -> None:
    assert plain("a\nb é 書\x07$x$") == "a¶b · ··$x$"


# ---- resuming, and who serves whom -------------------------------------------------------------------------------------


def test_resumed_runs_are_drawn_as_differences() -> None:
    figure = resume_figure([5.0, 4.0, 3.0, 2.0], {"nothing": [3.0, 2.0], "all": [3.5, 2.75]}, 2)
    nothing, everything = figure.axes[0].lines[:2]
    assert list(nothing.get_ydata()) == [0.0, 0.0] and list(everything.get_ydata()) == [0.5, 0.75]
    assert list(everything.get_xdata()) == [3, 4]


def test_specialisation_shows_loads_and_shares_in_the_order_of_favourites() -> None:
    domains, load = ["stories", "sums"], torch.tensor([[2.0, 1.0, 0.5], [0.5, 1.0, 1.5]])
    shares = (load / load.sum(0)).numpy()
    assert favourites(shares) == [0, 1, 2] and favourites(shares[:, ::-1]) == [2, 1, 0]
    figure = specialisation_figure({"before": load, "after": load.flip(-1)}, domains, 3, by_favourite=True)
    assert "Layer 3" in texts(figure)
    before, after = panel(figure, "before"), panel(figure, "after")
    np.testing.assert_array_equal(before.images[0].get_array(), load.numpy())
    np.testing.assert_array_equal(after.images[0].get_array(), load.numpy())
    plain_order = specialisation_figure({"after": load.flip(-1)}, domains, 3, by_favourite=False)
    np.testing.assert_array_equal(panel(plain_order, "after").images[0].get_array(), load.flip(-1).numpy())
    below = figure.axes[2]
    heights = np.array([bar.get_height() for bar in below.patches]).reshape(2, 3)
    np.testing.assert_allclose(heights, 100 * shares, rtol=1e-5)
    np.testing.assert_allclose(heights.sum(0), 100, rtol=1e-5)


def test_the_explorer_moves_with_each_control() -> None:
    loads = {moment: torch.rand(4, 3, 8) + 0.1 for moment in ("before", "after")}
    explorer = specialisation_explorer(loads, ["stories", "sums", "code", "prose"], 1)
    assert_every_control_moves_the_picture_and_back(explorer, {"layer": 1, "sort": False})
    assert explorer.controls["layer"].max == 3 == explorer.values["layer"]


# ---- the board ---------------------------------------------------------------------------------------------------------


def small_recipe(tokens: int = 3000, **changes: Any) -> Recipe:
    return run_recipe(tokens).replace(mixture=MIXTURE, context=constant("context", 32), **changes)


@pytest.fixture
def board() -> Iterator[TrainingBoard]:
    board = TrainingBoard(cfg=NANO, recipe=small_recipe(), tokenizer=small_tokenizer())
    yield board
    board.pause()
    board.trainer.stream.close()


def state(board: TrainingBoard) -> dict[str, torch.Tensor]:
    return all_state(board.trainer)


def test_a_board_begins_with_a_measurement_and_no_step(board: TrainingBoard) -> None:
    steps, scores = board.history
    assert not steps and [line["tokens"] for line in scores] == [0] and board.status == "paused"
    assert set(scores[0]["bits_per_byte"]) == set(MIXTURE) and board.sample
    assert board.facts["total"] == 3000 and board.facts["clip"] == 1.0
    board.step()
    assert [line["step"] for line in board.history[0]] == [1] == [line["step"] for line in board.lines]


def test_training_in_slices_on_a_thread_and_at_once_come_to_the_same(board: TrainingBoard) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    board.train()
    assert torch.equal(torch.rand(3), expected), "the reader's random numbers stay as they were"
    assert board.ended and board.status == "ended" and board.speed == 0
    whole, (steps, scores) = state(board), board.history
    board.step()
    assert board.history[0] == steps, "after the end there is no step"
    board.reset()
    assert board.status == "paused" and not board.history[0] and board.history[1] == scores[:1]
    board.train(steps=2)
    board.start()
    assert board.status == "training" or board.ended
    time.sleep(0.1)
    board.pause()
    assert not board.training and board.status in ("paused", "ended")
    board.step()
    board.start()
    board.start()  # it trains already
    deadline = time.monotonic() + 60
    while board.training and time.monotonic() < deadline:
        time.sleep(0.02)
    assert board.ended and board.status == "ended"
    assert_bit_equal(state(board), whole)
    assert [{**line, "speed": 0} for line in board.history[0]] == [{**line, "speed": 0} for line in steps]
    assert board.history[1] == scores


def test_a_run_that_has_ended_begins_again(board: TrainingBoard) -> None:
    board.train()
    first = board.history[0][0]
    board._asked(board, {"do": "train"}, [])
    board._asked(board, {"do": "pause"}, [])
    assert board.history[0][:1] in ([], [first]) and not board.ended


def test_what_it_logs_is_what_the_trainer_reports_and_what_the_page_gets(board: TrainingBoard) -> None:
    board.train(steps=3)
    log = [json.loads(line) for line in (board.trainer.folder / "log.jsonl").read_text().splitlines()]
    logged = [line for line in log if line["kind"] == "step"]
    assert len(logged) == 3
    for line, own in zip(logged, board.history[0], strict=True):
        assert {name: line[name] for name in own if name != "bias"} == {k: v for k, v in own.items() if k != "bias"}
        assert not any("second" in name for name in own), "no clock in what is kept"
    biases = board.history[0][-1]["bias"]
    assert biases.keys() == {"1", "2", "3"} and any(any(row) for row in biases.values())
    assert board.lines == board.history[0] and board.measured == board.history[1]


def test_set_stands_on_a_step_and_changes_the_length(board: TrainingBoard) -> None:
    with pytest.raises(UserError, match="nothing was trained yet"):
        board.set(step=1)
    board.train(steps=4)
    pictures = [board.figure()]
    board.set(step=2)
    assert board.lines[board.at]["step"] == 2
    pictures.append(board.figure())
    load = [np.asarray(panel(figure, "Load").images[0].get_array()) for figure in pictures]
    assert not np.array_equal(*load)
    with pytest.raises(UserError, match=re.escape("step 9 is not there: steps 1 to 4 were taken")):
        board.set(step=9)
    board.train(steps=1)
    assert board.at == -1
    board.set(tokens=6000)
    assert board.recipe.total_tokens == board.facts["total"] == 6000 and not board.history[0]
    assert board.recipe.gamma.pieces[0].until == pytest.approx(2 * small_recipe().gamma.pieces[0].until)
    with pytest.raises(ConfigError):
        board.set(tokens=0)


def test_a_page_can_ask_for_everything_that_a_cell_can(board: TrainingBoard) -> None:
    board._asked(board, {"do": "step"}, [])
    assert len(board.history[0]) == 1
    board._asked(board, {"tokens": 4500}, [])
    assert board.facts["total"] == 4500 and not board.history[0]
    board._asked(board, {"do": "train"}, [])
    board._asked(board, {"do": "pause"}, [])
    assert not board.training
    board._asked(board, {"do": "reset"}, [])
    assert not board.history[0] and board.note == ""
    board._asked(board, {"tokens": -1}, [])
    assert "total_tokens" in board.note
    for nonsense in ({}, {"do": "fly"}, {"do": ["step"]}, "step", None, 3):
        board._asked(board, nonsense, [])
    assert not board.history[0]


def test_an_interrupted_step_goes_on_from_the_last_checkpoint(
    board: TrainingBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.train(steps=2)
    clip = board.trainer.optimizer.clip_gradients

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(board.trainer.optimizer, "clip_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        board.train(steps=1)
    assert board.trainer.step == 2 and board.status == "paused" and board.trainer.optimizer.clip_gradients is not clip
    board.train(steps=2)
    broken = state(board)
    board.reset()
    board.train(steps=4)
    assert_bit_equal(broken, state(board))


def test_a_run_that_diverges_says_so_on_the_page(board: TrainingBoard) -> None:
    board.train(steps=1)
    with torch.no_grad():
        board.trainer.model.lm_head.weight[0, 0] = float("nan")
    board.train(steps=1)
    assert "step 2" in board.note and "lm_head" in board.note and board.status == "paused"
    assert board.trainer.step == 1 and torch.isfinite(board.trainer.model.lm_head.weight).all()
    board.reset()
    assert board.note == ""


def test_it_shows_something_without_a_kernel_and_no_clock(board: TrainingBoard) -> None:
    empty = board._repr_mimebundle_()[0]["image/png"]
    board.train(steps=2)
    first, _ = board._repr_mimebundle_()
    assert base64.b64decode(first["image/png"]).startswith(b"\x89PNG") and first["image/png"] != empty
    assert "application/vnd.jupyter.widget-view+json" in first
    assert "after 2 steps" in first["text/plain"] and "8 experts" in board.alt
    board.reset()
    board.train(steps=2)
    assert board._repr_mimebundle_()[0]["image/png"] == first["image/png"], "the same run, the same picture"


def test_it_is_saved_as_one_page_that_needs_nothing_else(board: TrainingBoard, tmp_path: Path) -> None:
    board.train(steps=2)
    page = board.save_html(tmp_path / "board.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["board.html"]
    assert not re.findall(r"https?://", page) and not re.search(r"\b(src|href|import)\b *[=(\"']", page)
    assert page.count("</script>") == 1 and "export" not in page
    assert MODULE.read_text(encoding="utf-8").endswith(EXPORT)
    kept = json.loads(re.search(r"^const state = (.*);$", page, re.MULTILINE)[1])
    assert set(kept) == {*SHOWN, "speed"} and kept["lines"] == board.lines and kept["speed"] == 0


def test_the_page_gets_so_many_points_at_most(board: TrainingBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_mini.viz.widgets.pretrain.POINTS", 5)
    board.train(steps=12)
    assert len(board.lines) <= 5 < len(board.history[0]) == 12 and board.lines[-1]["step"] == 12
    assert POINTS >= 100 and COLOURS and TOKENS
