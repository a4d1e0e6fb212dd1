"""The live writer: what it shows is what the model did, in Python, in the picture and in a browser."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from random_models import assert_routing_is_awake, nano, random_model

from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.inference import generate
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.viz.figures.routing import COLUMNS, GATE_MAP, IDLE, visit_figure
from dsv3_mini.viz.widgets import writer as module
from dsv3_mini.viz.widgets.writer import MODULE, Writer, watch

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OPENING = "One rainy morning, Nora"


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(nano(vocab_size=4096)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.shipped()


@pytest.fixture
def writer(model: DeepSeekV3, tokenizer: Tokenizer) -> Writer:
    writer = Writer(model, tokenizer)
    writer.write(OPENING, 12)
    return writer


# ---- what the model did ----------------------------------------------------------------------------------------------


def test_steps_are_what_one_pass_over_the_whole_text_gives(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    prompt = [tokenizer.eos_id, *tokenizer.encode(OPENING)]
    ids = generate(model, torch.tensor([prompt]), max_new_tokens=12, stop_id=tokenizer.eos_id)
    assert_routing_is_awake(model, ids)
    with torch.no_grad():
        output = model(ids)
    steps = list(watch(model, tokenizer, OPENING, 12))
    assert len(steps) == ids.shape[1] - 1 == len(prompt) - 1 + 12
    assert [step["given"] for step in steps] == [True] * (len(prompt) - 1) + [False] * 12
    for position, step in enumerate(steps, start=1):
        assert step["text"] == tokenizer.decode([int(ids[0, position])])
        main = output.routing[: len(step["chosen"])]  # the last is of multi-token prediction
        assert len(main) == model.cfg.num_hidden_layers - model.cfg.first_k_dense_replace
        for layer, chosen, gates in zip(main, step["chosen"], step["gates"], strict=True):
            right = dict(zip(layer.chosen[0, position].tolist(), layer.gates[0, position].tolist(), strict=True))
            assert dict(zip(chosen, gates, strict=True)) == pytest.approx(right, abs=1e-3)
            assert gates == sorted(gates, reverse=True)
        shares = output.logits[0, position].softmax(-1)
        best = int(shares.argmax())
        assert step["next"][0] == (tokenizer.decode([best]), pytest.approx(float(shares[best]), abs=1e-3))
        assert [share for _, share in step["next"]] == sorted((share for _, share in step["next"]), reverse=True)


def test_it_ends_where_the_document_does(
    model: DeepSeekV3, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = iter([5, 6, tokenizer.eos_id, 7])
    monkeypatch.setattr(module, "choose", lambda *_: torch.tensor([next(tokens)]))
    steps = list(watch(model, tokenizer, "x", 10))
    assert [step["text"] for step in steps] == ["x", tokenizer.decode([5]), tokenizer.decode([6])]


def test_it_stops_at_the_models_context(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    long = "and " * 250
    assert len(tokenizer.encode(long)) < 256
    assert len(list(watch(model, tokenizer, long, 100))) == model.cfg.max_position_embeddings - 1
    with pytest.raises(DataError, match="shorten it"):
        next(watch(model, tokenizer, "and " * 300))


def test_temperature_draws_the_same_text_each_time(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    first, second = (Writer(model, tokenizer, temperature=1.0).write(OPENING, 8) for _ in range(2))
    assert first == second != Writer(model, tokenizer).write(OPENING, 8)


# ---- the widget ------------------------------------------------------------------------------------------------------


def test_steps_reach_the_page_while_they_are_made(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    writer, seen = Writer(model, tokenizer), []
    writer.observe(lambda change: seen.append((len(change.new), writer.writing, writer.run)), names="steps")
    writer.write(OPENING, 100)
    lengths = [length for length, _, _ in seen]
    assert lengths[0] == 1 and lengths == sorted(set(lengths)) and lengths[-1] == len(writer.steps)
    assert len(lengths) > 8 and sum(lengths) <= 6 * len(writer.steps)
    assert all(writing for _, writing, _ in seen[:-1]) and not writer.writing
    assert writer.text == "".join(step["text"] for step in writer.steps) and writer.text.startswith(OPENING)


def test_another_text_begins_anew(writer: Writer) -> None:
    writer.show(3)
    runs = writer.run
    writer.write("After lunch,", 3)
    assert writer.run == runs + 1 and writer.cursor == -1
    assert writer.text.startswith("After lunch,") and sum(not step["given"] for step in writer.steps) == 3
    writer.write("", 2)
    assert len(writer.steps) == 2 and not any(step["given"] for step in writer.steps)


def test_a_page_asks_for_another_text(writer: Writer) -> None:
    writer._asked(writer, {"write": "After lunch,"}, [])
    assert writer.text.startswith("After lunch,") and writer.note == ""
    writer._asked(writer, {"write": "and " * 300}, [])
    assert "shorten it" in writer.note and writer.text.startswith("After lunch,")  # what stood there stays
    for nonsense in ({}, {"write": 3}, "write", None):
        writer._asked(writer, nonsense, [])
    writer._asked(writer, {"write": "Once"}, [])
    assert writer.note == ""


def test_standing_on_a_token(writer: Writer) -> None:
    given = sum(step["given"] for step in writer.steps)
    assert writer.cursor == -1 and writer.here == given  # the first that the model wrote
    writer.show(2)
    assert writer.here == 2
    writer.show(-1)
    assert writer.here == len(writer.steps) - 1
    for token in (len(writer.steps), -len(writer.steps) - 1):
        with pytest.raises(DataError, match="is not there"):
            writer.show(token)


def test_it_shows_something_without_a_kernel(model: DeepSeekV3, tokenizer: Tokenizer, writer: Writer) -> None:
    data, _ = writer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in data and "2 rows of 8 experts" in data["text/plain"]
    empty = Writer(model, tokenizer)
    assert "image/png" not in empty._repr_mimebundle_()[0]
    with pytest.raises(DataError, match="nothing has been written"):
        empty.figure()


def test_the_picture_changes_with_the_token(writer: Writer) -> None:
    pictures = set()
    for token in range(4):
        writer.show(token)
        pictures.add(writer._repr_mimebundle_()[0]["image/png"])
    assert len(pictures) == 4


# ---- the picture -----------------------------------------------------------------------------------------------------


def by_gid(figure: Figure) -> dict[str, Any]:
    found = [artist for axes in figure.axes for artist in (*axes.patches, *axes.texts)]
    return {artist.get_gid(): artist for artist in found if artist.get_gid()}


def test_the_picture_shows_the_tokens_experts(writer: Writer) -> None:
    writer.show(4)
    step, artists = writer.steps[4], by_gid(writer.figure())
    largest = max(gate for each in writer.steps for row in each["gates"] for gate in row)
    for row, (chosen, gates) in enumerate(zip(step["chosen"], step["gates"], strict=True)):
        for expert in range(8):
            weight = dict(zip(chosen, gates, strict=True)).get(expert)
            wanted = IDLE if weight is None else to_hex(matplotlib.colormaps[GATE_MAP](weight / largest))
            assert to_hex(artists[f"layer-{row + 1}-expert-{expert}"].get_facecolor()) == to_hex(wanted)
    assert "2 of 8 experts" in writer.figure().get_suptitle()


def test_the_picture_marks_one_token_of_the_text(writer: Writer) -> None:
    writer.show(4)
    artists = by_gid(writer.figure())
    words = [artists[f"token-{i}"].get_text() for i in range(len(writer.steps))]
    assert "".join(words) == writer.text.replace("\n", "¶")
    assert [i for i in range(len(words)) if artists[f"token-{i}"].get_bbox_patch() is not None] == [4]


def test_long_texts_are_broken_into_lines() -> None:
    words = [" word"] * 40 + [".\n", "Question", ":"]
    gates = torch.tensor([[1.0, 0.5]])
    figure = visit_figure(words, 3, 5, torch.tensor([[0, 3]]), gates, 4, 2, 1, [(" a", 0.5)])
    places = [by_gid(figure)[f"token-{i}"].get_position() for i in range(len(words))]
    assert max(x + len(word) for (x, _), word in zip(places, words, strict=True)) <= COLUMNS
    assert len(set(places)) == len(words)
    assert places[41] == (0, places[40][1] + 1)  # a line break breaks the line


def test_words_are_large_enough(writer: Writer) -> None:
    assert min(text.get_fontsize() for axes in writer.figure().axes for text in axes.texts) >= 11


# ---- the page --------------------------------------------------------------------------------------------------------


def test_a_saved_page_needs_nothing_else(writer: Writer, tmp_path: Path) -> None:
    page = writer.save_html(tmp_path / "story.html").read_text()
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "import " not in page and "export " not in page
    assert json.dumps(writer.steps[3]["text"])[1:-1] in page


def test_no_token_ends_the_script(writer: Writer, tmp_path: Path) -> None:
    writer.write("</script><script>", 2)
    page = writer.save_html(tmp_path / "story.html").read_text()
    assert page.count("</script>") == 1 and page.count("<script") == 1


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert not errors


def tiles(page: Page) -> list[str]:
    return page.eval_on_selector_all("svg .tile", "tiles => tiles.map((tile) => tile.getAttribute('fill'))")


@pytest.mark.browser
def test_a_saved_page_plays_steps_and_shows(writer: Writer, tmp_path: Path, page: Page) -> None:
    page.goto(writer.save_html(tmp_path / "story.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.text span').length > 2")  # it plays by itself
    page.click(".play")
    shown = page.locator(".text span").count()
    page.wait_for_timeout(500)
    assert page.locator(".text span").count() == shown  # and pauses
    page.click("button[aria-label='One token on']")
    assert page.locator(".text span").count() == shown + 1
    page.keyboard.press("ArrowLeft")
    assert page.locator(".text span.here").inner_text().strip() == writer.steps[shown - 1]["text"].strip()

    for token in (0, 3):
        page.click(f".text span:nth-child({token + 1})")
        step = writer.steps[token]
        assert f"layer 2: {', '.join(map(str, step['chosen'][1]))}." in page.inner_text(".said")
        lit = [i for i, fill in enumerate(tiles(page)[1:9]) if fill != "#F4F4F4"]  # tile 0 is the dense layer
        assert lit == sorted(step["chosen"][0])
        assert f"{step['next'][0][1]:.0%}"[:-1] in page.text_content("svg")

    before = tiles(page)
    page.hover(".text span:nth-child(1)")
    assert tiles(page) != before
    page.hover(".key")
    assert tiles(page) == before

    page.locator(".place").focus()
    page.keyboard.press("End")
    assert page.inner_text(".text").replace("¶", "").split() == writer.text.split()
    assert "again" in page.inner_text(".play")
    page.select_option("select", "fast")  # plays again
    page.wait_for_function("document.querySelector('.said').textContent.includes('Token 5 of')")
    page.wait_for_function("document.querySelector('.play').textContent.includes('again')")
    assert page.locator("input[type=text]").count() == 0  # without a kernel nobody could write on


LIVE = """
MODULE
const listeners = {};
window.sent = []; window.saved = [];
window.state = STATE;
window.model = {
  get: (name) => state[name],
  set(name, value) { state[name] = value; saved.push([name, value]); (listeners["change:" + name] ?? []).forEach((f) => f()); },
  save_changes() {}, on: (name, f) => (listeners[name] ??= []).push(f),
  off: (name, f) => (listeners[name] = listeners[name].filter((g) => g !== f)), send: (message) => sent.push(message),
};
window.listening = () => Object.values(listeners).flat().length;
window.leave = render({ model, el: document.body });
"""


@pytest.mark.browser
def test_a_live_page_follows_python(writer: Writer, page: Page) -> None:
    steps = writer.steps
    state = {
        "shape": writer.shape,
        "ramp": writer.ramp,
        "steps": [],
        "writing": True,
        "run": 1,
        "cursor": -1,
        "note": "",
    }
    script = LIVE.replace("MODULE", MODULE.read_text().replace("export default { render };", ""))
    page.set_content("<body></body>")
    page.add_script_tag(content=script.replace("STATE", json.dumps(state)), type="module")
    page.wait_for_selector(".dsv3-writer")
    assert "Nothing" in page.inner_text(".said")
    page.select_option("select", "fast")
    page.evaluate("steps => model.set('steps', steps)", steps[:3])  # three tokens have come
    page.wait_for_function("document.querySelectorAll('.text span').length === 3")
    page.wait_for_timeout(300)
    assert "pause" in page.inner_text(".play")  # it waits for more
    page.evaluate("steps => { model.set('steps', steps); model.set('writing', false); }", steps)
    page.wait_for_function("document.querySelector('.play').textContent.includes('again')")
    assert page.evaluate("state.cursor") == len(steps) - 1  # Python is told where one stands
    page.evaluate("model.set('cursor', 2)")  # writer.show(2)
    assert page.inner_text(".said").startswith("Token 3 of")

    field = page.locator("input[type=text]")
    field.fill("After lunch,")
    field.press("Enter")
    field.press("ArrowLeft")  # moves in the field, not in the text
    assert page.evaluate("sent") == [{"write": "After lunch,"}] and page.inner_text(".said").startswith("Token 3 of")
    page.evaluate("model.set('note', 'shorten it')")
    assert page.inner_text(".note") == "shorten it"
    page.evaluate("steps => { state.steps = steps; model.set('run', 2); }", steps[:1])
    page.wait_for_function("document.querySelectorAll('.text span').length === 1")
    page.evaluate("leave()")
    assert page.evaluate("listening()") == 0


@pytest.mark.browser
def test_who_wants_no_motion_gets_none(writer: Writer, tmp_path: Path, page: Page) -> None:
    page.emulate_media(reduced_motion="reduce")
    page.goto(writer.save_html(tmp_path / "story.html").as_uri())
    assert page.locator(".text span").count() == len(writer.steps)
    assert "again" in page.inner_text(".play")
