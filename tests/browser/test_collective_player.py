"""The collective player, saved as a page and opened in Chromium: what it shows is what the films say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from saved_page import NEXT_FRAME, choose, picture, said

from dsv3_mini.course.rounds import FILMS
from dsv3_mini.viz.style import COLOURS
from dsv3_mini.viz.widgets.collectives import RANKS, CollectivePlayer

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
LEFT, TOP, ROW = 70, 12, 52  # where collectives.js draws: the places of the first rank, and the height of a rank
NAMES = list(FILMS)


@pytest.fixture
def page(file_page: Page, tmp_path: Path) -> Page:
    file_page.goto(CollectivePlayer().save_html(tmp_path / "player.html").as_uri())
    file_page.wait_for_selector(".dsv3-collective[data-moment]")
    return file_page


def moment(page: Page) -> float:
    page.evaluate(NEXT_FRAME)
    return float(page.get_attribute(".dsv3-collective", "data-moment"))


def colours(page: Page, points: list[tuple[float, float]]) -> list[str]:
    script = """(points) => {
        const canvas = document.querySelector('canvas'), pen = canvas.getContext('2d'), scale = canvas.width / 900;
        return points.map(([x, y]) => '#' + [...pen.getImageData(x * scale, y * scale, 1, 1).data].slice(0, 3)
            .map((n) => n.toString(16).padStart(2, '0')).join('').toUpperCase());
    }"""
    return page.evaluate(script, points)


@pytest.mark.parametrize("name", NAMES)
def test_places_have_the_colours_of_what_is_in_them(page: Page, name: str) -> None:
    """Every stripe of every place, after every round; an empty place is white."""
    film = FILMS[name](4)
    choose(page, film_at=NAMES.index(name), ranks_at=RANKS.index(4))
    side = ROW - 8
    for number in range(len(film.rounds) + 1):
        choose(page, moment=number)
        assert moment(page) == number
        points, wanted = [], []
        for rank, row in enumerate(film.state(number)):
            for place, piece in enumerate(row):
                for i, source in enumerate(piece.ranks or (None,)):
                    wide = side / max(1, len(piece.ranks))
                    points.append((LEFT + place * ROW + (i + 0.5) * wide, TOP + rank * ROW + 6))
                    wanted.append("#FFFFFF" if source is None else COLOURS[source])
        assert colours(page, points) == wanted, number


def test_pieces_fly_between_rounds(page: Page) -> None:
    choose(page, film_at=NAMES.index("all-gather"), ranks_at=RANKS.index(4))
    choose(page, moment=0.5)
    assert moment(page) == 0.5
    x = LEFT + 6
    start, middle = TOP + 8, TOP + ROW / 2 + 8
    assert colours(page, [(x, start), (x, middle), (x, TOP + ROW + 33)]) == [COLOURS[0], COLOURS[0], "#FFFFFF"]
    assert said(page).startswith("In: round 1 of 3, 1 of 4 pieces in a message. Rank 0 to 1, 1 to 2")


def test_what_it_says_is_what_the_films_say(page: Page) -> None:
    for name in NAMES:
        for ranks in (RANKS[0], RANKS[-1]):
            film = FILMS[name](ranks)
            choose(page, film_at=NAMES.index(name), ranks_at=RANKS.index(ranks))
            assert said(page).startswith(f"Next: round 1 of {len(film.rounds)}, {film.lengths[0]} of {ranks} pieces")
            choose(page, moment=len(film.rounds))
            sent = float(re.search(r"sent ([\d.]+) times", said(page))[1])
            assert sent == pytest.approx(max(film.sent(len(film.rounds))) / ranks, abs=0.006)
            wire = float(re.search(r"as long as ([\d.]+) times", said(page, ".score"))[1])
            assert wire == pytest.approx(sum(film.lengths) / ranks, abs=0.006)


def test_it_plays_steps_and_stops(page: Page) -> None:
    choose(page, film_at=NAMES.index("all-reduce"))
    canvas = page.locator("canvas")
    canvas.focus()
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 6), ("Home", 0)):
        page.keyboard.press(key)
        assert moment(page) == place, key
    page.click("button[aria-label='One round on']")
    page.click("button[aria-label='One round on']")
    page.click("button[aria-label='One round back']")
    assert moment(page) == 1
    choose(page, pace=2)  # plays on, quickly
    page.wait_for_function("document.querySelector('.dsv3-collective').dataset.moment > 1.2")
    assert "pause" in said(page, ".play")
    canvas.press("Space")
    page.wait_for_function("document.querySelector('.play').textContent.includes('play')")
    stands = moment(page)
    page.wait_for_timeout(150)
    assert 1.2 < moment(page) == stands
    canvas.press("Space")
    page.wait_for_function("document.querySelector('.play').textContent.includes('again')", timeout=20_000)
    assert moment(page) == 6


def test_keys_stay_in_the_player_and_every_control_moves_the_picture(page: Page) -> None:
    page.evaluate("window.heard = []; document.addEventListener('keydown', (event) => heard.push(event.key))")
    pictures = [picture(page)]
    for name, key in ((".film_at", "ArrowDown"), (".ranks_at", "ArrowRight"), (".moment", "ArrowRight")):
        page.locator(name).press(key)
        pictures.append(picture(page))
    page.locator("canvas").press("ArrowRight")
    assert len({*pictures, picture(page)}) == 5
    assert page.evaluate("heard") == [], "no key leaves the player: JupyterLab would take it"
    assert page.get_attribute("canvas", "role") == "img"
    assert page.get_attribute("canvas", "aria-label").startswith("all-gather, 5 ranks. Next: round 2 of 4")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input')].filter((c) => !c.ariaLabel && !c.textContent.trim()).length"
    )
    assert unnamed == 0
