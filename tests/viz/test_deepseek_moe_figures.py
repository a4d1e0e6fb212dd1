"""Lesson 08's pictures, read back from their artists, and its gate explorer, moved as a reader would."""

from __future__ import annotations

import pytest
import torch
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dsv3_mini.course.next_byte import LADDER, Arrangement
from dsv3_mini.viz.figures.deepseek_moe import (
    SHARED,
    VISITED,
    gates_figure,
    ladder_figure,
    race_figure,
    sort_figure,
)
from dsv3_mini.viz.figures.routing import IDLE
from dsv3_mini.viz.style import COLOURS
from dsv3_mini.viz.widgets.deepseek_moe import LOGITS, PULLED, gate_explorer, logits_with


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_the_ladder_shows_every_expert_and_the_width_that_works() -> None:
    figure = ladder_figure(LADDER)
    boxes = {box.get_gid(): box for box in figure.axes[0].patches if box.get_gid()}
    assert len(boxes) == sum(a.routed + a.shared for a in LADDER)
    widths = {}
    for arrangement in LADDER:
        own = [boxes[f"{arrangement.name}-{i}"] for i in range(arrangement.routed + arrangement.shared)]
        colours = [to_hex(box.get_facecolor()) for box in own]
        assert (
            colours.count(to_hex(SHARED)) == arrangement.shared
            and colours[: arrangement.shared].count(to_hex(IDLE)) == 0
        )
        assert colours.count(to_hex(VISITED)) == arrangement.k
        widths[arrangement.name] = sum(box.get_width() for box in own if to_hex(box.get_facecolor()) != to_hex(IDLE))
    assert max(widths.values()) == pytest.approx(min(widths.values()))
    assert "10,518,300 ways to choose" in texts(figure) and "The same width" in texts(figure)
    odd = ladder_figure([LADDER[0], Arrangement("wide", expert=64, routed=4, k=2, shared=0)])
    assert "The same width" not in texts(odd)


def test_gates_figure_shows_both_affinities_and_normalised_gate_values() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    softmax, sigmoid, gates = gates_figure(logits, 2).axes
    assert [bar.get_height() for bar in softmax.patches] == pytest.approx(logits.softmax(-1).tolist())
    assert [bar.get_height() for bar in sigmoid.patches] == pytest.approx(logits.sigmoid().tolist())
    heights = [bar.get_height() for bar in gates.patches]
    for row, score in ((heights[:4], logits.softmax(-1)), (heights[4:], logits.sigmoid())):
        kept = [score[0].item(), 0.0, score[2].item(), 0.0]
        assert row == pytest.approx([value / sum(kept) for value in kept])


def test_the_sort_puts_rows_of_an_expert_side_by_side() -> None:
    chosen = torch.tensor([[2, 0], [1, 3], [0, 1]])
    figure = sort_figure(chosen, n_experts=5)
    named = {text.get_gid(): text.get_text() for text in figure.axes[0].texts if text.get_gid()}
    assert [named[f"by token-{i}"] for i in range(6)] == ["0", "0", "1", "1", "2", "2"]
    assert [named[f"by expert-{i}"] for i in range(6)] == ["0", "2", "1", "2", "0", "1"]
    lower = [to_hex(p.get_facecolor()) for p in figure.axes[0].patches if p.get_y() == 0]
    assert lower == [COLOURS[e].lower() for e in (0, 0, 1, 1, 2, 3)]
    assert "expert 4: nobody" in texts(figure)


def test_the_race_shows_what_is_saved_against_dense() -> None:
    losses = {"dense": [8.0] * 60, "a": [7.0] * 60, "b": [6.0] * 60}
    held_out = {"dense": {"x": 3.0, "y": 2.0}, "a": {"x": 2.5, "y": 2.1}, "b": {"x": 2.0, "y": 1.5}}
    curves, saved = race_figure(losses, held_out, "dense").axes
    assert [line.get_label() for line in curves.lines] == list(losses)
    assert {tuple(set(line.get_ydata())) for line in curves.lines} == {(8.0,), (7.0,), (6.0,)}
    assert [bar.get_height() for bar in saved.patches] == pytest.approx([0.5, -0.1, 1.0, 0.5])
    assert saved.patches[0].get_facecolor()[:3] != saved.patches[2].get_facecolor()[:3]


def test_every_control_of_the_gate_explorer_moves_the_picture_and_back() -> None:
    assert_every_control_moves_the_picture_and_back(gate_explorer(), {"pulled": 3.0, "shift": 2.0, "k": 5})


def test_the_pulled_logit_is_the_one_that_moves() -> None:
    assert logits_with(LOGITS[PULLED], 0.0).tolist() == pytest.approx(list(LOGITS))
    moved = logits_with(3.0, 1.0) - logits_with(LOGITS[PULLED], 1.0)
    assert moved.nonzero().flatten().tolist() == [PULLED]
    assert (logits_with(0.0, 1.5) - logits_with(0.0, 0.0)).tolist() == pytest.approx([1.5] * len(LOGITS))


@pytest.mark.parametrize(
    "figure",
    [ladder_figure(LADDER), gates_figure(torch.tensor(LOGITS), 3), sort_figure(torch.tensor([[0, 1], [1, 2]]), 3)],
    ids=["ladder", "gates", "sort"],
)
def test_words_are_large_enough(figure: Figure) -> None:
    said = figure.findobj(lambda artist: hasattr(artist, "get_fontsize") and artist.get_text())
    assert min(text.get_fontsize() for text in said) >= 11
