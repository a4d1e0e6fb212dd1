"""Lesson 18's pictures, read back from their artists; the collective player, moved as a reader would."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, Rectangle

from dsv3_mini.course.rounds import FILMS, State
from dsv3_mini.errors import UserError
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.collectives import collectives_figure, memory_figure, moment_figure, times_figure
from dsv3_mini.viz.style import COLOURS
from dsv3_mini.viz.widgets.collectives import MODULE, RANKS, CollectivePlayer
from dsv3_mini.viz.widgets.page import EXPORT


def seen(axes: Axes, ranks: int) -> list[list[tuple[int | None, list[int]]]]:
    """What is drawn in each place: its digit and the ranks whose colours are there, from left to right."""
    stripes: dict[str, list[Rectangle]] = {}
    for patch in axes.patches:
        if patch.get_gid():
            stripes.setdefault(patch.get_gid(), []).append(patch)
    digits = {(int(text.get_position()[1]), int(text.get_position()[0])): int(text.get_text()) for text in axes.texts}
    rows = []
    for rank in range(ranks):
        row = []
        for place in range(ranks):
            own = sorted(stripes.get(f"{rank}:{place}", []), key=Rectangle.get_x)
            assert all(place < s.get_x() < place + 1 and rank < s.get_y() < rank + 1 for s in own)
            colours = [COLOURS.index(to_hex(s.get_facecolor()).upper()) for s in own]
            row.append((digits.get((rank, place)), colours))
        rows.append(row)
    return rows


def meant(state: State) -> list[list[tuple[int | None, list[int]]]]:
    return [[(piece.number if piece.ranks else None, list(piece.ranks)) for piece in row] for row in state]


def test_each_collective_is_drawn_before_and_after() -> None:
    films = [make(4) for make in FILMS.values()]
    figure = collectives_figure(films)
    for column, film in enumerate(films):
        before, after = figure.axes[column], figure.axes[column + len(films)]
        assert before.get_title(loc="left") == film.name
        assert seen(before, 4) == meant(film.start)
        assert seen(after, 4) == meant(film.state(len(film.rounds)))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [f"rank {r}" for r in range(4)]


@pytest.mark.parametrize("name", list(FILMS))
def test_a_moment_shows_state_messages_and_bytes(name: str) -> None:
    film = FILMS[name](5)
    for number in (0, 2, len(film.rounds)):
        places, bars = moment_figure(film, number).axes
        assert seen(places, 5) == meant(film.state(number))
        arrows = [patch for patch in places.patches if isinstance(patch, FancyArrowPatch)]
        moves = film.rounds[number] if number < len(film.rounds) else ()
        assert len(arrows) == len(moves)
        for arrow, move in zip(arrows, moves, strict=True):
            ends = ((move.piece + 0.5, move.source + 0.5), (move.place + 0.5, move.target + 0.5))
            assert tuple(map(tuple, arrow._posA_posB)) == ends
        assert [bar.get_width() * 5 for bar in bars.patches] == pytest.approx(film.sent(number))
        assert bars.get_xlim()[1] >= max(film.sent(len(film.rounds))) / 5, "the axis stays as it is"


def test_times_are_drawn_in_microseconds() -> None:
    axes = times_figure({"ring": {10: 1e-6, 1000: 5e-6}, "other": {10: 2e-6, 1000: 1e-5}}, "A title").axes[0]
    assert [line.get_label() for line in axes.lines] == ["ring", "other"]
    assert list(axes.lines[1].get_xdata()) == [10, 1000]
    assert list(axes.lines[1].get_ydata()) == pytest.approx([2, 10])
    assert len({line.get_marker() for line in axes.lines}) == 2, "not by colour alone"
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_title(loc="left")) == ("log", "log", "A title")


def test_memory_bars_add_up() -> None:
    held = {
        "whole": {"weights": 20e9, "gradients": 20e9, "optimizer": 120e9},
        "shared": {"weights": 20e9, "gradients": 20e9, "optimizer": 1.5e9},
    }
    axes = memory_figure(held, 80e9, "A title").axes[0]
    starts, widths = [bar.get_x() for bar in axes.patches], [bar.get_width() for bar in axes.patches]
    assert starts == pytest.approx([0, 0, 20, 20, 40, 40]) and widths == pytest.approx([20, 20, 20, 20, 120, 1.5])
    said = [text.get_text() for text in axes.texts]
    assert said == ["160.0 GB", "41.5 GB", " a GPU has 80 GB"]
    assert list(axes.lines[0].get_xdata()) == [80, 80] and axes.get_ylim()[0] > axes.get_ylim()[1], "the first on top"


# ---- the player --------------------------------------------------------------------------------------------------------


@pytest.fixture
def player() -> CollectivePlayer:
    return CollectivePlayer()


def test_the_player_chooses_among_films(player: CollectivePlayer) -> None:
    assert (player.film, player.moment) == (FILMS["broadcast"](4), 0)
    player.set(name="all-reduce", ranks=8, moment=14)
    assert player.film == FILMS["all-reduce"](8)
    player.set(name="all-gather")
    assert player.moment == 7, "that film is shorter"
    for moves, words in (
        ({"name": "all-for-one"}, "collective = 'all-for-one' is not in the player: choose broadcast, all-gather"),
        ({"ranks": 7}, "ranks = 7 is not in the player: choose 4, 5, 6, 8"),
        ({"moment": 8}, "moment = 8 must lie between 0 and 7, the rounds of all-gather"),
    ):
        with pytest.raises(UserError, match=words):
            player.set(**moves)


def test_every_control_changes_its_still_picture(player: CollectivePlayer) -> None:
    pictures = []
    for moves in ({}, {"name": "all-to-all"}, {"ranks": 6}, {"moment": 2}):
        player.set(**moves)
        data, _ = player._repr_mimebundle_()
        pictures.append(data["image/png"])
    assert len(set(pictures)) == 4 and base64.b64decode(pictures[0]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"] == (
        "Collective player, all-to-all on 6 ranks, after round 2 of 6: the busiest rank has sent 0.33 sizes of its tensor."
    )
    assert len(png(player.figure())) < 150_000


def test_what_the_page_gets_is_the_films(player: CollectivePlayer) -> None:
    assert len(player.films) == len(FILMS) * len(RANKS)
    for sent in player.films:
        film = FILMS[sent["name"]](sent["ranks"])
        assert len(sent["states"]) == len(sent["sent"]) == len(film.rounds) + 1
        for number, state in enumerate(sent["states"]):
            assert state == [[[p.number, list(p.ranks)] for p in row] for row in film.state(number)]
            assert sent["sent"][number] == film.sent(number)
        assert [[tuple(m) for m in moves] for moves in sent["rounds"]] == [
            [(m.source, m.piece, m.target, m.place) for m in moves] for moves in film.rounds
        ]
        assert sent["leaves"] == [moves[0].leaves for moves in film.rounds] and sent["lengths"] == film.lengths


def test_it_is_saved_as_one_page_that_needs_nothing_else(player: CollectivePlayer, tmp_path: Path) -> None:
    player.set(name="all-reduce", moment=2.5)
    path = player.save_html(tmp_path / "player.html")
    page = path.read_text(encoding="utf-8")
    assert [each.name for each in tmp_path.iterdir()] == ["player.html"] and path.stat().st_size < 500_000
    assert not re.findall(r"https?://", page) and not re.search(r"\b(src|href|import)\b *[=(\"']", page)
    assert page.count("</script>") == 1 and "export" not in page
    assert MODULE.read_text(encoding="utf-8").endswith(EXPORT)
    state = json.loads(re.search(r"^const state = (.*);$", page, re.MULTILINE)[1])
    assert state["films"] == player.films and (state["film_at"], state["moment"]) == (3, 2.5)


def test_matplotlibs_settings_stay_as_they_were() -> None:
    before = dict(matplotlib.rcParams)
    moment_figure(FILMS["all-reduce"](4), 1)
    assert dict(matplotlib.rcParams) == before
