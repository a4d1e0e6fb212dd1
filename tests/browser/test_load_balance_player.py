"""The load balance player, saved as a page and opened in Chromium: no kernel, no network, and it does all it should."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import pytest
from saved_page import NEXT_FRAME, picture

from dsv3_mini.course.balance_runs import EVERY, MOST, recorded
from dsv3_mini.viz.style import COLOURS
from dsv3_mini.viz.widgets.load_balance import LoadBalancePlayer

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
# Where load_balance.js draws: x, y, width, height in a picture of 920 x 560.
LOAD, STRIP, LOSS, WIDE = (58, 40, 320, 200), (470, 40, 430, 110), (470, 388, 430, 114), 920
LAST = len(recorded().films[0]) - 1


@pytest.fixture
def page(file_page: Page, tmp_path: Path) -> Page:
    """The saved player."""
    file_page.goto(LoadBalancePlayer().save_html(tmp_path / "player.html").as_uri())
    file_page.wait_for_selector(".dsv3-player[data-frame]")
    return file_page


def shown(page: Page) -> int:
    page.evaluate(NEXT_FRAME)
    return int(page.get_attribute(".dsv3-player", "data-frame"))


def button(page: Page) -> str:
    page.evaluate(NEXT_FRAME)
    return page.inner_text(".play")


def stopped(page: Page) -> int:
    """Where the film stands once the button says that it does: a frame that was already due may still be drawn before."""
    page.wait_for_function("!document.querySelector('.play').textContent.includes('pause')")
    return shown(page)


def said(page: Page) -> str:
    page.evaluate(NEXT_FRAME)
    return page.inner_text(".said")


def number(text: str, label: str) -> float:
    """The number that stands after `label`. (Halves are rounded one way in JavaScript and another in Python.)"""
    return float(re.search(rf"{label} ([\d.]+\d)", text)[1])


def colour_at(page: Page, x: float, y: float) -> str:
    script = """([x, y]) => {
        const canvas = document.querySelector('canvas'), scale = canvas.width / 920;
        const [r, g, b] = canvas.getContext('2d').getImageData(x * scale, y * scale, 1, 1).data;
        return '#' + [r, g, b].map((n) => n.toString(16).padStart(2, '0')).join('').toUpperCase();
    }"""
    return page.evaluate(script, [x, y])


def point(page: Page, x: float, y: float) -> int:
    """Move a pointer to a place of the picture, and read in the very next animation frame what is shown."""
    script = """([x, y]) => new Promise((done) => {
        const canvas = document.querySelector('canvas'), box = canvas.getBoundingClientRect(), scale = box.width / 920;
        const at = { clientX: box.left + x * scale, clientY: box.top + y * scale, bubbles: true };
        canvas.dispatchEvent(new PointerEvent('pointermove', at));
        requestAnimationFrame(() => done(Number(document.querySelector('.dsv3-player').dataset.frame)));
    })"""
    return page.evaluate(script, [x, y])


def test_it_shows_the_runs_numbers(page: Page) -> None:
    recording = recorded()
    assert shown(page) == LAST
    for gamma_at, gamma in enumerate(recording.gammas):
        film, alone = recording.film(gamma), recording.film(0.0)
        assert page.inner_text("output >> nth=0") == f"{gamma:g}"
        assert number(said(page), "MaxVio") == pytest.approx(film.max_vio[LAST, 0].item(), abs=0.006)
        assert number(said(page), "loss") == pytest.approx(film.loss[LAST].item(), abs=0.006)
        came_to = page.inner_text(".score")
        assert number(came_to, "MaxVio") == pytest.approx(film.score.max_vio, abs=0.006)
        assert number(came_to, "left alone") == pytest.approx(alone.score.max_vio, abs=0.006)
        assert number(came_to, "loss") == pytest.approx(film.score.loss, abs=0.0006)
        percent = float(re.search(r"\(([+-][\d.]+)% against", came_to)[1])
        assert percent == pytest.approx(100 * (film.score.loss / alone.score.loss - 1), abs=0.06)
        assert f"gamma {gamma:g}, alpha 0. Step {EVERY * (LAST + 1)}" in page.get_attribute("canvas", "aria-label")
        if gamma_at < len(recording.gammas) - 1:
            page.locator(".gamma").press("ArrowRight")


def test_bars_are_as_high_as_the_load(page: Page) -> None:
    page.locator(".gamma").press("End")
    assert shown(page) == LAST
    film = recorded().film(recorded().gammas[-1])
    x, y, width, height = LOAD
    looked = 0
    for expert, share in enumerate(film.share[LAST, 0].tolist()):
        middle = x + (expert + 0.5) * width / film.load.shape[-1]
        for value, wanted in ((0.5 * share, COLOURS[expert].upper()), (share + 0.1, "#FFFFFF")):
            if value < MOST and abs(value - round(value)) > 0.04 and height * abs(value - share) / MOST > 3:
                assert colour_at(page, middle, y + height * (1 - value / MOST)) == wanted, expert
                looked += 1
    assert looked >= 8


def test_hover_answers_in_the_next_frame_and_leaves_no_trace(page: Page) -> None:
    before = picture(page)
    for wanted in (0, 17, LAST - 5):
        for x, y, width, height in (STRIP, LOSS):
            assert point(page, x + (wanted + 0.5) * width / (LAST + 1), y + height / 2) == wanted
        vio = recorded().film(0.0).max_vio[wanted, 0].item()
        assert f"Step {EVERY * (wanted + 1)} of" in said(page)
        assert number(said(page), "MaxVio") == pytest.approx(vio, abs=0.006)
    x, y, width, height = LOAD
    assert point(page, x + 2.5 * width / 8, y + height / 2) == LAST
    assert "expert 2 has" in said(page)
    page.dispatch_event("canvas", "pointerleave")
    assert picture(page) == before
    page.mouse.click(*on_screen(page, STRIP[0] + 60.5 * STRIP[2] / (LAST + 1), STRIP[1] + 20))
    page.mouse.move(1, 1)
    assert shown(page) == 60, "a click stays"


def on_screen(page: Page, x: float, y: float) -> tuple[float, float]:
    box = page.locator("canvas").bounding_box()
    return box["x"] + x * box["width"] / WIDE, box["y"] + y * box["width"] / WIDE


def test_it_plays_at_thirty_frames_a_second(page: Page) -> None:
    """Whenever the browser draws, the film shows the frame of that moment, and drawing it takes a part of 1/30 s.

    (A browser that shares two cores with other tests may draw less often than 30 times a second.)
    """
    page.evaluate("""() => {
        window.costs = [];
        window.plainFrame = window.requestAnimationFrame.bind(window);
        window.requestAnimationFrame = (call) => plainFrame((now) => {
            const began = performance.now();
            call(now);
            costs.push(performance.now() - began);
        });
    }""")
    page.click(".play")
    page.wait_for_function("Number(document.querySelector('.dsv3-player').dataset.frame) < 30")
    seen = page.evaluate("""() => new Promise((done) => {
        const root = document.querySelector('.dsv3-player'), seen = [], began = performance.now();
        const look = () => {
            const now = performance.now() - began;
            seen.push([now, Number(root.dataset.frame)]);
            if (now < 1500) plainFrame(look); else done(seen);
        };
        plainFrame(look);
    })""")
    frames = [frame for _, frame in seen]
    assert frames == sorted(frames), "forwards"
    assert frames[-1] - frames[0] >= 30 * 1.5 - 5, "in time"
    start = median(frame - 0.03 * now for now, frame in seen)
    in_time = [
        abs(frame - start - 0.03 * now) <= 1.5 + 0.03 * (now - before)
        for (before, _), (now, frame) in zip(seen, seen[1:], strict=False)
    ]
    assert sum(in_time) >= 0.9 * len(in_time), "what is shown is the frame of that moment"
    costs = sorted(page.evaluate("costs"))
    assert len(costs) >= len(set(frames)) - 2 and costs[len(costs) // 2] < 1000 / 30 / 2
    page.click(".play")
    stands = stopped(page)
    page.wait_for_timeout(300)
    assert shown(page) == stands and "play" in button(page)


def test_it_plays_to_the_end_and_again(page: Page) -> None:
    assert "again" in button(page)
    page.click(".play")
    page.wait_for_function("Number(document.querySelector('.dsv3-player').dataset.frame) < 60")
    assert "pause" in button(page)
    page.wait_for_function("document.querySelector('.play').textContent.includes('again')", timeout=20_000)
    assert shown(page) == LAST


def test_it_works_from_the_keyboard(page: Page) -> None:
    page.evaluate("window.heard = []; document.addEventListener('keydown', (event) => heard.push(event.key))")
    canvas = page.locator("canvas")
    canvas.focus()
    for key, wanted in (
        ("ArrowLeft", LAST - 1),
        ("ArrowLeft", LAST - 2),
        ("ArrowRight", LAST - 1),
        ("Home", 0),
        ("End", LAST),
    ):
        page.keyboard.press(key)
        assert shown(page) == wanted
    page.keyboard.press("Home")
    assert shown(page) == 0, "or the wait below would take the last frame, still drawn, for a film that runs"
    page.keyboard.press("Space")
    page.wait_for_function("Number(document.querySelector('.dsv3-player').dataset.frame) > 5")
    page.keyboard.press("Space")
    stands = stopped(page)
    page.wait_for_timeout(200)
    assert shown(page) == stands > 5
    page.locator(".play").press("Enter")
    page.wait_for_function("document.querySelector('.play').textContent.includes('pause')")
    page.locator(".play").press("Enter")
    assert page.evaluate("heard") == [], "no key leaves the player: JupyterLab would take it"


def test_every_control_moves_the_picture(page: Page) -> None:
    pictures = [picture(page)]
    for name, key in ((".gamma", "ArrowRight"), (".alpha", "End"), (".layer", "ArrowDown"), (".place", "ArrowLeft")):
        page.locator(name).press(key)
        pictures.append(picture(page))
    page.click("button[aria-label='One frame back']")
    pictures.append(picture(page))
    assert len(set(pictures)) == 6
    page.click("button[aria-label='One frame on']")
    assert picture(page) == pictures[-2]
    page.select_option(".pace", label="3 frames a second")
    assert "pause" in button(page), "another pace plays"
