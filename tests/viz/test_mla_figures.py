"""Lesson 06's pictures, read back from their artists; its explorer, moved as a reader would."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from explorers import assert_every_control_moves_the_picture_and_back
from matplotlib.figure import Figure

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.card_race import CacheShape, Finish
from dsv3_mini.course.smaller_cache import Measured
from dsv3_mini.ledger import cache_per_token, count_parameters
from dsv3_mini.viz.figures.mla import (
    Kept,
    cache_figure,
    cut_figure,
    extra_loss,
    group_of,
    race_figure,
    sharing_figure,
)
from dsv3_mini.viz.widgets import mla as widgets
from dsv3_mini.viz.widgets.mla import CONTEXTS, HEADS, LATENTS, MODELS, SHARING, cache_explorer, kinds

MEASURED = Measured(
    ModelConfig.preset("tiny"), cuts={64: 1.5, 32: 1.7, 16: 2.5, 8: 4.0}, averaged={4: 1.5, 2: 3.5, 1: 5.0}
)


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# ---- figures -----------------------------------------------------------------------------------------------------------


def test_a_head_reads_the_group_of_its_neighbours() -> None:
    assert [group_of(head, 6, 2) for head in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [group_of(head, 3, 3) for head in range(3)] == [0, 1, 2]
    assert {group_of(head, 5, 1) for head in range(5)} == {0}


def test_sharing_figure_joins_every_head_to_what_it_reads() -> None:
    figure = sharing_figure(heads=6, groups=3)
    for axes, stores in zip(figure.axes, (6, 3, 1), strict=False):
        lines = [line for line in axes.lines if line.get_gid() == "reads"]
        assert len(lines) == 6 and len(axes.patches) == 2 * stores
        ends = [line.get_xdata()[1] for line in lines]
        assert len(set(ends)) == stores and ends == sorted(ends)
    latent = figure.axes[3]
    assert len([line for line in latent.lines if line.get_gid() == "rebuilds"]) == 6 and len(latent.patches) == 2
    shown = texts(figure)
    assert "GQA: 3 keys" in shown and "fewer numbers" in shown


def test_cut_figure_draws_each_way_by_cached_numbers() -> None:
    curves = {"latent": {80: 1.5, 24: 2.0, 48: 1.6}, "heads": {320: 1.5, 80: 5.0}}
    axes = cut_figure(curves, 1.5, "It costs").axes[0]
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn["latent"] == ([24, 48, 80], [2.0, 1.6, 1.5]) and drawn["heads"] == ([80, 320], [5.0, 1.5])
    (whole,) = [line for line in axes.lines if line.get_gid() == "whole"]
    assert set(whole.get_ydata()) == {1.5}
    assert (
        "tokens" not in axes.get_xlabel() and "nats" in axes.get_ylabel() and axes.get_title(loc="left") == "It costs"
    )


def test_race_figure_has_a_point_for_every_reader() -> None:
    finishes = [
        Finish(CacheShape(4, groups=4), 0.9),
        Finish(CacheShape(7, groups=1), 0.4),
        Finish(CacheShape(5, latent=27), 0.6),
        Finish(CacheShape(6, latent=16), 0.3),
    ]
    axes = race_figure(finishes, "Who answers").axes[0]
    groups, latents = axes.lines
    assert list(groups.get_xdata()) == [32, 128] and list(groups.get_ydata()) == [40, 90]
    assert list(latents.get_xdata()) == [16, 27] and list(latents.get_ydata()) == [30, 60]
    names = {text.get_text(): text.xy for text in axes.texts}
    assert names["MQA, 7 heads"] == (32, 40) and len(names) == 4
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "27", "32", "128"]


def test_cache_figure_shows_bytes_weights_and_tinys_marks() -> None:
    rows = [Kept("MHA", "a\nb", 5000, 800), Kept("GQA", "a\nb", 700, 500), Kept("MLA", "a\nb", 90, 300)]
    figure = cache_figure(rows, 1000, "Title", MEASURED, rank=24, groups=2)
    cache, weights, loss = figure.axes
    assert {bar.get_gid(): bar.get_height() for bar in cache.patches} == {"MHA": 1e7, "GQA": 1.4e6, "MLA": 1.8e5}
    assert {bar.get_gid(): bar.get_height() for bar in weights.patches} == {"MHA": 800, "GQA": 500, "MLA": 300}
    assert [text.get_text() for text in cache.texts] == ["10.0 MB", "1.4 MB", "180 kB"]
    assert "1.4 kB" in cache.get_xticklabels()[1].get_text() and "1,000 tokens" in cache.get_title(loc="left")
    lines = {line.get_gid(): line for line in loss.lines}
    assert list(lines["cut"].get_xdata()) == [24, 32, 48, 80], "latent and rope key"
    np.testing.assert_allclose(lines["cut"].get_ydata(), [2.5, 1.0, 0.2, 0.0])
    assert list(lines["averaged"].get_xdata()) == [80, 160, 320]
    np.testing.assert_allclose(lines["averaged"].get_ydata(), [3.5, 2.0, 0.0])
    assert (lines["rank"].get_xdata()[0], lines["groups"].get_xdata()[0]) == (40, 160)
    assert lines["rank"].get_ydata()[0] == pytest.approx(0.6) and lines["groups"].get_ydata()[0] == pytest.approx(2.0)
    assert {text.get_text() for text in loss.texts} == {"latent: +0.60", "heads: +2.00"}
    assert "Title" in figure.get_suptitle()


def test_loss_between_measured_widths() -> None:
    assert extra_loss(MEASURED, 64) == 0 and extra_loss(MEASURED, 8) == pytest.approx(2.5)
    assert extra_loss(MEASURED, 48) == pytest.approx(0.1)


# ---- the explorer ------------------------------------------------------------------------------------------------------


def test_kinds_are_the_ledgers_numbers() -> None:
    cfg = ModelConfig.preset("671b")
    mha, gqa, mqa, mla = kinds(cfg, sharing=16)
    cache = cache_per_token(cfg, groups=8)
    assert [kind.numbers for kind in (mha, gqa, mqa, mla)] == [cache.mha, cache.gqa, cache.mqa, cache.mla]
    assert 2 * mla.numbers == 70_272 and 2 * mha.numbers == 4_997_120
    assert mla.weights == count_parameters(cfg).attention.trainable == 187_107_328
    assert mha.weights == 7168 * 128 * (192 + 192 + 128 + 128)
    assert gqa.weights == 7168 * (128 * (192 + 128) + 8 * (192 + 128))
    assert kinds(ModelConfig.preset("tiny"), sharing=64)[1].numbers == kinds(ModelConfig.preset("tiny"), 4)[2].numbers


def test_every_control_moves_the_picture_and_back() -> None:
    explorer = cache_explorer(MEASURED)
    assert explorer.values == {"model": "671b", "heads": 128, "sharing": 16, "latent": 512, "context": 131_072}
    moves = {"heads": 64, "sharing": 8, "latent": 1024, "context": 4096, "model": "16b"}
    assert_every_control_moves_the_picture_and_back(explorer, moves)


def test_a_models_own_heads_and_latent_are_set_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widgets, "cache_figure", lambda *_: Figure(figsize=(1, 1)))
    explorer = cache_explorer(MEASURED)
    for model in MODELS:
        cfg = ModelConfig.preset(model)
        explorer.set(model="small" if model != "small" else "16b")
        explorer.set(heads=8, latent=128)
        explorer.set(model=model)
        assert (explorer.values["heads"], explorer.values["latent"]) == (cfg.num_attention_heads, cfg.kv_lora_rank)


def test_the_explorer_draws_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(widgets, "cache_figure", lambda *given: shown.append(given) or Figure(figsize=(1, 1)))
    explorer = cache_explorer(MEASURED)
    rows, context, title, measured, rank, groups = shown[-1]
    assert context == 131_072 and measured is MEASURED and (rank, groups) == (64, 1)
    assert "671b" in title and "1/71" in title
    explorer.set(latent=128, sharing=2)
    assert shown[-1][4:] == (16, 2), "a quarter of the latent; two heads share"
    assert shown[-1][0][3].numbers == 61 * (128 + 64) and shown[-1][0][1].numbers == 61 * 64 * 320
    explorer.set(latent=8)
    assert shown[-1][4] == 8, "not narrower than was measured"
    explorer.set(latent=1024)
    assert shown[-1][4] == 64, "not wider than the tiny model's"
    explorer.set(heads=32)
    assert shown[-1][0][0].numbers == 61 * 32 * 320


@pytest.mark.parametrize("model", [MODELS[0], MODELS[-1]])
def test_the_ends_of_all_sliders_can_be_drawn(model: str) -> None:
    explorer = cache_explorer(MEASURED, model=model)
    for end in (0, -1):
        explorer.set(heads=HEADS[end], sharing=SHARING[end], latent=LATENTS[end], context=CONTEXTS[end])
    assert bytes(explorer.picture.value).startswith(b"\x89PNG")


def test_it_shows_something_without_a_kernel() -> None:
    data, _ = cache_explorer(MEASURED)._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and "tiny" in data["text/plain"]
