"""The training board in Chromium: as a saved page with no kernel and no network, and with a model that takes its wishes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from nano_runs import MIXTURE, NANO, small_tokenizer
from saved_page import NEXT_FRAME, picture

from dsv3_mini.course.pretrain_run import run_recipe
from dsv3_mini.train.schedules import constant
from dsv3_mini.viz.widgets.pretrain import TrainingBoard

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
# Where pretrain.js draws: x, y, width, height in a picture of 920 x 500.
LOSS, LOAD, BIAS, WIDE = (46, 34, 170, 164), (278, 284, 170, 164), (510, 284, 170, 164), 920
ALONE = "save_changes() {},"


@pytest.fixture(scope="module")
def board() -> TrainingBoard:
    recipe = run_recipe(3000).replace(mixture=MIXTURE, context=constant("context", 32))
    board = TrainingBoard(cfg=NANO, recipe=recipe, tokenizer=small_tokenizer())
    board.train(steps=9)
    return board


@pytest.fixture
def saved(board: TrainingBoard, file_page: Page, tmp_path: Path) -> Page:
    return shown_in(file_page, board.save_html(tmp_path / "board.html"))


@pytest.fixture
def live(board: TrainingBoard, file_page: Page, tmp_path: Path) -> Page:
    """A page whose model notes what it is asked, in `window.sent`, and can be given values, as `window.model`."""
    path = board.save_html(tmp_path / "board.html")
    text = path.read_text(encoding="utf-8")
    assert ALONE in text
    text = text.replace(ALONE, f"{ALONE} send: (wish) => (window.sent ??= []).push(wish),")
    path.write_text(
        text.replace("render({ model, el: doc", "window.model = model; render({ model, el: doc"), encoding="utf-8"
    )
    return shown_in(file_page, path)


def shown_in(page: Page, path: Path) -> Page:
    page.goto(path.as_uri())
    page.wait_for_selector(".dsv3-board[data-drawn]")
    return page


def said(page: Page) -> str:
    page.evaluate(NEXT_FRAME)
    return page.inner_text(".said")


def give(page: Page, name: str, value: Any) -> None:
    page.evaluate("([name, value]) => window.model.set(name, value)", [name, value])
    page.evaluate(NEXT_FRAME)


def point(page: Page, box: tuple[float, ...], across: float, down: float = 0.5) -> None:
    """The pointer in a panel; what it shows must be there by the very next frame."""
    script = """([x, y]) => new Promise((done) => {
        const canvas = document.querySelector('canvas'), box = canvas.getBoundingClientRect(), scale = box.width / 920;
        const at = { clientX: box.left + x * scale, clientY: box.top + y * scale, bubbles: true };
        canvas.dispatchEvent(new PointerEvent('pointermove', at));
        requestAnimationFrame(done);
    })"""
    x, y, width, height = box
    page.evaluate(script, [x + across * width, y + down * height])


def test_a_saved_board_shows_the_run_and_offers_no_training(saved: Page, board: TrainingBoard) -> None:
    last = board.history[0][-1]
    assert said(saved).startswith("Step 9,") and f"loss {last['loss']:.3f}" in said(saved)
    assert f"{last['max_vio']['1']:.2f} in layer 1" in said(saved)
    assert not saved.is_visible(".train") and not saved.is_visible(".length")
    sample = saved.inner_text(".sample")
    assert sample.startswith("It writes:") and board.sample[0][0].strip() in sample
    for name in (*MIXTURE, "layer 1", "layer 3"):
        assert name in saved.inner_text(".dsv3-board p.row")
    assert "Step 9" in saved.get_attribute("canvas", "aria-label")


def test_pointing_looks_into_the_past_and_leaves_no_trace(saved: Page, board: TrainingBoard) -> None:
    before, steps = picture(saved), board.history[0]
    total = board.facts["total"]
    for wanted in (steps[0], steps[4]):
        point(saved, LOSS, wanted["tokens"] / total)
        text = saved.inner_text(".said")
        assert text.startswith(f"Step {wanted['step']},") and f"loss {wanted['loss']:.3f}" in text
        assert picture(saved) != before
    saved.dispatch_event("canvas", "pointerleave")
    assert picture(saved) == before and said(saved).startswith("Step 9,")
    counts = steps[-1]["load"]["2"]
    point(saved, LOAD, 2.5 / 8, 1.5 / 3)
    share = float(re.search(r"layer 2: expert 2 has ([\d.]+) even shares", saved.inner_text(".said"))[1])
    assert share == pytest.approx(counts[2] * 8 / sum(counts), abs=0.006)
    point(saved, BIAS, 7.5 / 8, 0.1)
    assert f"layer 1: expert 7 has a bias of {steps[-1]['bias']['1'][7]:g}" in saved.inner_text(".said")


def test_keys_walk_through_the_steps(saved: Page) -> None:
    saved.evaluate("window.heard = []; document.addEventListener('keydown', (event) => heard.push(event.key))")
    saved.focus("canvas")
    pictures = [picture(saved)]
    for key, step in (("ArrowLeft", 8), ("ArrowLeft", 7), ("ArrowRight", 8), ("Home", 1), ("End", 9)):
        saved.keyboard.press(key)
        assert said(saved).startswith(f"Step {step},"), key
        pictures.append(picture(saved))
    assert len(set(pictures)) == 4 and pictures[-1] == pictures[0]
    assert saved.evaluate("heard") == []


def test_buttons_send_wishes(live: Page, board: TrainingBoard) -> None:
    assert "train" in live.inner_text(".train") and "paused" in live.inner_text(".state")
    live.click(".train")
    give(live, "status", "training")
    give(live, "speed", 5312.4)
    assert "pause" in live.inner_text(".train") and "5,312 tokens/s" in live.inner_text(".state")
    live.click(".train")
    give(live, "status", "paused")
    live.click("text=one step")
    live.focus("canvas")
    live.keyboard.press("Space")
    live.click("text=begin again")
    live.select_option(".length", label="100 thousand tokens")
    give(live, "status", "ended")
    assert "again" in live.inner_text(".train") and live.is_disabled("text=one step")
    wishes = [{"do": wish} for wish in ("train", "pause", "step", "train", "reset")]
    assert live.evaluate("window.sent") == [*wishes, {"tokens": 100_000}]
    give(live, "note", "step 3: loss is nan")
    assert live.inner_text(".note") == "step 3: loss is nan"


def test_new_lines_are_drawn_as_they_come(live: Page, board: TrainingBoard) -> None:
    before, lines = picture(live), json.loads(json.dumps(board.lines))
    more = [*lines, {**lines[-1], "step": 10, "tokens": lines[-1]["tokens"] + 128, "loss": 1.5}]
    give(live, "lines", more)
    assert said(live).startswith("Step 10,") and "loss 1.500" in said(live) and picture(live) != before
    give(live, "lines", [])
    assert said(live).startswith("Nothing trained yet")
    give(live, "sample", [["A cat sat.", True], ["Cat the.", False], ["And", None]])
    assert live.inner_text(".sample").replace("  ", " ") == "It writes: A cat sat. ✓ Cat the. ✗ And …"
