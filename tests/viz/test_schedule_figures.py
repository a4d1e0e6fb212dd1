"""Pictures of schedules read back from their artists; the player, moved as a reader would."""

from __future__ import annotations

import base64
import json
import re
from itertools import product
from pathlib import Path

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsv3_mini.errors import UserError
from dsv3_mini.parallel.schedule_costs import ChunkCosts, Part, PhaseCosts
from dsv3_mini.parallel.schedule_simulator import Timeline, simulate
from dsv3_mini.parallel.schedules import SCHEDULES, make_schedule
from dsv3_mini.parallel.schedules.dualpipe import dualpipe, dualpipev
from dsv3_mini.parallel.schedules.interleaved import interleaved
from dsv3_mini.parallel.schedules.one_f_one_b import one_f_one_b
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.schedule import (
    HIGH,
    IDLE,
    PHASE_COLOURS,
    SMALLEST,
    boxes,
    colour_of,
    lighter,
    overlap_figure,
    schedule_figure,
    shares_figure,
)
from dsv3_mini.viz.style import COLOURS
from dsv3_mini.viz.widgets.page import EXPORT
from dsv3_mini.viz.widgets.schedule_player import COSTS, LAYERS, MODULE, RANKS, ROUNDS, SchedulePlayer, costs_of


def drawn(axes: Axes) -> dict[str, Rectangle]:
    return {patch.get_gid(): patch for patch in axes.patches if patch.get_gid()}


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# ---- figures -----------------------------------------------------------------------------------------------------------


def test_every_op_is_drawn_where_and_when_it_runs() -> None:
    timelines = [simulate(dualpipe(4, 8)), simulate(interleaved(4, 8))]
    figure = schedule_figure(*timelines)
    longest = max(timeline.span for timeline in timelines)
    for row, timeline in enumerate(timelines):
        axes = figure.axes[2 * row]
        found, schedule = drawn(axes), timeline.schedule
        assert axes.get_ylim() == (4, 0) and longest <= axes.get_xlim()[1] < 1.01 * longest
        ops = 0
        for rank, slots in enumerate(schedule.order):
            for number, slot in enumerate(slots):
                for place, op in enumerate(slot.ops):
                    box = found[f"{rank}:{op}"]
                    assert box.get_x() == timeline.start[rank][number]
                    assert box.get_x() + box.get_width() == timeline.end[rank][number]
                    assert box.get_height() == pytest.approx(HIGH / len(slot.ops))
                    assert rank < box.get_y() < box.get_y() + box.get_height() < rank + 1
                    assert (box.get_y() > rank + 0.4) == (place == 1), "a pair's forward above its backward"
                    assert to_hex(box.get_facecolor()) == colour_of(schedule, op).lower()
                    ops += 1
        assert len(found) == ops + 4, "and four rows behind them"
        assert f"bubble {timeline.bubble:g} " in axes.get_title(loc="left")


def test_the_bubble_is_what_stays_grey() -> None:
    timeline = simulate(one_f_one_b(3, 4))
    found = drawn(schedule_figure(timeline).axes[0])
    for rank in range(3):
        row = found.pop(f"row-{rank}")
        assert (to_hex(row.get_facecolor()), row.get_x(), row.get_width()) == (IDLE.lower(), 0, timeline.span)
        covered = sum(box.get_width() for name, box in found.items() if name.startswith(f"{rank}:"))
        assert row.get_width() - covered == timeline.idle(rank)


def test_second_stages_and_the_other_direction_are_lighter() -> None:
    for schedule, light in (
        (dualpipe(4, 8), lambda op: op.direction == 1),
        (dualpipev(4, 8), lambda op: op.stage >= 4),
        (interleaved(2, 4, 4), lambda op: op.stage in (2, 3, 6, 7)),
        (one_f_one_b(4, 4), lambda op: False),
    ):
        for box in boxes(simulate(schedule)):
            plain = PHASE_COLOURS[box.op.phase]
            assert colour_of(schedule, box.op) == (lighter(plain) if light(box.op) else plain)


def test_colours_can_be_told_apart_and_black_numbers_read_on_all() -> None:
    def light(colour: str) -> float:
        return sum(
            weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
            for weight, part in zip((0.2126, 0.7152, 0.0722), to_rgb(colour), strict=True)
        )

    assert set(PHASE_COLOURS.values()) <= set(COLOURS) and len(set(PHASE_COLOURS.values())) == 4
    for colour in PHASE_COLOURS.values():
        for ground in (colour, lighter(colour)):
            assert (light(ground) + 0.05) / 0.05 >= 4.5, "WCAG's contrast for text"
    assert lighter("#000000") == "#808080" or lighter("#000000") == "#7f7f7f"


def test_numbers_stand_in_their_boxes_where_there_is_room() -> None:
    timeline = simulate(dualpipe(8, 20))
    figure = schedule_figure(timeline)
    axes = figure.axes[0]
    png(figure)  # lays it out
    numbers = [text for text in axes.texts if text.get_text()]
    assert len(numbers) >= 0.5 * len(list(boxes(timeline)))
    assert all(text.get_fontsize() >= SMALLEST for text in numbers)
    places = {box.get_gid(): box.get_window_extent() for box in axes.patches if ":" in (box.get_gid() or "")}
    for text in numbers:
        here = text.get_window_extent()
        middle = ((here.x0 + here.x1) / 2, (here.y0 + here.y1) / 2)
        ((name, around),) = [(name, each) for name, each in places.items() if each.contains(*middle)]
        assert re.search(r"\d+'?$", name)[0].rstrip("'") == text.get_text()
        assert around.x0 - 0.5 <= here.x0 and here.x1 <= around.x1 + 0.5


def test_a_moment_pales_what_comes_and_shows_what_is_kept() -> None:
    timeline = simulate(one_f_one_b(4, 6))
    for now in (0.0, 5.5, timeline.span):
        figure = schedule_figure(timeline, now=now)
        times, kept = figure.axes
        assert drawn(times)["later"].get_x() == now
        assert [line.get_xdata()[0] for line in times.lines if line.get_gid() == "now"] == [now]
        widths = [bar.get_width() for bar in kept.patches]
        assert widths[:4] == [4, 3, 2, 1] and widths[4:] == list(timeline.held_at(now))
    assert "later" not in drawn(schedule_figure(timeline).axes[0])
    assert [bar.get_width() for bar in schedule_figure(timeline).axes[1].patches] == [4, 3, 2, 1, 4, 3, 2, 1]


def test_the_legend_names_what_there_is_and_no_more() -> None:
    plain, cut = (texts(schedule_figure(simulate(schedule))) for schedule in (one_f_one_b(2, 4), dualpipe(2, 4)))
    assert "B, backward" in plain and "I, backward for the input" not in plain and "lighter" not in plain
    assert "I, backward for the input" in cut and "W, backward for the weights" in cut and "lighter" in cut
    assert "idle" in plain


def test_shares_are_drawn_as_given() -> None:
    shares = {"1F1B": {8: 0.5, 16: 0.25}, "DualPipe": {8: 0.2, 16: 0.1}}
    axes = shares_figure(shares, "A title").axes[0]
    for line, (name, share) in zip(axes.lines, shares.items(), strict=True):
        assert line.get_label() == name
        assert (list(line.get_xdata()), list(line.get_ydata())) == (list(share), list(share.values()))
    assert len({line.get_marker() for line in axes.lines}) == 2, "not by colour alone"
    assert axes.get_title(loc="left") == "A title" and axes.get_ylim()[0] == 0
    assert axes.yaxis.get_major_formatter()(0.25, 0) == "25%"


def test_overlap_shows_both_streams() -> None:
    chunk = ChunkCosts(Part(2, 2, 1), Part(3, 3, 2), 2, 4, layers=2)
    figure = overlap_figure(chunk)
    found = drawn(figure.axes[0])
    assert len(found) == 20
    for piece in chunk.overlap():
        box = found[f"{piece.name}-{piece.layer}"]
        assert (box.get_x(), box.get_x() + box.get_width()) == (piece.start, piece.end)
        assert int(box.get_y()) == (0 if piece.computes else 1)
    png(figure)  # lays it out
    names = {f"{part}\n{sense}" for part, sense in product(("ATTN", "MLP", "DISPATCH", "COMBINE"), ("(F)", "(B)"))}
    too_narrow = {"DISPATCH\n(F)"}  # as long as COMBINE(B), of a letter more
    assert {text.get_text() for text in figure.axes[0].texts} == names - too_narrow | {"MLP\n(W)"}
    for text in figure.axes[0].texts:
        here = text.get_window_extent()
        around = next(
            box.get_window_extent()
            for box in found.values()
            if box.get_window_extent().contains(*here.get_points().mean(0))
        )
        assert around.x0 <= here.x0 and here.x1 <= around.x1, text.get_text()
    costs = chunk.phases()
    assert f"F&B takes {costs.both:g}" in texts(figure) and f"{costs.forward + costs.backward:g}" in texts(figure)


# ---- the player --------------------------------------------------------------------------------------------------------


@pytest.fixture
def player() -> SchedulePlayer:
    return SchedulePlayer(ranks=(2, 4), rounds=(2, 3))


def test_the_player_chooses_among_schedules(player: SchedulePlayer) -> None:
    assert player.schedule == make_schedule("GPipe", 2, 4) and player.share == 1
    player.set(name="DualPipe", ranks=4, microbatches=12, costs="100%", share=0.25)
    assert player.schedule == make_schedule("DualPipe", 4, 12)
    assert player.timeline.costs == COSTS["100%"]
    assert player.now == pytest.approx(player.timeline.span / 4)
    player.set(name="DualPipeV")
    assert player.timeline.costs == COSTS["100%"].scaled(0.5), "its stages are half as large"
    for moves, words in (
        ({"name": "2F2B"}, "schedule = '2F2B' is not in the player: choose GPipe, 1F1B, interleaved, ZB1P"),
        ({"ranks": 3}, "ranks = 3 is not in the player: choose 2, 4"),
        ({"microbatches": 9}, "microbatches = 9 is not in the player: choose 8, 12"),
        ({"costs": "1%"}, "costs = '1%' is not in the player: choose 0%, 25%"),
        ({"share": 1.5}, "share = 1.5 must lie between 0"),
    ):
        with pytest.raises(UserError, match=words):
            player.set(**moves)


def test_every_control_changes_its_still_picture(player: SchedulePlayer) -> None:
    pictures = []
    for moves in ({}, {"name": "ZB1P"}, {"ranks": 4}, {"microbatches": 12}, {"costs": "50%"}, {"share": 0.5}):
        player.set(**moves)
        data, _ = player._repr_mimebundle_()
        pictures.append(data["image/png"])
    assert len(set(pictures)) == 6
    assert base64.b64decode(pictures[0]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"].startswith(
        "Schedule player, ZB1P on 4 ranks with 12 microbatches and communication of 50%, at"
    )


def test_what_the_page_gets_is_the_schedules(player: SchedulePlayer) -> None:
    assert len(player.schedules) == len(SCHEDULES) * 4
    for sent in player.schedules:
        schedule = make_schedule(sent["name"], sent["ranks"], sent["microbatches"])
        assert (tuple(sent["lines"]), sent["stages"]) == (schedule.lines(), schedule.n_stages)
        assert sent["parameters"] == (1 if sent["name"] in ("GPipe", "1F1B", "ZB1P") else 2)
        assert len(sent["formula"]) == len(COSTS)
    names = {(sent["name"], sent["ranks"]): sent["formula"][0] for sent in player.schedules}
    # A rank's share costs F = I = W = 1: half of that a stage of the V and of interleaved 1F1B.
    assert names["GPipe", 4] == names["1F1B", 4] == 9 and names["interleaved", 4] == 4.5 and names["ZB1P", 4] == 3
    assert names["DualPipeV", 4] == 3 and names["DualPipe", 4] == 2


def test_in_the_player_every_bubble_is_the_tables(player: SchedulePlayer) -> None:
    """Its costs keep the table's premise: F = I, W no longer, F&B between B and F + B. (Rounding: sums of floats.)"""
    for sent in player.schedules:
        for place, name in enumerate(COSTS):
            player.set(name=sent["name"], ranks=sent["ranks"], microbatches=sent["microbatches"], costs=name)
            assert player.timeline.bubble == pytest.approx(sent["formula"][place], abs=1e-9), (player.alt, name)


def test_costs_grow_with_communication_but_pairs_hide_it() -> None:
    assert costs_of(0.0) == PhaseCosts(1, 1, 1, 3)
    half = costs_of(0.5)
    assert (half.forward, half.input, half.weight) == (1.5, 1.5, 1)
    assert half.both == pytest.approx(3), "half as long as computation it disappears wholly"
    assert costs_of(1.0).both < 3 + 2 / LAYERS and costs_of(1.0).forward + costs_of(1.0).backward == 5


def test_it_is_saved_as_one_page_that_needs_nothing_else(player: SchedulePlayer, tmp_path: Path) -> None:
    player.set(name="DualPipe", share=0.5)
    page = player.save_html(tmp_path / "player.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["player.html"]
    assert not re.findall(r"https?://", page) and not re.search(r"\b(src|href|import)\b *[=(\"']", page)
    assert page.count("</script>") == 1 and "export" not in page
    assert MODULE.read_text(encoding="utf-8").endswith(EXPORT)
    state = json.loads(re.search(r"^const state = (.*);$", page, re.MULTILINE)[1])
    assert state["schedules"] == player.schedules and (state["schedule_at"], state["share"]) == (5, 0.5)


def test_the_whole_player_makes_a_page_of_a_reasonable_size(tmp_path: Path) -> None:
    player = SchedulePlayer()
    assert (player.facts["ranks"], player.facts["rounds"]) == (list(RANKS), list(ROUNDS))
    assert player.save_html(tmp_path / "player.html").stat().st_size < 1_000_000
    player.set(ranks=RANKS[-1], microbatches=RANKS[-1] * ROUNDS[-1])
    assert len(png(player.figure())) < 400_000


def test_matplotlibs_settings_stay_as_they_were() -> None:
    before = dict(matplotlib.rcParams)
    timeline: Timeline = simulate(one_f_one_b(2, 2))
    schedule_figure(timeline)
    assert dict(matplotlib.rcParams) == before
