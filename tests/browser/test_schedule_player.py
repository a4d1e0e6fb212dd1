"""The schedule player, saved as a page and opened in Chromium: what it computes is what Python computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from saved_page import NEXT_FRAME, choose, picture, said

from dsv3_mini.viz.figures.schedule import IDLE, PHASE_COLOURS, lighter
from dsv3_mini.viz.widgets.schedule_player import COSTS, RANKS, ROUNDS, SCHEDULES, SchedulePlayer

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
TIMES, WIDE = (52, 34, 790, 420), 980  # where schedule_player.js draws: x, y, width, height in a picture 980 wide


@pytest.fixture
def player() -> SchedulePlayer:
    return SchedulePlayer()


@pytest.fixture
def page(file_page: Page, player: SchedulePlayer, tmp_path: Path) -> Page:
    """The saved player."""
    file_page.goto(player.save_html(tmp_path / "player.html").as_uri())
    file_page.wait_for_selector(".dsv3-schedule[data-share]")
    return file_page


def share(page: Page) -> float:
    page.evaluate(NEXT_FRAME)
    return float(page.get_attribute(".dsv3-schedule", "data-share"))


def colour_at(page: Page, x: float, y: float) -> str:
    script = """([x, y]) => {
        const canvas = document.querySelector('canvas'), scale = canvas.width / 980;
        const [r, g, b] = canvas.getContext('2d').getImageData(x * scale, y * scale, 1, 1).data;
        return '#' + [r, g, b].map((n) => n.toString(16).padStart(2, '0')).join('').toUpperCase();
    }"""
    return page.evaluate(script, [x, y])


def test_the_page_computes_what_python_computes(page: Page, player: SchedulePlayer) -> None:
    """Every schedule, small and large, at three weights of communication: step, bubble, formula, idle, activations."""
    costs = list(COSTS)
    for schedule_at, name in enumerate(SCHEDULES):
        for ranks_at, rounds_at, cost_at in ((0, 0, 0), (1, 2, 4), (2, 1, len(COSTS) - 1)):
            choose(page, schedule_at=schedule_at, ranks_at=ranks_at, microbatches_at=rounds_at, cost_at=cost_at)
            microbatches = RANKS[ranks_at] * ROUNDS[rounds_at]
            player.set(name=name, ranks=RANKS[ranks_at], microbatches=microbatches, costs=costs[cost_at])
            timeline, text = player.timeline, said(page, ".score")
            step, bubble, formula, idle = map(float, re.match(
                r"A step takes ([\d.]+); bubble ([\d.]+), by the formula ([\d.]+); ([\d.]+)% of", text).groups())  # fmt: skip
            place = player.facts["names"].index(name), ranks_at, rounds_at
            sent = next(
                each for each in player.schedules
                if each["name"] == name and each["ranks"] == RANKS[ranks_at]
                and each["microbatches"] == RANKS[ranks_at] * ROUNDS[rounds_at]
            )  # fmt: skip
            assert step == pytest.approx(timeline.span, rel=1e-3), place
            assert bubble == pytest.approx(timeline.bubble, rel=1e-3, abs=1e-9), place
            assert formula == pytest.approx(sent["formula"][cost_at], rel=1e-3), place
            assert idle == pytest.approx(100 * timeline.bubble_share, abs=0.051), place
            peak = max(timeline.schedule.peak_activations)
            held = len(timeline.schedule.stages_on(0))
            assert f"holds {held} of {timeline.schedule.n_stages} stages and at most {peak} activations" in text


def test_boxes_stand_where_the_slots_run(page: Page, player: SchedulePlayer) -> None:
    """The colour in a corner of each box, away from its number, for a schedule that has every kind of slot."""
    choose(page, schedule_at=list(SCHEDULES).index("DualPipe"))
    player.set(name="DualPipe")
    page.evaluate(NEXT_FRAME)
    timeline = player.timeline
    ranks, (left, top, wide, _) = timeline.schedule.n_ranks, TIMES
    row = 44
    looked = set()
    for rank in range(ranks):
        for number, slot in enumerate(timeline.schedule.order[rank]):
            start, end = timeline.start[rank][number], timeline.end[rank][number]
            x = left + wide * (start + 0.12 * (end - start)) / timeline.span
            for place, op in enumerate(slot.ops):
                y = top + row * (rank + 0.07 + 0.86 * (place + 0.15) / len(slot.ops))
                colour = PHASE_COLOURS[op.phase]
                assert colour_at(page, x, y) == (lighter(colour) if op.direction else colour).upper(), (rank, str(op))
                looked.add((op.phase, op.direction))
    assert len(looked) == 8
    idle = next(r for r in range(ranks) if timeline.start[r][0] > 0)
    x = left + wide * timeline.start[idle][0] / 2 / timeline.span
    assert colour_at(page, x, top + row * (idle + 0.5)) == IDLE


def test_what_comes_later_is_pale_and_the_kept_are_counted(page: Page, player: SchedulePlayer) -> None:
    for share_of in (0.2, 0.55, 0.9):
        choose(page, share=share_of)
        player.set(share=share_of)
        now = player.now
        assert float(re.search(r"Time ([\d.]+) of", said(page))[1]) == pytest.approx(now, rel=1e-3)
        assert f"the fullest keeps {max(player.timeline.held_at(now))} activations" in said(page)
        timeline = player.timeline
        busy = sum(
            any(s <= now < e for s, e in zip(timeline.start[rank], timeline.end[rank], strict=True))
            for rank in range(4)
        )
        assert f"{busy} of 4 ranks compute" in said(page)
    row, (left, top, wide, _) = 44, TIMES
    y = top + row * 0.1
    before, after = (colour_at(page, left + wide * part, y) for part in (0.02, 0.97))
    assert before == PHASE_COLOURS["F"] and after not in (IDLE, *PHASE_COLOURS.values()) and after > "#D0"


def test_hover_tells_and_shows_a_microbatchs_way(page: Page, player: SchedulePlayer) -> None:
    choose(page, schedule_at=list(SCHEDULES).index("DualPipe"))
    player.set(name="DualPipe")
    before, timeline = picture(page), player.timeline
    rank, number = 1, next(i for i, slot in enumerate(timeline.schedule.order[1]) if slot.kind == "F&B")
    forward, backward = timeline.schedule.order[rank][number].ops
    start, end = timeline.start[rank][number], timeline.end[rank][number]
    box = page.locator("canvas").bounding_box()
    scale, (left, top, wide, _) = box["width"] / WIDE, TIMES
    x = left + wide * (start + end) / 2 / timeline.span
    page.mouse.move(box["x"] + x * scale, box["y"] + (top + 44 * (rank + 0.3)) * scale)
    text = said(page)
    assert f"Rank 1, {start:g} to {end:g}: forward of microbatch {forward.microbatch}" in text
    assert f"overlapped with backward of microbatch {backward.microbatch}" in text
    above = picture(page)
    page.mouse.move(box["x"] + x * scale, box["y"] + (top + 44 * (rank + 0.7)) * scale)
    assert len({before, above, picture(page)}) == 3, "the forward's microbatch, then the backward's"
    page.mouse.move(1, 1)
    assert picture(page) == before and share(page) == 1
    page.mouse.click(box["x"] + x * scale, box["y"] + (top + 10) * scale)
    assert share(page) == pytest.approx((start + end) / 2 / timeline.span, abs=0.003), "a click moves the film"


def test_it_plays_steps_and_stops(page: Page, player: SchedulePlayer) -> None:
    assert "again" in said(page, ".play")
    choose(page, pace=0)  # another pace plays, from the start; this one takes 20 s
    # Below 1 as well: until the first frame of the film the last one of the film before stands there.
    page.wait_for_function("((now) => 0.05 < now && now < 1)(document.querySelector('.dsv3-schedule').dataset.share)")
    assert "pause" in said(page, ".play")
    page.click(".play")
    page.wait_for_function("!document.querySelector('.play').textContent.includes('pause')")
    stands = share(page)
    page.wait_for_timeout(200)
    assert 0.05 < share(page) == stands < 0.9
    canvas = page.locator("canvas")
    canvas.focus()
    span = player.timeline.span
    events = sorted({time for rows in (player.timeline.start, player.timeline.end) for row in rows for time in row})
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert share(page) * span == pytest.approx(events[3])
    page.keyboard.press("ArrowLeft")
    assert share(page) * span == pytest.approx(events[2])
    page.click("button[aria-label='One event on']")
    assert share(page) * span == pytest.approx(events[3])
    canvas.press("End")
    assert share(page) == 1
    canvas.press("Space")
    page.wait_for_function("document.querySelector('.play').textContent.includes('pause')")
    canvas.press("Space")
    page.wait_for_function("document.querySelector('.play').textContent.includes('play')")
    choose(page, pace=2)
    page.wait_for_function("document.querySelector('.play').textContent.includes('again')", timeout=20_000)
    assert share(page) == 1


def test_keys_stay_in_the_player_and_every_control_moves_the_picture(page: Page) -> None:
    page.evaluate("window.heard = []; document.addEventListener('keydown', (event) => heard.push(event.key))")
    pictures = [picture(page)]
    for name, key in (
        (".schedule_at", "ArrowDown"),
        (".ranks_at", "ArrowRight"),
        (".microbatches_at", "ArrowRight"),
        (".cost_at", "End"),
        (".share", "Home"),
    ):
        page.locator(name).press(key)
        pictures.append(picture(page))
    assert len(set(pictures)) == 6
    page.locator("canvas").press("ArrowRight")
    assert page.evaluate("heard") == [], "no key leaves the player: JupyterLab would take it"
    assert page.get_attribute("canvas", "role") == "img"
    assert "1F1B, 8 ranks, 24 microbatches." in page.get_attribute("canvas", "aria-label")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input')].filter((c) => !c.ariaLabel && !c.textContent.trim()).length"
    )
    assert unnamed == 0
