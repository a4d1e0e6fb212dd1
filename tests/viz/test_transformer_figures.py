"""Lesson 04's pictures, read back from their artists; its widgets, moved as a reader would."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
import torch
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.figure import Figure

from dsv3_mini.course.baseline import Baseline, BaselineShape, Signal, Step, story_batches, train_steps
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.viz.figures.transformer import (
    RECORDED_EVERY,
    attention_figure,
    decoder_figure,
    loss_figure,
    signal_figure,
)
from dsv3_mini.viz.widgets import transformer as widgets
from dsv3_mini.viz.widgets.transformer import (
    ARRANGEMENTS,
    MASKS,
    RECORDED,
    WORDS,
    LiveRun,
    first_run,
    mask_explorer,
    residual_race,
    stream_explorer,
    weights_by_mask,
)


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# ---- figures -----------------------------------------------------------------------------------------------------------


def test_decoder_figure_names_its_parts_and_numbers() -> None:
    shown = texts(decoder_figure(7, 320))
    for word in ("embedding", "attention", "SwiGLU", "norm", "head", "× 7 layers", "320 numbers"):
        assert word in shown


def test_attention_figure_shows_the_weights_and_one_row_as_bars() -> None:
    weights = torch.rand(4, 4)
    whole, one = attention_figure(list("wxyz"), weights, 1).axes[:2]
    np.testing.assert_array_equal(whole.images[0].get_array(), weights.numpy())
    assert [bar.get_height() for bar in one.patches] == pytest.approx(weights[1].tolist())
    colours = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in one.patches]
    assert colours[0] == colours[1] != colours[2] == colours[3], "later words stand out"
    title = one.get_title(loc="left")
    assert "'x'" in title and f"sum {weights[1].sum():.2f}, {weights[1, 2:].sum():.2f} on later" in title


def test_signal_figure_draws_every_number_and_the_chosen_one_last() -> None:
    signals = {name: Signal(*(torch.rand(5).add(0.1).tolist() for _ in range(3))) for name in ("a", "b", "c")}
    figure = signal_figure(signals, "b")
    for axes, field in zip(figure.axes, ("size", "likeness", "gradient"), strict=True):
        drawn = {tuple(line.get_ydata()) for line in axes.lines}
        assert drawn == {tuple(getattr(signal, field)) for signal in signals.values()}
        bold = axes.lines[-1]
        assert tuple(bold.get_ydata()) == tuple(getattr(signals["b"], field))
        assert bold.get_linewidth() > axes.lines[0].get_linewidth()
    assert "b" in texts(figure)


def test_loss_figure_shows_recorded_and_own_curves_and_what_is_written() -> None:
    figure = loss_figure({"net": [5.0, 4.0, 3.5]}, {"net": [4.5, 3.0]}, 500, 20, "It falls", "Nora had a lamp.")
    axes = figure.axes[0]
    nothing, recorded, own = axes.lines
    assert set(nothing.get_ydata()) == {math.log(500)}
    assert list(recorded.get_xdata()) == [RECORDED_EVERY * 0.5, RECORDED_EVERY * 1.5]
    assert list(recorded.get_ydata()) == [4.5, 3.0]
    assert list(own.get_xdata()) == [1, 2, 3] and list(own.get_ydata()) == [5.0, 4.0, 3.5]
    assert "Nora had a lamp." in texts(figure) and axes.get_xlim()[1] >= 20
    longer = loss_figure({"net": [5.0] * 50}, {}, 500, 20, "It falls")
    assert longer.axes[0].get_xlim()[1] >= 50


# ---- explorers ---------------------------------------------------------------------------------------------------------


def test_each_mask_does_what_its_name_says() -> None:
    scores = torch.randn(6, 6)
    later = torch.ones(6, 6).triu(1) > 0
    right, zeros, after, none = (weights_by_mask(scores, mask) for mask in MASKS)
    for s in range(6):
        parts = [math.exp(z) for z in scores[s, : s + 1].tolist()]
        assert right[s].tolist() == pytest.approx([p / sum(parts) for p in parts] + [0.0] * (5 - s), abs=1e-6)
    assert (zeros[later] > 0).all() and torch.allclose(zeros.sum(-1), torch.ones(6))
    assert not after[later].any() and (after.sum(-1)[:-1] < 1).all()
    torch.testing.assert_close(none, scores.softmax(-1))


@pytest.mark.parametrize(
    "make, moves",
    [
        (mask_explorer, {"width": 64, "scaled": False, "mask": MASKS[2], "query": 7}),
        (stream_explorer, {"arrangement": list(ARRANGEMENTS)[2], "layers": 4, "scale": 2.0}),
    ],
)
def test_every_control_moves_the_picture_and_back(make: Any, moves: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    assert_every_control_moves_the_picture_and_back(make(), moves)
    assert torch.equal(torch.get_rng_state(), state), "the reader's random numbers are his own"


def test_explorers_draw_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(widgets, "attention_figure", lambda *given: shown.append(given) or Figure())
    explorer = mask_explorer()
    explorer.set(query=3)
    words, weights, query = shown[-1]
    assert words == WORDS and query == 2
    assert torch.allclose(weights.sum(-1), torch.ones(len(WORDS))) and not weights.triu(1).any()
    explorer.set(scaled=False, width=256)
    assert shown[-1][1].max(-1).values.mean() > 0.95, "without its root a wide head sees one word"
    explorer.set(scaled=True)
    assert shown[-1][1].max(-1).values[1:].mean() < 0.8

    monkeypatch.setattr(widgets, "signal_figure", lambda *given: shown.append(given) or Figure())
    explorer = stream_explorer()
    explorer.set(layers=20)
    signals, name = shown[-1]
    assert name == explorer.values["arrangement"] and signals.keys() == ARRANGEMENTS.keys()
    ours, _, bare = (signals[name] for name in ARRANGEMENTS)
    assert len(ours.size) == 21 and ours.size[-1] > ours.size[0]
    assert bare.likeness[-1] > 0.9 > ours.likeness[-1]


# ---- a run, live -------------------------------------------------------------------------------------------------------


def counting(losses: list[float], began: list[int]) -> Any:
    def begin() -> Iterator[Step]:
        began.append(1)
        for loss in losses:
            yield Step(0, loss, 0)

    return begin


def test_live_run_redraws_in_place_while_it_trains() -> None:
    drawn: list[dict[str, list[float]]] = []

    def draw(curves: Mapping[str, Sequence[float]]) -> Figure:
        drawn.append({name: list(losses) for name, losses in curves.items()})
        figure = Figure(figsize=(1, 1))
        figure.text(0, 0, str(sum(map(len, curves.values()))))
        return figure

    began: list[int] = []
    run = LiveRun(
        {"a": counting([3.0, 2.0, 1.0] * 9, began), "b": counting([9.0] * 27, began)}, draw, "alt", 12, every=5
    )
    assert began == [], "nothing begins before the button"
    picture, first = run.picture, run.picture.value
    run.button.click()
    assert run.picture is picture and picture.value != first
    assert [len(curves["a"]) for curves in drawn] == [0, 5, 10, 12]
    assert drawn[1] == {"a": [3.0, 2.0, 1.0, 3.0, 2.0], "b": [9.0] * 5}
    assert not run.button.disabled and run.button.description == "Train 12 more steps"
    run.train(3)
    assert len(run.losses["a"]) == len(run.losses["b"]) == 15 and len(began) == 2, "it goes on, it does not begin again"
    data, _ = run._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == picture.value and data["text/plain"] == "alt"
    assert "application/vnd.jupyter.widget-view+json" in data


def test_an_interrupted_run_shows_how_far_it_came_and_can_go_on() -> None:
    began: list[int] = []

    def begin() -> Iterator[Step]:
        began.append(1)
        yield Step(1, 5.0, 0)
        if len(began) == 1:
            raise KeyboardInterrupt
        yield Step(2, 4.0, 0)

    run = LiveRun({"a": begin}, lambda curves: Figure(figsize=(1, 1)), "alt", 2)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.losses == {"a": [5.0]} and not run.button.disabled
    run.train()
    assert run.losses == {"a": [5.0, 5.0, 4.0]}


def test_first_run_shows_the_recorded_curve_and_then_what_the_model_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(widgets, "loss_figure", lambda *given: shown.append(given) or Figure(figsize=(1, 1)))
    run = first_run(counting([6.0, 5.0, 4.0], []), lambda: "a tale", 4096, steps=3)
    curves, recorded, vocab_size, _, _, written = shown[-1]
    assert curves == {"loss": []} and recorded == {"loss": RECORDED["with the stream"]} and vocab_size == 4096
    assert widgets.RECORDED_TEXT in written
    run.train()
    assert shown[-1][0] == {"loss": [6.0, 5.0, 4.0]} and shown[-1][5] == "after 3 steps it writes: a tale"


def test_race_shows_the_other_run_only_as_far_as_this_one_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(widgets, "loss_figure", lambda *given: shown.append(given) or Figure(figsize=(1, 1)))
    race = residual_race([5.0, 4.0, 3.0, 2.0], counting([5.5] * 9, []), 4096, steps=10)
    assert shown[-1][0] == {"with the stream": [], "without it": []}
    assert {name: len(values) for name, values in shown[-1][1].items()} == {"with the stream": 2, "without it": 2}
    race.train(3)
    assert shown[-1][0] == {"with the stream": [5.0, 4.0, 3.0], "without it": [5.5] * 3}


def test_recorded_curve_is_still_how_it_goes() -> None:
    torch.manual_seed(0)
    model, batches = Baseline(BaselineShape()), story_batches(Tokenizer.shipped())
    steps = train_steps(model, batches)
    losses = [next(steps).loss for _ in range(3 * RECORDED_EVERY)]
    batches.close()
    means = [sum(losses[i : i + RECORDED_EVERY]) / RECORDED_EVERY for i in range(0, len(losses), RECORDED_EVERY)]
    assert means == pytest.approx(RECORDED["with the stream"][:3], abs=0.3)
    assert all(len(values) == 20 for values in RECORDED.values())
