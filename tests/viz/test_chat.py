"""The chat: what is on the page is what the model said, in the colours of where it came from."""

from __future__ import annotations

import base64
import re
from html import unescape

import pytest
from matplotlib.colors import to_rgb
from random_models import nano, of_few_words, random_model

from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.inference.conversation import Conversation
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.marked_text import MEANS, PAPER, Kind, marked_text_figure
from dsv3_mini.viz.widgets.chat import Chat

STORY, ASK = "Tom had <b>lamp</b> & $2.", "Who has the lamp?"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.shipped()


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return of_few_words()


@pytest.fixture
def chat(model: DeepSeekV3, tokenizer: Tokenizer) -> Chat:
    return Chat(model, tokenizer, STORY, max_new_tokens=40)


def spans(chat: Chat) -> list[tuple[str, str]]:
    """(kind, text) as they stand on the page, the key left out."""
    log = chat.page.value.split("</div>")[0]
    return [
        (kind, unescape(text))
        for kind, text in re.findall(r"<span class='(\w+)' style='[^']*'>(.*?)</span>", log, re.S)
    ]


def test_the_page_shows_what_was_said(chat: Chat, model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    assert spans(chat) == [("given", STORY)]
    answer = chat.say(ASK)
    other = Conversation(model, tokenizer, 0, **chat.settings)
    other.ids = [tokenizer.eos_id, *tokenizer.encode(STORY)]
    pieces = list(other.say(ASK))
    assert answer == "".join(piece.text for piece in pieces) and chat.text == other.text
    shown = spans(chat)
    assert "".join(text for kind, text in shown if kind != "refused") == other.text
    assert [text for kind, text in shown if kind == "drafted"] == [piece.text for piece in pieces if piece.drafted]
    assert [text for kind, text in shown if kind == "refused"] == [p.refused for p in pieces if p.refused is not None]
    held, checked = other.counts.held[0], other.counts.checked[0]
    assert 0 < held <= checked and f"{held} of {checked} drafts held" in chat.page.value


def test_a_control_has_the_last_line_answered_again(chat: Chat) -> None:
    chat.say("a")
    chat.say("b")
    turns, first = len(chat._turns), chat.page.value
    for name, value in {"temperature": 1.4, "top_p": 0.2, "drafts": 3}.items():
        before = chat.page.value
        chat.set(**{name: value})
        assert chat.page.value != before and len(chat._turns) == turns, name
    chat.set(temperature=0.6, top_p=0.95, drafts=1)
    assert chat.page.value == first


def test_without_drafts_the_greedy_text_is_the_same_and_nothing_is_coloured(chat: Chat) -> None:
    chat.set(temperature=0)
    chat.say("a")
    with_drafts = chat.text
    assert {"drafted", "own", "refused"} <= {kind for kind, _ in spans(chat)}
    chat.set(drafts=0)
    assert chat.text == with_drafts and {kind for kind, _ in spans(chat)} == {"given", "own"}
    assert "1.00 tokens a pass" in chat.summary


def test_a_typed_line_is_said_and_the_box_is_empty_again(chat: Chat) -> None:
    chat.line.value = "a"
    assert chat.line.value == "" and chat.text.startswith(STORY + " a") and len(spans(chat)) > 3
    chat.anew.click()
    assert spans(chat) == [("given", STORY)]


def test_a_full_text_says_so_on_the_page(chat: Chat) -> None:
    chat.say("and " * 300)
    assert "begin a new one" in chat.page.value and chat.text == STORY
    chat.restart()
    assert "begin a new one" not in chat.page.value


def test_a_model_without_mtp_has_no_drafts(tokenizer: Tokenizer) -> None:
    chat = Chat(random_model(nano(vocab_size=4096, num_nextn_predict_layers=0)), tokenizer, max_new_tokens=4)
    assert chat.controls["drafts"].disabled and chat.say("a") and "1.00 tokens a pass" in chat.summary


def test_without_a_kernel_there_is_a_picture_of_it(chat: Chat) -> None:
    empty, _ = Chat(chat.model, chat.tokenizer)._repr_mimebundle_()
    chat.say("a")
    bundle, _ = chat._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == png(chat.figure()) != base64.b64decode(empty["image/png"])
    assert "struck through" in bundle["text/plain"]


def test_the_figure_marks_each_token() -> None:
    words, kinds = ["Tom ", "a\n", "b\n", "$"], list[Kind](["given", "drafted", "refused", "own"])
    figure = marked_text_figure(words, kinds, "title")
    drawn = {
        text.get_gid(): text for text in figure.findobj(lambda artist: str(artist.get_gid() or "").count("-") == 1)
    }
    assert list(drawn) == [f"{kind}-{number}" for number, kind in enumerate(kinds)]
    assert [text.get_text() for text in drawn.values()] == ["Tom ", "a¶", "b¶", r"\$"]
    for kind, text in zip(kinds, drawn.values(), strict=True):
        assert text.get_bbox_patch().get_facecolor()[:3] == to_rgb(PAPER[kind])
    lines = [text.get_position()[1] for text in drawn.values()]
    assert lines == [0, 0, 1, 1], "the break of a token that was refused breaks no line"
    assert len(figure.axes[0].lines) == 1
    said = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert set(MEANS.values()) <= said
