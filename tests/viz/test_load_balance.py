"""Lesson 09's pictures, read back from their artists; its player and its race, moved as a reader would."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dsv3_mini.course.balance_runs import EVERY, MOST, RACE, WAYS, Film, Frame, Recording, Score, recorded
from dsv3_mini.errors import UserError
from dsv3_mini.train.balance import max_violation
from dsv3_mini.viz.figures.load_balance import Curve, player_figure, race_figure, sequences_figure, strips_figure
from dsv3_mini.viz.style import COLOURS, LOAD_MAP
from dsv3_mini.viz.widgets import load_balance as widgets
from dsv3_mini.viz.widgets.load_balance import (
    MODULE,
    SHADES,
    WINDOW,
    LoadBalancePlayer,
    balance_race,
    curve_of,
    curve_of_frames,
    loss_range,
)
from dsv3_mini.viz.widgets.page import EXPORT

EXPERTS, FRAMES = 4, 6


def film(gamma: float, alpha: float) -> Film:
    moves = torch.randint(-1, 2, (FRAMES, 2, EXPERTS)).cumsum(0)
    load = torch.randint(1, 90, (FRAMES, 2, EXPERTS))
    return Film(gamma, alpha, 3 + torch.rand(FRAMES), load, gamma * moves, Score(3 + gamma, 1 - gamma, 2.0, 0.5))


@pytest.fixture
def recording(seed: int) -> Recording:
    return Recording(tuple(film(gamma, alpha) for gamma in (0.0, 0.01, 0.1) for alpha in (0.0, 0.5)), ())


@pytest.fixture
def player(recording: Recording) -> LoadBalancePlayer:
    return LoadBalancePlayer(recording)


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


# ---- figures -----------------------------------------------------------------------------------------------------------


def test_strips_show_every_share_of_every_run() -> None:
    shares = {"one": torch.rand(5, 3), "other": torch.rand(5, 3)}
    figure = strips_figure(shares, 4.0, "A title")
    for axes, (name, share) in zip(figure.axes, shares.items(), strict=False):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), share.T.numpy())
        assert axes.get_title(loc="left") == name and image.get_clim() == (0, 4.0)
        assert list(image.get_extent()) == [0, 5 * EVERY, -0.5, 2.5] and image.origin == "lower"
    assert "A title" in texts(figure) and "even share" in texts(figure)


def test_race_shows_own_runs_over_recorded_ones_in_the_same_colours() -> None:
    before = {name: Curve([1.0, 2.0], [3.0, 2.0], [6.0, 5.0]) for name in ("a", "b")}
    own = {"a": Curve([1.0], [2.5], [5.5]), "b": Curve([], [], [])}
    balance, loss = race_figure(own, before, 100, 3.0).axes[:2]
    for axes, field in ((balance, "max_vio"), (loss, "loss")):
        lines = axes.lines
        assert [list(line.get_ydata()) for line in lines[::2]] == [getattr(before[name], field) for name in before]
        assert [list(line.get_ydata()) for line in lines[1::2]] == [getattr(own[name], field) for name in before]
        assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
        assert lines[0].get_alpha() < 1 and axes.get_xlim()[1] >= 100
        assert axes.get_xlabel() == "step" and axes.get_ylabel()
    longer = race_figure({"a": Curve([200.0], [1.0], [4.0])}, before, 100, 3.0)
    assert longer.axes[0].get_xlim()[1] >= 200


def test_sequences_stand_above_the_row_of_all_of_them() -> None:
    loads = {"one": torch.randint(1, 9, (3, 4)).float(), "other": torch.randint(1, 9, (3, 4)).float()}
    figure = sequences_figure(loads, "A title")
    for name, load in loads.items():
        above = panel(figure, name)
        below = figure.axes[figure.axes.index(above) + len(loads)]
        np.testing.assert_allclose(above.images[0].get_array(), load / load.mean(-1, keepdim=True), rtol=1e-6)
        whole = load.sum(0)
        np.testing.assert_allclose(below.images[0].get_array()[0], whole / whole.mean(), rtol=1e-6)
        assert above.images[0].get_clim() == below.images[0].get_clim()


def test_a_moment_of_the_film_shows_that_moment(recording: Recording) -> None:
    shown, plain = recording.film(0.1, 0.5), recording.film(0.0)
    figure = player_figure(shown, plain, 1, "layer 2", 3, MOST, (2.0, 5.0))
    load, bias = panel(figure, "Load"), panel(figure, "Bias")
    share = [count * EXPERTS / int(shown.load[3, 1].sum()) for count in shown.load[3, 1].tolist()]
    assert [bar.get_height() for bar in load.patches] == pytest.approx(share)
    assert [bar.get_height() for bar in bias.patches] == pytest.approx(shown.bias[3, 1].tolist())
    assert [to_hex(bar.get_facecolor()) for bar in load.patches] == [c.lower() for c in COLOURS[:EXPERTS]]
    vio, loss = panel(figure, "MaxVio"), panel(figure, "Loss")
    grey, own = vio.lines[:2]
    assert list(own.get_ydata()) == pytest.approx([max_violation(row) for row in shown.load[:, 1]])
    assert list(grey.get_ydata()) == pytest.approx([max_violation(row) for row in plain.load[:, 1]])
    assert list(own.get_xdata()) == [EVERY * (i + 1) for i in range(FRAMES)]
    assert list(loss.lines[1].get_ydata()) == pytest.approx(shown.loss.tolist())
    strip = panel(figure, "Load of the whole run")
    np.testing.assert_allclose(strip.images[0].get_array(), shown.share[:, 1].T, rtol=1e-6)
    for axes in (strip, vio, loss):
        assert axes.lines[-1].get_xdata()[0] == pytest.approx(3 * EVERY + EVERY / 2), "in the middle of its frame"
    title = figure.get_suptitle()
    assert f"gamma = 0.1, alpha = 0.5, layer 2, step {4 * EVERY}" in title
    assert f"MaxVio {max_violation(shown.load[3, 1]):.2f}" in title
    assert min(text.get_fontsize() for axes in figure.axes for text in axes.get_xticklabels()) >= 11


# ---- the player --------------------------------------------------------------------------------------------------------


def test_the_player_chooses_among_runs(player: LoadBalancePlayer, recording: Recording) -> None:
    assert player.film is recording.film(0.0, 0.0) and player.frame == FRAMES - 1
    player.set(gamma=0.1, alpha=0.5, layer=2, frame=2)
    assert player.film is recording.film(0.1, 0.5)
    assert player.max_vio == pytest.approx(max_violation(player.film.load[2, 1]))
    player.set(frame=-1)
    assert player.frame == FRAMES - 1
    for moves, words in (
        ({"gamma": 0.5}, "gamma = 0.5 was not recorded: choose 0, 0.01, 0.1"),
        ({"alpha": 3.0}, "alpha = 3 was not recorded"),
        ({"layer": 0}, "layer = 0 was not recorded: choose 1, 2"),
        ({"frame": FRAMES}, f"frame = {FRAMES}: the film has {FRAMES} frames"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            player.set(**moves)
    assert player.film is recording.film(0.1, 0.5)


def test_every_control_moves_the_picture(player: LoadBalancePlayer) -> None:
    pictures = [player._repr_mimebundle_()[0]["image/png"]]
    for moves in ({"gamma": 0.1}, {"alpha": 0.5}, {"layer": 2}, {"frame": 1}):
        player.set(**moves)
        data, _ = player._repr_mimebundle_()
        pictures.append(data["image/png"])
    assert len(set(pictures)) == 5
    assert base64.b64decode(pictures[0]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"].startswith("Load balance player, gamma 0.1 and alpha 0.5") and "layer 2" in player.alt


def test_what_the_page_gets_is_the_films(player: LoadBalancePlayer, recording: Recording) -> None:
    assert len(player.films) == 6
    for sent, one in zip(player.films, recording.films, strict=True):
        assert (sent["gamma"], sent["alpha"]) == (one.gamma, one.alpha)
        assert sent["load"] == one.load.tolist()
        moved = np.array(sent["moves"]) * one.gamma
        np.testing.assert_allclose(moved, one.bias.numpy(), atol=1e-6)
    assert player.facts["gammas"] == [0.0, 0.01, 0.1] and player.facts["layers"] == [1, 2]
    least, largest = player.facts["losses"]
    assert all(least < loss < largest for one in recording.films for loss in one.loss.tolist())
    assert (least, largest) == loss_range(recording.films)
    shades = matplotlib.colormaps[LOAD_MAP]
    assert (
        len(player.ramp) == SHADES and player.ramp[0] == to_hex(shades(0.0)) and player.ramp[-1] == to_hex(shades(1.0))
    )


def test_it_is_saved_as_one_page_that_needs_nothing_else(player: LoadBalancePlayer, tmp_path: Path) -> None:
    player.set(gamma=0.01, frame=2)
    page = player.save_html(tmp_path / "player.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["player.html"]
    assert not re.findall(r"https?://", page) and not re.search(r"\b(src|href|import)\b *[=(\"']", page)
    assert page.count("</script>") == 1 and "export" not in page
    assert MODULE.read_text(encoding="utf-8").endswith(EXPORT)
    state = json.loads(re.search(r"^const state = (.*);$", page, re.MULTILINE)[1])
    assert state["films"] == player.films and (state["gamma_at"], state["frame"]) == (1, 2)


def test_the_shipped_films_make_a_page_of_a_reasonable_size(tmp_path: Path) -> None:
    player = LoadBalancePlayer()
    assert player.save_html(tmp_path / "player.html").stat().st_size < 1_500_000
    assert player.recording is recorded()
    assert len(player._repr_mimebundle_()[0]["image/png"]) < 150_000


# ---- the race ----------------------------------------------------------------------------------------------------------


def test_points_of_a_curve_are_windows_of_steps() -> None:
    loss, load = torch.tensor([4.0, 2.0, 3.0, 1.0, 9.0]), torch.randint(1, 9, (5, 2, 3))
    curve = curve_of(loss, load, 2, 10)
    assert curve.steps == [10.0, 30.0] and curve.loss == pytest.approx([3.0, 2.0])
    for point, pair in zip(curve.max_vio, (load[:2], load[2:4]), strict=True):
        assert point == pytest.approx(sum(max_violation(pair[:, layer].sum(0)) for layer in (0, 1)) / 2)
    frames = [Frame(i + 1, 1.0, torch.randint(1, 9, (2, 3)), torch.zeros(2, 3)) for i in range(WINDOW + 1)]
    assert curve_of_frames(frames).steps == [WINDOW / 2]
    assert curve_of_frames(frames[:3]) == curve_of_frames([]) == Curve([], [], [])


def test_race_trains_three_models_in_turn_from_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(widgets, "race_figure", lambda *given: shown.append(given) or Figure(figsize=(1, 1)))
    race = balance_race()
    curves, before, *_ = shown[-1]
    assert list(race.models) == list(RACE) == list(before) and not any(curve.steps for curve in curves.values())
    for name, curve in before.items():
        film = recorded().film(WAYS[name].gamma, WAYS[name].alpha)
        assert curve.loss[0] == pytest.approx(film.loss[: WINDOW // EVERY].mean().item())
    race.train(WINDOW)
    assert [len(frames) for frames in race.frames.values()] == [WINDOW] * 3
    first = [frames[0].loss for frames in race.frames.values()]
    assert first[0] == pytest.approx(first[1]) == pytest.approx(first[2]), "nothing has moved before the first step"
    biased = {name: bool(frames[-1].bias.any()) for name, frames in race.frames.items()}
    assert biased == {name: WAYS[name].gamma > 0 for name in RACE}
    assert all(len(curve.steps) == 1 for curve in shown[-1][0].values())
    assert "left alone" in race.alt and "Train 40 more steps" in race.button.description
