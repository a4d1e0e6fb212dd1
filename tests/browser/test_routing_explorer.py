"""The routing explorer as one saved file in a browser: hover, keys, thirty frames a second, no kernel and no network.

And as a live widget, with a model that listens: what it tells Python, and how it follows Python.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from random_models import nano, random_model

from dsv3_mini.data.stories import HELD_OUT_SEED, generate_story
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.viz.widgets.routing_explorer import MODULE, RoutingExplorer

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, CDPSession, Page

pytestmark = pytest.mark.browser
FRAME = 1000 / 30  # milliseconds

# Before the page's own script: count what is painted and how long each painting takes. Every painting clears the canvas once.
COUNTER = """
window.paintings = []; window.costs = [];
const clear = CanvasRenderingContext2D.prototype.clearRect;
CanvasRenderingContext2D.prototype.clearRect = function (...box) {
  if (this.canvas.isConnected) paintings.push(performance.now());
  return clear.apply(this, box);
};
const ask = window.requestAnimationFrame.bind(window);
window.requestAnimationFrame = (act) => ask((now) => {
  const before = paintings.length, start = performance.now();
  act(now);
  if (paintings.length > before) costs.push(performance.now() - start);
});
window.picture = () => document.querySelector("canvas").toDataURL();
window.nextFrame = () => new Promise((done) => ask(done));
"""


@pytest.fixture(scope="module")
def explorer() -> RoutingExplorer:
    """Two hundred tokens through a small model with random weights; two made-up domains for its profile."""
    tokenizer = Tokenizer.shipped()
    random = torch.Generator().manual_seed(1)
    rows = {name: torch.randint(60, 3000, (2, 60), generator=random) for name in ("stories", "code")}
    model = random_model(nano(vocab_size=4096, n_routed_experts=16, num_experts_per_tok=4)).eval()
    explorer = RoutingExplorer(model, tokenizer, rows)
    stories = "\n".join(generate_story(HELD_OUT_SEED, index).text for index in range(4))
    text = stories
    while len(tokenizer.encode(text)) > 200:
        text = text[:-1]
    explorer.read(text)
    return explorer


@pytest.fixture
def requests() -> list[str]:
    return []


@pytest.fixture
def page(browser_context: BrowserContext, requests: list[str]) -> Iterator[Page]:
    page, errors = browser_context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.add_init_script(COUNTER)
    yield page
    page.close()
    assert not errors


@pytest.fixture
def saved(explorer: RoutingExplorer, page: Page, tmp_path: Path) -> Page:
    page.goto(explorer.save_html(tmp_path / "routing.html").as_uri())
    page.wait_for_selector(".dsv3-routing canvas")
    page.evaluate("nextFrame()")
    return page


def said(page: Page) -> str:
    return page.inner_text(".said")


def picture(page: Page) -> str:
    page.evaluate("nextFrame()")
    return page.evaluate("picture()")


# ---- one file ----------------------------------------------------------------------------------------------------------


def test_it_shows_the_text_and_asks_nobody(saved: Page, explorer: RoutingExplorer, requests: list[str]) -> None:
    shown = explorer.shown
    assert saved.locator(".text span").count() == len(shown.words) > 190
    assert said(saved).startswith(f"Token 1 of {len(shown.words)}")
    saved.keyboard.press("Tab")
    saved.select_option("select.texts", "0")
    saved.select_option("select.texts", str(explorer.text))
    saved.click(".play")
    saved.wait_for_timeout(300)
    assert requests and all(url.startswith("file://") for url in requests), requests
    assert saved.locator("textarea").count() == 0, "without a kernel nobody could route another text"


def test_hovering_changes_the_picture_in_the_very_next_frame(saved: Page, explorer: RoutingExplorer) -> None:
    """The mouse comes over a token, a column of the strip and a tile; by the next frame the canvas is another."""
    answer = """async (act) => {
        await nextFrame(); await nextFrame();
        const before = picture();
        const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
        const over = (x, y) => canvas.dispatchEvent(new MouseEvent("mousemove",
            { clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true }));
        const start = performance.now();
        if (act === "token") document.querySelectorAll(".text span")[150].dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
        if (act === "strip") over(0.5, 0.8);
        if (act === "tile") over(0.3, 0.05);
        const handled = performance.now() - start;
        await nextFrame();
        return { changed: picture() !== before, handled, painting: costs.at(-1), said: document.querySelector(".said").textContent };
    }"""
    for act in ("token", "strip", "tile"):
        took = []
        for _ in range(5):  # the best counts, for the processor is shared; the picture must change each time
            seen = saved.evaluate(answer, act)
            assert seen["changed"], act
            expected = seen["said"].startswith("Token 151 of") if act == "token" else "visited by" in seen["said"]
            assert expected, seen["said"]
            took.append(seen["handled"] + seen["painting"])
            saved.evaluate("document.querySelector('canvas').dispatchEvent(new MouseEvent('mouseleave'))")
        print(f"{act}: {min(took):.1f} ms")
        assert min(took) < FRAME, (act, took)


def test_a_real_mouse_finds_tokens_and_experts(saved: Page, explorer: RoutingExplorer) -> None:
    before, routed = picture(saved), explorer.shown
    saved.hover(".text span:nth-child(8)")
    assert said(saved).startswith("Token 8 of") and picture(saved) != before
    assert f"layer 2: {', '.join(map(str, routed.chosen[7, 1].tolist()))}" in said(saved)
    saved.hover(".key")
    assert said(saved).startswith("Token 1 of") and picture(saved) == before
    saved.click(".text span:nth-child(8)")
    saved.hover(".key")
    assert said(saved).startswith("Token 8 of") and picture(saved) != before
    box = saved.locator("canvas").bounding_box()
    saved.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + 0.05 * box["height"])  # a tile of the highest layer
    saved.hover(".key")
    assert saved.input_value("select.layers") == "1" and saved.input_value("select.experts") != "-1"
    expert = int(saved.input_value("select.experts"))
    visiting = [i for i in range(len(routed.words)) if expert in routed.chosen[i, 1].tolist()]
    marked = saved.eval_on_selector_all(
        ".text span", "spans => spans.flatMap((s, i) => s.classList.contains('visits') ? [i] : [])"
    )
    assert marked == visiting and f"visited by {len(visiting)} tokens" in said(saved)


def test_keys_step_through_tokens_and_layers(saved: Page, explorer: RoutingExplorer) -> None:
    saved.focus("canvas")
    pictures, count = [picture(saved)], len(explorer.shown.words)
    for key, start in {
        "ArrowRight": "Token 2 of",
        "ArrowUp": "Token 2 of",
        "End": f"Token {count} of",
        "ArrowLeft": f"Token {count - 1} of",
        "Home": "Token 1 of",
    }.items():
        saved.keyboard.press(key)
        assert said(saved).startswith(start), key
        pictures.append(picture(saved))
    assert len(set(pictures)) == len(pictures), "every key gave a picture of its own"
    assert saved.input_value("select.layers") == "1"
    saved.keyboard.press("ArrowDown")
    assert saved.input_value("select.layers") == "0" and picture(saved) == pictures[0]
    saved.keyboard.press("ArrowDown")  # there is no layer below
    assert saved.input_value("select.layers") == "0"
    saved.keyboard.press(" ")
    saved.wait_for_function("document.querySelector('.play').textContent.includes('pause')")
    saved.keyboard.press(" ")
    assert "play" in saved.inner_text(".play")
    still = picture(saved)
    saved.wait_for_timeout(300)
    assert picture(saved) == still
    saved.locator(".place").focus()
    saved.keyboard.press("End")
    assert said(saved).startswith(f"Token {count} of")


def test_a_step_is_shown_within_the_bar(saved: Page) -> None:
    """From the key to the painted picture: at most 0.3 s, the best of five (the processor may be busy with other tests)."""
    saved.focus("canvas")
    took = []
    for _ in range(5):
        took.append(
            saved.evaluate("""async () => {
            const start = performance.now();
            document.querySelector("canvas").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
            await nextFrame();
            return performance.now() - start;
        }""")
        )
    assert min(took) < 300, took


def busy_seconds(session: CDPSession) -> float:
    """Processor time of the page's thread so far: what other processes take does not count."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def frames_of_an_empty_page(context: BrowserContext) -> float:
    """Frames a second that this machine has to give at the moment."""
    page = context.new_page()
    count = page.evaluate("""() => new Promise((done) => {
        const start = performance.now();
        let frames = 0;
        const act = (now) => (now - start < 1500 ? (frames++, requestAnimationFrame(act)) : done(frames / 1.5));
        requestAnimationFrame(act);
    })""")
    page.close()
    return count


@pytest.mark.parametrize("pace", ["slow", "fast"])
def test_it_plays_at_thirty_frames_a_second(saved: Page, browser_context: BrowserContext, pace: str) -> None:
    """At any pace: between two tokens the playhead and the halos move.

    The best of three runs counts. Where other processes take so much that an empty page does not get its sixty frames
    either, what counts is the processor time of a frame: half of a thirtieth of a second at most.
    """
    session = browser_context.new_cdp_session(saved)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    rates, loads = [], []
    for _ in range(3):
        saved.select_option("select.pace", "steady")
        saved.select_option("select.pace", pace)  # plays
        saved.wait_for_timeout(200)
        first = picture(saved)
        saved.evaluate("paintings.length = costs.length = 0")
        before = busy_seconds(session)
        saved.wait_for_timeout(2000)
        spent = busy_seconds(session) - before
        times, costs = saved.evaluate("[paintings, costs]")
        assert picture(saved) != first
        assert sorted(costs)[len(costs) // 2] < FRAME, "a painting takes longer than its frame"
        saved.click(".play")
        rates.append(1000 * (len(times) - 1) / (times[-1] - times[0]))
        loads.append(1000 * spent / len(times))
        if rates[-1] >= 30:
            break
        saved.focus("canvas")
        saved.keyboard.press("Home")
    empty = 60.0 if max(rates) >= 30 else frames_of_an_empty_page(browser_context)
    print(
        f"{pace}: {max(rates):.0f} frames a second, {min(loads):.1f} ms of processor each (an empty page: {empty:.0f})"
    )
    assert max(rates) >= 30 or (empty < 50 and min(loads) < FRAME / 2), (rates, loads, empty)


def test_playing_reaches_the_end_and_visits_every_token(saved: Page, explorer: RoutingExplorer) -> None:
    count = len(explorer.shown.words)
    saved.focus("canvas")
    saved.evaluate(
        "place => { place.value = place.max - 12; place.dispatchEvent(new Event('input')); }",
        saved.query_selector(".place"),
    )
    assert said(saved).startswith(f"Token {count - 12} of")
    saved.select_option("select.pace", "fast")
    saved.wait_for_function("document.querySelector('.play').textContent.includes('again')")
    assert said(saved).startswith(f"Token {count} of")
    saved.click(".play")  # again, from the beginning
    saved.wait_for_function("/^Token [1-9] of/.test(document.querySelector('.said').textContent)")


def test_who_wants_no_motion_gets_no_halos(explorer: RoutingExplorer, page: Page, tmp_path: Path) -> None:
    page.emulate_media(reduced_motion="reduce")
    page.goto(explorer.save_html(tmp_path / "routing.html").as_uri())
    page.select_option("select.pace", "slow")
    page.wait_for_function("document.querySelector('.said').textContent.startsWith('Token 2 of')")
    between = """async () => {
        const token = () => document.querySelector(".place").value;
        for (;;) {
            const [stood, before] = [token(), picture()];
            await nextFrame(); await nextFrame();
            if (token() === stood) return picture() === before;
        }
    }"""
    assert page.evaluate(between), "between two tokens nothing moves"


# ---- live --------------------------------------------------------------------------------------------------------------

LIVE = """
MODULE
const listeners = {};
window.sent = []; window.saves = 0;
window.state = STATE;
window.model = {
  get: (name) => state[name],
  set(name, value) { const other = state[name] !== value; state[name] = value; if (other) (listeners["change:" + name] ?? []).forEach((f) => f()); },
  save_changes() { saves++; }, on: (name, f) => (listeners[name] ??= []).push(f),
  off: (name, f) => (listeners[name] = listeners[name].filter((g) => g !== f)), send: (message) => sent.push(message),
};
window.listening = () => Object.values(listeners).flat().length;
window.leave = render({ model, el: document.body });
"""
NAMES = ("samples", "typed", "shares", "often", "domains", "shape", "ramp", "text", "token", "layer", "expert", "note")


def test_a_live_page_tells_and_follows_python(explorer: RoutingExplorer, page: Page) -> None:
    state: dict[str, Any] = {name: getattr(explorer, name) for name in NAMES}
    start = {**state, "typed": {}, "text": 0}
    script = LIVE.replace("MODULE", MODULE.read_text().replace("export default { render };", ""))
    page.goto("about:blank")
    page.set_content("<body></body>")
    page.add_script_tag(content=script.replace("STATE", json.dumps(start)), type="module")
    page.wait_for_selector(".dsv3-routing")
    assert page.locator("select.texts option").all_inner_texts() == ["a story", "code"]

    page.focus("canvas")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("[state.token, state.layer, saves > 0]") == [1, 2, True]
    page.hover(".text span:nth-child(5)")
    assert page.evaluate("state.token") == 1, "hovering tells nobody"
    page.hover(".key")

    page.evaluate("model.set('token', 6)")  # explorer.set(token=6)
    assert said(page).startswith("Token 7 of")
    page.evaluate("model.set('expert', 3)")
    assert page.input_value("select.experts") == "3" and "Expert 3 of layer 2" in said(page)

    field = page.locator("textarea")
    field.fill("A lamp.")
    field.press("ArrowLeft")  # moves in the field, not in the text
    assert said(page).startswith("Token 7 of")
    field.press("Shift+Enter")
    assert page.evaluate("sent") == []
    field.fill("A lamp.")
    field.press("Enter")
    page.focus("canvas")  # leaving the field does not send it twice
    assert page.evaluate("sent") == [{"read": "A lamp."}]
    arrived = "typed => { Object.assign(state, { text: 2, token: 0, expert: -1 }); model.set('typed', typed); }"
    page.evaluate(arrived, state["typed"])  # as explorer.read() sets them
    assert page.locator(".text span").count() == len(explorer.shown.words)
    assert page.locator("select.texts option").all_inner_texts()[-1] == "your text"
    assert page.input_value("select.texts") == "2"
    page.evaluate("model.set('note', 'shorten the text')")
    assert page.inner_text(".note") == "shorten the text"
    page.evaluate("leave()")
    assert page.evaluate("listening()") == 0
