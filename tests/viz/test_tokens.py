"""Pictures of tokens: what is drawn is what the tokenizer made, and every control moves the explorer's picture."""

from __future__ import annotations

import base64
import random
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsv3_mini.data.bpe import pre_tokenize
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.viz.figures.tokens import (
    COLUMNS,
    FONT,
    MAX_LINES,
    TINTS,
    belief_figure,
    boundary_figure,
    boundary_share,
    lay_out,
    shown,
    tokens_figure,
    vocabulary_figure,
)
from dsv3_mini.viz.widgets.explorer import png
from dsv3_mini.viz.widgets.tokens import token_explorer

TOKENIZER = Tokenizer.shipped()


def cut(text: str) -> list[bytes]:
    return [TOKENIZER.token_bytes(id_) for id_ in TOKENIZER.encode(text)]


def as_bytes(text: str) -> list[bytes]:
    return [bytes([byte]) for byte in text.encode()]


def boxes(figure: Figure) -> list[tuple[str, Rectangle]]:
    """Each token's text with the rectangle under it."""
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts if text.get_family() == [FONT]]
    return list(zip(texts, axes.patches, strict=True))


def words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_family() != [FONT]]


@pytest.mark.parametrize(
    "token, text",
    [
        (b" the", "·the"),
        (b".\n\n", ".↵↵"),
        (b"\t", "→"),
        (b"\xc3", r"\xC3"),
        ("é".encode(), "é"),
        ("中".encode(), r"\xE4\xB8\xAD"),  # the font has no such sign
        (b"a\xf0\x9f", r"a\xF0\x9F"),
        (b"\x00\r", r"\x00\x0D"),
        ("\u00a0".encode(), r"\xC2\xA0"),  # a blank that would not be seen
        (b"$x$", "$x$"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(token: bytes, text: str) -> None:
    assert shown(token) == text


@given(st.lists(st.sampled_from([b"a", b" dog", b"\n", b".\n", b"\xff", b"x" * 75, b"12345678901"]), max_size=60))
def test_the_layout_holds_every_token_in_order_and_never_overlaps(tokens: list[bytes]) -> None:
    placed = lay_out(tokens)
    assert "".join(box.text for box in placed) == "".join(map(shown, tokens))
    assert [box.token for box in placed] == sorted(box.token for box in placed)
    for one, two in zip(placed, placed[1:], strict=False):
        follows = one.line == two.line and two.column == one.column + len(one.text)
        assert follows or (two.line == one.line + 1 and two.column == 0)
        if tokens[one.token].endswith(b"\n") and one.token != two.token:
            assert two.line == one.line + 1
    assert all(box.column + len(box.text) <= COLUMNS for box in placed)


def test_the_figure_shows_the_tokens_and_their_counts() -> None:
    text = "Nora's naïve dog.\nTwo $ signs $ and 🙂"
    cuts = {"bytes": as_bytes(text), "shipped": cut(text)}
    figure = tokens_figure(cuts)
    drawn = boxes(figure)
    assert [text for text, _ in drawn] == [shown(token) for tokens in cuts.values() for token in tokens]
    for text_, box in drawn:
        assert box.get_width() == len(text_)
    n = len(cuts["bytes"])
    for (_, one), (_, two) in zip(drawn[: n - 1], drawn[1:n], strict=True):
        assert one.get_facecolor() != two.get_facecolor()
    assert {to_hex(box.get_facecolor()).upper() for _, box in drawn} == set(TINTS)
    said = words(figure)
    assert said[0] == f"{n} bytes of text in {n} or {len(cuts['shipped'])} tokens"
    assert {"bytes", "shipped", f"{n} tokens", "1.00 bytes each", f"{len(cuts['shipped'])} tokens"} <= set(said)
    assert f"{n / len(cuts['shipped']):.2f} bytes each" in said


def test_each_row_counts_its_own_bytes_and_a_title_may_be_given() -> None:
    said = words(tokens_figure({"a": [b"ab", b"cd"], "b": [b"abcdef"]}, title="Two $texts$"))
    assert said == ["Two $texts$", "a", "2 tokens", "2.00 bytes each", "b", "1 token", "6.00 bytes each"]


def test_boxes_lie_under_their_text_and_inside_the_picture() -> None:
    figure = tokens_figure({"bytes": as_bytes("ab\n" * 10), "again": as_bytes("x" * 130)})
    figure.canvas.draw()
    (axes,) = figure.axes
    edge = figure.bbox
    for text, box in zip([t for t in axes.texts if t.get_family() == [FONT]], axes.patches, strict=True):
        ink, under = text.get_window_extent(), box.get_window_extent()
        assert abs(ink.x0 - under.x0) < 3 and abs(ink.x1 - under.x1) < 3
        assert under.y0 - 1 < (ink.y0 + ink.y1) / 2 < under.y1 + 1
        assert edge.x0 <= under.x0 and under.x1 <= edge.x1 and edge.y0 <= under.y0 and under.y1 <= edge.y1
    for text in axes.texts:
        assert edge.x0 <= text.get_window_extent().x0 and text.get_window_extent().x1 <= edge.x1


def test_a_long_text_is_cut_off_and_says_so() -> None:
    figure = tokens_figure({"bytes": as_bytes("a" * 1000)})
    assert len(boxes(figure)) == MAX_LINES * COLUMNS
    assert f"{1000 - MAX_LINES * COLUMNS} not drawn" in words(figure)


def test_no_text_and_any_text_draw_without_a_warning() -> None:
    rng = random.Random(0)
    wild = "".join(chr(rng.choice([*range(32, 0x3000), *range(0x1F300, 0x1F600)])) for _ in range(200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(png(tokens_figure({"bytes": [], "again": []}))) > 0
        assert len(png(tokens_figure({"bytes": as_bytes(wild), "shipped": cut(wild)}))) > 0
        assert len(png(tokens_figure({"words": [word.encode() for word in pre_tokenize(wild)]}))) > 0


def test_the_vocabulary_figure_has_a_line_and_a_name_for_each_text() -> None:
    data = {"stories": [1.0, 2.0, 4.0], "German": [1.0, 1.2, 1.4], "sums": [1.0, 1.3, 1.41]}
    (axes,) = vocabulary_figure([256, 512, 1024], data).axes
    lines = {tuple(line.get_ydata()): line for line in axes.lines}
    assert set(lines) == {tuple(values) for values in data.values()}
    assert len({line.get_color() for line in axes.lines}) == 3
    assert all(list(line.get_xdata()) == [256, 512, 1024] for line in axes.lines)
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert set(heights) == set(data)
    assert heights["sums"] - heights["German"] > 0.2 and heights["stories"] == 4.0
    for text in axes.texts:
        assert text.get_color() == lines[tuple(data[text.get_text()])].get_color()


def test_the_boundary_figure_draws_the_formula_and_what_was_counted() -> None:
    measured = {0.0: 0.0, 0.5: 0.07, 1.0: 0.13}
    (axes,) = boundary_figure(0.125, measured).axes
    truth, curve, dots = axes.lines
    assert set(truth.get_ydata()) == {0.125}
    assert curve.get_ydata()[0] == 0 and curve.get_ydata()[-1] == pytest.approx(0.125)
    assert dict(zip(dots.get_xdata(), dots.get_ydata(), strict=True)) == measured


def test_the_belief_figure_draws_each_place_beside_the_formula() -> None:
    by_bytes, by_tokens = [0.2, 0.5, 0.9], [0.02, 0.1, 0.4]
    (axes,) = belief_figure(by_bytes, by_tokens, 0.1).axes
    unbiased, curve, dots = axes.lines
    assert list(unbiased.get_xdata()) == list(unbiased.get_ydata())
    assert [curve.get_ydata()[i] for i in (0, 100, 200)] == pytest.approx([0, 1 / 11, 1])
    assert (list(dots.get_xdata()), list(dots.get_ydata())) == (by_bytes, by_tokens)
    assert "r = 0.1" in axes.get_legend().get_texts()[1].get_text()


@given(st.floats(0.01, 0.99), st.floats(0.01, 1))
def test_a_split_rate_multiplies_the_odds(truth: float, rate: float) -> None:
    share = boundary_share(truth, rate)
    assert share / (1 - share) == pytest.approx(rate * truth / (1 - truth))


# ---- the widget ----------------------------------------------------------------------------------------------------------


def test_every_control_moves_the_picture() -> None:
    explorer = token_explorer({"bytes": as_bytes, "shipped": cut, "halves": lambda text: [text.encode()]}, "the dog\n")
    assert explorer.values == {"text": "the dog\n", "first": "bytes", "second": "halves"}
    pictures = [explorer.picture.value]
    for change in (
        {"text": "another dog"},
        {"first": "halves"},
        {"second": "shipped"},
        {"first": "shipped"},
        {"text": ""},
    ):
        explorer.set(**change)
        pictures.append(explorer.picture.value)
    assert len(set(pictures)) == len(pictures)
    assert all(bytes(picture).startswith(b"\x89PNG") for picture in pictures)


def test_the_first_choices_may_be_given() -> None:
    explorer = token_explorer({"bytes": as_bytes, "shipped": cut}, "a", first="shipped", second="bytes")
    assert (explorer.values["first"], explorer.values["second"]) == ("shipped", "bytes")
    assert "again" not in " ".join(words(explorer.draw(**explorer.values)))


def test_a_tokenizer_beside_itself_has_two_rows() -> None:
    explorer = token_explorer({"bytes": as_bytes, "shipped": cut}, "the dog", first="shipped", second="shipped")
    figure = explorer.draw(**explorer.values)
    assert {"shipped", "shipped, again"} <= set(words(figure))
    assert [text for text, _ in boxes(figure)] == [shown(token) for token in cut("the dog")] * 2


def test_a_page_without_a_kernel_has_the_picture_and_a_sentence() -> None:
    explorer = token_explorer({"bytes": as_bytes}, "a")
    data, _ = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == bytes(explorer.picture.value)
    assert "tokens" in data["text/plain"] and "\n" not in data["text/plain"]
