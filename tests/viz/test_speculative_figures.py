"""Lesson 22's pictures, read back from their artists; its explorer, moved as a reader would."""

from __future__ import annotations

import pytest
from explorers import assert_every_control_moves_the_picture_and_back
from random_models import nano, of_few_words, random_model

from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.inference import complete
from dsv3_mini.inference.watching import Pass, watch
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.viz.figures.speculative import pass_cost_figure, rule_figure, speed_figure, tokens_per_pass_figure
from dsv3_mini.viz.widgets.speculative import draft_explorer, judged, marked

OPENING = "Tom"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.shipped()


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return of_few_words()


def test_rule_figure_stacks_what_is_kept_what_falls_and_what_is_lacking() -> None:
    p, q = [0.5, 0.3, 0.2], [0.2, 0.6, 0.2]
    kept, falls, lacking = rule_figure(["a", "b", "c"], p, q).axes[0].containers
    assert [bar.get_height() for bar in kept] == pytest.approx([0.2, 0.3, 0.2])
    assert [bar.get_height() for bar in falls] == pytest.approx([0, 0.3, 0])
    assert [bar.get_height() for bar in lacking] == pytest.approx([0.3, 0, 0])
    assert [bar.get_y() for bar in lacking] == pytest.approx([0.2, 0.3, 0.2])


def test_tokens_per_pass_figure_shows_both_numbers_and_the_ceiling() -> None:
    axes = tokens_per_pass_figure({1: 1.8, 3: 2.5}, {1: 1.9, 3: 2.6}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [1.8, 2.5]
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.9, 2.6], [2, 4]]


def test_pass_cost_figure_draws_a_line_for_each_context() -> None:
    axes = pass_cost_figure((1, 4), {"short": [1.5, 1.1], "long": [1.6, 1.4]}, "title").axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn["short"] == [1.5, 1.1] and drawn["long"] == [1.6, 1.4]


@pytest.mark.parametrize("drafts, cost", [(1, 1.0), (3, 1.25)])
def test_speed_figure_curves_are_the_geometric_sums(drafts: int, cost: float) -> None:
    axes = speed_figure(drafts, cost, 0.5, 1.7).axes[0]
    curves = {line.get_label(): line for line in axes.lines}
    for count in range(1, drafts + 1):
        line = curves[f"{count} draft{'s' if count > 1 else ''}"]
        at_half, at_one = line.get_ydata()[50], line.get_ydata()[-1]
        assert (at_half, at_one) == pytest.approx(((2 - 0.5**count) / cost, (count + 1) / cost))
    (here,) = (line for line in axes.lines if line.get_gid() == "here")
    assert (here.get_xdata()[0], here.get_ydata()[0]) == pytest.approx((0.5, 1.7 / cost))


def test_marked_says_where_each_token_came_from(tokenizer: Tokenizer) -> None:
    a, b, c, end = 300, 400, 500, tokenizer.eos_id
    passes = [Pass([], 0, [a]), Pass([b, a], 1, [b, c]), Pass([a, b], 2, [a, b, c]), Pass([a, b], 0, [end])]
    words, kinds = marked(tokenizer, passes)
    said = [tokenizer.decode([token]) for token in (a, b, a, c, a, b, c, a)]
    assert words == [*said, "(end)"]
    assert kinds == ["own", "drafted", "refused", "own", "drafted", "drafted", "own", "refused", "own"]
    assert judged(passes) == (3, 5)


def test_the_explorer_shows_the_models_own_passes(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    explorer = draft_explorer(model, tokenizer, OPENING, max_new_tokens=30)
    explorer.set(passes=7, drafts=2)
    prompt = [tokenizer.eos_id, *tokenizer.encode(OPENING)]
    settings = dict(max_new_tokens=30, stop_id=tokenizer.eos_id)
    passes = list(watch(model, prompt, use_mtp=True, drafts=2, **settings))[:8]
    held, checked = judged(passes)
    assert 0 < held < checked
    figure = explorer.draw(**explorer.values)
    tokens = sum(len(each.written) for each in passes[1:])
    assert figure.get_suptitle().startswith(f"7 passes, {tokens} tokens; {held} of {checked} drafts held")
    assert f"{tokens / 7:.2f} tokens a pass at 1.05 times" in figure.axes[-1].get_title("left")
    (row,) = complete(model, [prompt], **settings)
    drawn = [text for text in figure.axes[0].texts if text.get_gid().split("-")[0] in ("own", "drafted")]
    assert len(drawn) == tokens + 1 and row[: tokens + 1] == [t for each in passes for t in each.written]


def test_every_control_moves_the_picture(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    explorer = draft_explorer(model, tokenizer, OPENING, max_new_tokens=8)
    assert_every_control_moves_the_picture_and_back(
        explorer, {"passes": 3, "drafts": 3, "temperature": 1.0, "cost": 1.5}
    )


def test_what_cannot_be_shown_is_refused(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="has no MTP module"):
        draft_explorer(random_model(nano(vocab_size=4096, num_nextn_predict_layers=0)), tokenizer, OPENING)
    with pytest.raises(DataError, match="leaves no room for 72 more"):
        draft_explorer(model, tokenizer, "and " * 220)
