"""The recipes against the numbers of report section 4.2, counted here a second time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import pytest

from dsv3_mini.errors import ConfigError
from dsv3_mini.train.recipe import EXTENSIONS, PRESETS, Recipe
from dsv3_mini.train.schedules import Schedule, constant
from dsv3_mini.train.trainer import recipe_record

TRILLION, BILLION = 1e12, 1e9


@pytest.fixture(scope="module")
def report() -> Recipe:
    return Recipe.preset("deepseek-v3")


def test_report_warmup_ends_after_2000_steps_of_the_growing_batch(report: Recipe) -> None:
    tokens = 0
    for _ in range(2000):
        assert report.learning_rate(tokens) < 2.2e-4
        tokens += 4096 * round(3072 + (15360 - 3072) * tokens / (469 * BILLION))
    # Without the ramp it would be 2000 x 3072 x 4096 = 25.2B; the batch has grown by a quarter on the way.
    assert 25.2 * BILLION < tokens < 35 * BILLION
    assert report.learning_rate(tokens) == pytest.approx(2.2e-4, rel=1e-12)
    assert report.learning_rate(tokens // 2) == pytest.approx(1.1e-4, rel=1e-6)
    assert report.learning_rate(0) == 0.0


@pytest.mark.parametrize(
    "tokens, rate",
    [
        (1 * TRILLION, 2.2e-4),
        (9.99 * TRILLION, 2.2e-4),
        (10 * TRILLION, 2.2e-4),
        (12.15 * TRILLION, (2.2e-4 + 2.2e-5) / 2),  # half of a cosine is half of the way
        (14.3 * TRILLION, 2.2e-5),
        (14.5 * TRILLION, 2.2e-5),
        (14.3 * TRILLION + 332.9 * BILLION, 2.2e-5),
        (14.8 * TRILLION - 166.9 * BILLION, 7.3e-6),
        (14.8 * TRILLION, 7.3e-6),
    ],
)
def test_report_learning_rate(report: Recipe, tokens: float, rate: float) -> None:
    assert report.learning_rate(tokens) == pytest.approx(rate, rel=1e-9)


def test_report_values(report: Recipe) -> None:
    assert report.total_tokens == 14.8e12 and report.betas == (0.9, 0.95)
    assert (report.weight_decay, report.clip_norm, report.alpha) == (0.1, 1.0, 1e-4)
    assert {report.context(t) for t in (0, TRILLION, 14.8 * TRILLION)} == {4096}
    assert [round(report.batch_size(t * BILLION)) for t in (0, 234.5, 469, 14_800)] == [3072, 9216, 15360, 15360]
    assert [report.gamma(t * TRILLION) for t in (0, 14.299, 14.3, 14.8)] == [0.001, 0.001, 0, 0]
    assert [report.mtp_lambda(t * TRILLION) for t in (0, 9.999, 10, 14.8)] == [0.3, 0.3, 0.1, 0.1]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_keeps_the_reports_shape(name: str) -> None:
    recipe = Recipe.preset(name)
    rate, end = recipe.learning_rate, recipe.total_tokens
    assert len(rate.pieces) == 5 and rate.pieces[-1].until == end
    # It only jumps once, to its last constant value.
    jumps = [after.start != before.end for before, after in itertools.pairwise(rate.pieces)]
    assert jumps == [False, False, False, True]
    peak = max(rate(end * i / 1000) for i in range(1001))
    low = (rate.pieces[2].until + rate.pieces[3].until) / 2
    assert rate(0) == 0.0 and rate(end) < rate(low) < peak == rate(0.3 * end)
    assert rate(low) / peak == pytest.approx(0.05 if name == "tiny" else 0.1)
    assert recipe.batch_size(0) < recipe.batch_size(end)
    assert recipe.gamma(0) > recipe.gamma(end) == 0.0
    assert recipe.mtp_lambda(0) == (0.0 if name == "tiny" else 0.3), "tiny lets MTP rest at first"
    assert recipe.mtp_lambda(0.8 * end if name == "tiny" else 0) == 0.3 and recipe.mtp_lambda(end) == 0.1
    assert math.isclose(sum(recipe.mixture.values()), 1.0)
    json.dumps(recipe_record(recipe))


@pytest.mark.parametrize("name, context, rows", [("deepseek-v3-32k", 32_768, 1920), ("deepseek-v3-128k", 131_072, 480)])
def test_the_reports_two_phases(name: str, context: int, rows: int) -> None:
    """Section 4.3: 1,000 steps each, as many tokens in a step, at pre-training's last rate."""
    recipe = Recipe.preset(name)
    assert recipe.total_tokens == 1000 * context * rows == 1000 * 62_914_560
    for share in (0, 0.5, 1):
        tokens = share * recipe.total_tokens
        assert (recipe.context(tokens), recipe.batch_size(tokens)) == (context, rows)
        assert recipe.learning_rate(tokens) == 7.3e-6 == Recipe.preset("deepseek-v3").learning_rate(14.8e12)
        assert (recipe.gamma(tokens), recipe.mtp_lambda(tokens)) == (0, 0.1)


def test_tiny_is_extended_four_times_and_ends_at_its_last_rate() -> None:
    first, then = Recipe.preset("tiny"), Recipe.preset("tiny-4x")
    assert then.context(0) == 4 * first.context(first.total_tokens)
    assert then.learning_rate(0) == 0.0 and then.learning_rate(then.total_tokens) == first.learning_rate(13e6)
    assert math.isclose(sum(then.mixture.values()), 1.0) and {"stories", "sums", "code", "prose"} < set(then.mixture)
    assert set(EXTENSIONS).isdisjoint(PRESETS)
    last = Recipe.preset("tiny-16x")
    assert last.context(0) == 4 * then.context(0) and math.isclose(sum(last.mixture.values()), 1.0)
    assert last.context(0) * last.batch_size(0) == 2 * then.context(0) * then.batch_size(then.total_tokens)
    assert last.learning_rate(0) == 0.0 and last.learning_rate(last.total_tokens) == then.learning_rate(8e9)


@pytest.mark.parametrize("name", PRESETS)
def test_another_length_stretches_every_schedule(name: str) -> None:
    recipe = Recipe.preset(name)
    longer = Recipe.preset(name, total_tokens=2 * recipe.total_tokens)
    fields = [f.name for f in dataclasses.fields(recipe) if isinstance(getattr(recipe, f.name), Schedule)]
    assert set(fields) == {"learning_rate", "batch_size", "context", "gamma", "mtp_lambda"}
    for field, share in itertools.product(fields, [0, 0.01, 0.2, 0.5, 0.8, 0.97, 0.99, 1]):
        tokens = share * recipe.total_tokens
        assert getattr(longer, field)(2 * tokens) == pytest.approx(getattr(recipe, field)(tokens), rel=1e-9)
    for field in dataclasses.fields(recipe):
        if field.name not in (*fields, "total_tokens"):
            assert getattr(longer, field.name) == getattr(recipe, field.name)


def test_a_schedule_given_with_a_length_is_taken_as_it_is() -> None:
    own = Schedule("gamma", PRESETS["nano"]().gamma.pieces)
    changed = Recipe.preset("nano", total_tokens=65_536, gamma=own)
    assert changed.gamma == own and changed.mtp_lambda == Recipe.preset("nano").mtp_lambda.stretched(2.0)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(total_tokens=0), "total_tokens = 0"),
        (dict(total_tokens=1e6), "total_tokens = 1000000.0"),
        (dict(total_tokens=True), "total_tokens = True"),
        (dict(micro_batch=0), "micro_batch = 0"),
        (dict(log_every=-1), "log_every = -1"),
        (dict(checkpoint_every=0.5), "checkpoint_every = 0.5"),
        (dict(evaluate_every=None), "evaluate_every = None"),
        (dict(alpha=-1e-4), "alpha = -0.0001"),
        (dict(alpha=math.nan), "alpha = nan"),
        (dict(alpha="0.1"), "alpha = '0.1'"),
        (dict(weight_decay=math.inf), "weight_decay = inf"),
        (dict(clip_norm=0), "clip_norm = 0"),
        (dict(clip_norm=None), "clip_norm = None"),
        (dict(ema_decay=1.0), "ema_decay = 1.0"),
        (dict(betas=(0.9, 1.0)), "betas = (0.9, 1.0)"),
        (dict(betas=0.9), "betas = 0.9"),
        (dict(betas=(0.9,)), "betas = (0.9,)"),
        (dict(precision="fp4"), "precision = 'fp4'"),
        (dict(learning_rate=3e-4), "learning_rate = 0.0003"),
        (dict(batch_size=8), "batch_size = 8"),
        (dict(learning_rates=constant("learning_rate", 1e-3)), "did you mean learning_rate?"),
    ],
)
def test_a_bad_field_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.preset("nano", **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="'huge' is not known: choose one of deepseek-v3, tiny, nano"):
        Recipe.preset("huge")
