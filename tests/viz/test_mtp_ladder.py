"""Lesson 11's pictures, read back from their artists; its ladder, moved as a reader would."""

from __future__ import annotations

from typing import Any

import matplotlib
import pytest
import torch
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.figure import Figure
from nano_runs import small_tokenizer
from random_models import nano, random_model

from dsv3_mini.errors import DataError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.mtp import (
    COLUMNS,
    QUIET,
    RIGHT,
    Rung,
    chain_figure,
    ladder_figure,
    reach_figure,
    readers_figure,
)
from dsv3_mini.viz.figures.tokens import shown
from dsv3_mini.viz.widgets import mtp as widgets
from dsv3_mini.viz.widgets.mtp import BEST, CAME, OTHER, beliefs, ladder_explorer, sample_texts

WORDS = list("abcdefghijklmnopqrst")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]


def by_gid(figure: Figure, gid: str) -> list[Any]:
    return figure.findobj(lambda artist: artist.get_gid() == gid)


# ---- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", [1, 3])
def test_chain_figure_says_what_every_box_reads_and_predicts(depths: int) -> None:
    shown_texts = texts(chain_figure(WORDS[:6], depths))
    for j in range(depths + 1):
        for i in range(5 - j):
            assert f"reads: {WORDS[i + j]}" in shown_texts and f"→ {WORDS[i + j + 1]}" in shown_texts
    boxes = sum(5 - j for j in range(depths + 1))
    assert sum(text.startswith("reads: ") for text in shown_texts) == boxes
    assert {"main model", *(f"depth {j}" for j in range(1, depths + 1))} <= set(shown_texts)


def rungs_of(depths: int) -> list[Rung]:
    random = torch.Generator().manual_seed(5)
    return [
        Rung(
            j,
            [f"g{j}.{i}" for i in range(len(WORDS) - 1 - j)],
            torch.rand(len(WORDS) - 1 - j, generator=random).tolist(),
        )
        for j in range(depths + 1)
    ]


def a_ladder(position: int, read: str | None = None, depths: int = 2) -> Figure:
    best = [[(WORDS[position + 1 + j], 0.5), (f"no {j}", 0.25)] for j in range(depths + 1)]
    return ladder_figure(WORDS, rungs_of(depths), position, read or WORDS[position + 1], best)


@pytest.mark.parametrize("position", [1, 9, 16])
def test_ladder_puts_every_guess_under_the_token_that_it_is_about(position: int) -> None:
    figure = a_ladder(position)
    axes = figure.axes[0]
    columns = [round(text.get_position()[0]) for text in by_gid(figure, "word")]
    assert len(columns) == COLUMNS and columns == list(range(columns[0], columns[0] + COLUMNS))
    assert {position, position + 3} <= set(columns), "all rungs of the position are in the picture"
    blues = matplotlib.colormaps["Blues"]
    for rung in rungs_of(2):
        for column in columns:
            cells = by_gid(figure, f"depth {rung.depth} about {column}")
            at = column - 1 - rung.depth
            if at < 0:
                assert cells == []
                continue
            (cell,) = cells
            assert cell.get_xy() == (column - 0.5, -rung.depth - 1.5)
            assert cell.get_facecolor() == pytest.approx(blues(0.9 * rung.right[at]))
            near = [t.get_text() for t in axes.texts if t.get_position()[0] == column
                    and abs(t.get_position()[1] + rung.depth + 1) < 0.5]  # fmt: skip
            assert near == [rung.guesses[at], f"{rung.right[at]:.2f}"]
    frames = {frame.get_xy() for frame in by_gid(figure, "frame")}
    assert frames == {(position + row - 0.5, -row - 0.5) for row in range(4)}


def test_ladder_shows_beliefs_as_bars_and_the_token_that_came_in_green() -> None:
    figure = a_ladder(5)
    assert len(figure.axes) == 4
    for j, panel in enumerate(figure.axes[1:]):
        assert [bar.get_width() for bar in panel.patches] == [0.5, 0.25]
        colours = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in panel.patches]
        assert colours == [RIGHT, QUIET]
        assert [label.get_text() for label in panel.get_yticklabels()] == [WORDS[6 + j], f"no {j}"]
    assert [panel.get_title(loc="left") for panel in figure.axes[1:]] == [
        "main model, after f",
        "depth 1, after f g",
        "depth 2, after f g h",
    ]


def test_ladder_says_when_another_token_is_read() -> None:
    assert not any("read:" in text for text in texts(a_ladder(5)))
    other = a_ladder(5, read="zebra")
    assert "read: zebra" in texts(other)
    assert other.axes[3].get_title(loc="left") == "depth 2, after f zebra h"


def test_long_tokens_and_dollars_fit_their_column() -> None:
    words = ["x" * 40, "$", *WORDS]
    figure = ladder_figure(words, [Rung(0, words[1:], [0.5] * 21)], 1, "a", [[("$" * 30, 0.5)]])
    assert max(len(text.get_text()) for text in by_gid(figure, "word")) <= 11
    assert png(figure)  # a formula that is none would raise here


def test_readers_figure_draws_every_number() -> None:
    figure = readers_figure({"main": 1.25, "depth": 1.5, "blind": 2.75}, "A title")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1.25, 1.5, 2.75]
    assert {"main", "depth", "blind", "1.25", "2.75", "A title"} <= set(texts(figure))


def test_reach_figure_tells_all_some_and_none_apart() -> None:
    figure = reach_figure({"one": {"a": (3, 3), "b": (0, 4)}, "two": {"a": (3, 3), "b": (2, 4)}})
    assert [text.get_text() for text in figure.axes[0].texts] == ["3 of 3", "0 of 4", "3 of 3", "2 of 4"]
    fills = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert fills[0] == fills[2] and len(set(fills)) == 3


# ---- the explorer ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(nano(num_nextn_predict_layers=2))


TEXTS = {"one": "Nora gave the red lamp to Leon.", "two": "Then Leon went home with it."}


def test_beliefs_are_the_models_and_know_no_later_token(model: DeepSeekV3) -> None:
    ids = list(range(40, 60))
    told = beliefs(model, ids)
    with torch.no_grad():
        out = model(torch.tensor([ids]))
    for depth, logits in enumerate((out.logits, *out.mtp_logits)):
        assert told[depth].shape == (20 - depth, model.cfg.vocab_size)
        torch.testing.assert_close(told[depth].log(), logits[0].log_softmax(-1), rtol=1e-4, atol=1e-4)
    changed = beliefs(model, [*ids[:11], 300, *ids[12:]])  # token 11
    for depth, (old, new) in enumerate(zip(told, changed, strict=True)):
        moved = (old.log() - new.log()).abs().amax(-1)
        assert (moved[: 11 - depth] < 5e-5).all() and (moved[11 - depth :] > 1e-4).all()


def test_every_control_moves_the_picture_and_back(model: DeepSeekV3) -> None:
    state = torch.get_rng_state()
    explorer = ladder_explorer(model, small_tokenizer(), TEXTS)
    assert_every_control_moves_the_picture_and_back(explorer, {"text": "two", "position": 2, "reads": OTHER})
    assert torch.equal(torch.get_rng_state(), state), "the reader's random numbers are his own"


def test_explorer_draws_what_the_model_believes(model: DeepSeekV3, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(widgets, "ladder_figure", lambda *given: drawn.append(given) or Figure(figsize=(1, 1)))
    tokenizer = small_tokenizer()
    explorer = ladder_explorer(model, tokenizer, TEXTS)
    ids = [tokenizer.eos_id, *tokenizer.encode(TEXTS["one"])]
    told = beliefs(model, ids)
    explorer.set(position=3)
    words, rungs, position, read, best = drawn[-1]
    assert words == [shown(tokenizer.token_bytes(i)) for i in ids] and position == 3 and read == words[4]
    for depth, rung in enumerate(rungs):
        assert rung.depth == depth and len(rung.guesses) == len(rung.right) == len(ids) - 1 - depth
        for i, share in enumerate(rung.right):
            assert share == pytest.approx(float(told[depth][i, ids[i + depth + 1]]))
            assert rung.guesses[i] == shown(tokenizer.token_bytes(int(told[depth][i].argmax())))
        likeliest = told[depth][3].sort(descending=True)
        assert [p for _, p in best[depth]] == pytest.approx(likeliest.values[:BEST].tolist())
    explorer.set(reads=OTHER)
    _, other_rungs, _, other_read, other_best = drawn[-1]
    assert other_read != words[4] and other_best[0] == best[0]
    assert other_best[1] != best[1] and other_best[2] != best[2]
    assert other_rungs[0] == rungs[0]
    for old, new in zip(rungs[1:], other_rungs[1:], strict=True):
        assert [i for i, pair in enumerate(zip(old.right, new.right, strict=True)) if pair[0] != pair[1]] == [3]


def test_explorer_goes_as_far_as_the_shortest_text_has_tokens(model: DeepSeekV3) -> None:
    tokenizer = small_tokenizer()
    explorer = ladder_explorer(model, tokenizer, TEXTS)
    tokens = min(len(tokenizer.encode(text)) for text in TEXTS.values())
    assert explorer.controls["position"].max == tokens - 3
    explorer.set(text="two", position=tokens - 3, reads=OTHER)
    explorer.set(text="one", reads=CAME)


def test_a_model_or_a_text_that_has_no_ladder_is_refused(model: DeepSeekV3) -> None:
    with pytest.raises(DataError, match="'short' has 2 tokens: at least 4"):
        ladder_explorer(model, small_tokenizer(), {"short": "a!"})
    with pytest.raises(DataError, match="no MTP module"):
        ladder_explorer(random_model(nano(num_nextn_predict_layers=0)), small_tokenizer(), TEXTS)


def test_the_sample_texts_are_long_enough_for_the_ladder() -> None:
    tokenizer = small_tokenizer()
    assert len(sample_texts()) == 4 and all(len(tokenizer.encode(text)) >= 20 for text in sample_texts().values())
