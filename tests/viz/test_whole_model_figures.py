"""Lesson 12's pictures, read back from their artists; the map of areas against the ledger; the widget, moved."""

from __future__ import annotations

import base64
from itertools import combinations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsv3_mini.config import PRESETS, ModelConfig
from dsv3_mini.ledger import count_parameters
from dsv3_mini.viz.figures.whole_model import (
    COUNTED,
    FRAME,
    GROUPINGS,
    NOTHING,
    PARTS,
    assembly_figure,
    leaves,
    squarify,
    tiles,
    treemap_figure,
    visibility_figure,
)
from dsv3_mini.viz.widgets.whole_model import treemap_explorer

LARGE = ModelConfig.preset("671b")


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(lambda artist: hasattr(artist, "get_text")) if t.get_text()]


# ---- the layout --------------------------------------------------------------------------------------------------------


def test_squarify_on_a_frame_that_can_be_done_by_hand() -> None:
    """6 x 4, filled by 6, 6, 4, 3, 2, 2, 1: the two largest share a column, the next two a row beside it."""
    boxes = squarify([6, 6, 4, 3, 2, 2, 1], 0, 0, 6, 4)
    assert boxes[0] == pytest.approx((0, 0, 3, 2)) and boxes[1] == pytest.approx((0, 2, 3, 2))
    assert boxes[2] == pytest.approx((3, 0, 12 / 7, 7 / 3)) and boxes[3] == pytest.approx((3 + 12 / 7, 0, 9 / 7, 7 / 3))


@pytest.mark.parametrize("count", [1, 2, 7, 60])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_squarify_fills_the_frame_in_proportion_and_nothing_overlaps(count: int, spread: float) -> None:
    sizes = torch.exp(spread * torch.randn(count, generator=torch.Generator().manual_seed(count))).tolist()
    boxes = squarify(sizes, 1.0, -2.0, 5.0, 3.0)
    for size, (x, y, width, height) in zip(sizes, boxes, strict=True):
        assert width * height == pytest.approx(15 * size / sum(sizes), rel=1e-6)
        assert x >= 1 - 1e-9 and y >= -2 - 1e-9 and x + width <= 6 + 1e-9 and y + height <= 1 + 1e-9
    for (x, y, w, h), (u, v, p, q) in combinations(boxes, 2):
        assert min(x + w, u + p) - max(x, u) < 1e-9 or min(y + h, v + q) - max(y, v) < 1e-9


def test_equal_sizes_become_nearly_square() -> None:
    for count in (4, 16, 61):
        ratios = [max(w / h, h / w) for _, _, w, h in squarify([1.0] * count, 0, 0, 7.6, 5.2)]
        assert max(ratios) < 2.1


# ---- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_areas_are_the_ledgers_numbers(preset: str) -> None:
    cfg = ModelConfig.preset(preset)
    own = count_parameters(cfg)
    totals = {
        ("all", False): own.main,
        ("all", True): own.live,
        (COUNTED[1], False): own.activated,
        (COUNTED[1], True): own.activated + own.mtp_modules * own.mtp_module.activated,
    }
    for (counted, mtp), total in totals.items():
        assert sum(leaf.count for leaf in leaves(cfg, counted, mtp)) == total
        for by in GROUPINGS:
            assert sum(tile.count for tile in tiles(cfg, by, counted, mtp)) == total


def test_parts_at_671b() -> None:
    own = count_parameters(LARGE)
    sums = {part: sum(t.count for t in tiles(LARGE, mtp=False) if t.part == part) for part in PARTS}
    assert sums["attention"] == 61 * own.attention.total
    assert sums["routed experts"] == 58 * 256 * own.expert.total
    assert sums["shared experts"] == 58 * own.expert.total
    assert sums["dense FFN"] == 3 * own.dense_ffn.total
    assert sums["embedding"] == sums["output head"] == own.embedding.total
    assert sums["gates and norms"] == 58 * own.gate.total + 61 * 2 * 7168 + 7168
    assert sums["MTP's join"] == 0
    with_mtp = {leaf.part: leaf.count for leaf in leaves(LARGE) if leaf.layer == "MTP 1" and leaf.tensor == "eh_proj"}
    assert with_mtp == {"MTP's join": 102_760_448}


def test_by_layer_every_layer_has_its_place_and_its_parts() -> None:
    laid = tiles(LARGE, "layer")
    outers = list(dict.fromkeys(tile.outer for tile in laid))
    assert outers == ["embedding", *(f"layer {i}" for i in range(61)), "head", "MTP 1"]
    inside = {outer: {tile.inner for tile in laid if tile.outer == outer} for outer in outers}
    assert inside["layer 2"] == {"attention", "dense FFN", "gates and norms"}
    assert inside["layer 3"] == {"attention", "routed experts", "shared experts", "gates and norms"}
    assert inside["MTP 1"] == inside["layer 3"] | {"MTP's join"}


def test_activated_leaves_the_biases_out_and_counts_eight_experts() -> None:
    found = {leaf.tensor: leaf.count for leaf in leaves(LARGE, COUNTED[1]) if leaf.layer == "layer 9"}
    assert "gate bias" not in found and found["routed up"] == 8 * 2048 * 7168


# ---- the pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", GROUPINGS)
@pytest.mark.parametrize("counted", COUNTED)
def test_drawn_rectangles_have_the_areas_of_their_counts(by: str, counted: str) -> None:
    laid = tiles(LARGE, by, counted)
    drawn = {p.get_gid(): p for p in treemap_figure("671b", LARGE, by, counted).axes[0].patches if p.get_gid()}
    total = sum(tile.count for tile in laid)
    assert len(drawn) == len(laid)
    for tile in laid:
        patch = drawn[f"{tile.outer}/{tile.inner}"]
        area = patch.get_width() * patch.get_height()
        assert area == pytest.approx(FRAME[0] * FRAME[1] * tile.count / total, rel=1e-6)


def test_title_and_legend_say_the_numbers() -> None:
    said = texts(treemap_figure("671b", LARGE, mtp=False))
    assert "671b: 671B parameters, 97% of them in routed experts" in said
    experts = 58 * 256 * 44_040_192
    assert f"{experts / 1e9:.0f}B, {experts / 671_026_419_200:.2%}" in said and "none" in said
    assert set(PARTS) <= set(said)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("by", GROUPINGS)
@pytest.mark.parametrize("counted", COUNTED)
def test_what_is_written_lies_inside_its_rectangle_and_apart(preset: str, by: str, counted: str) -> None:
    cfg = ModelConfig.preset(preset)
    figure = treemap_figure(preset, cfg, by, counted)
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0]
    frames = [p.get_window_extent(renderer) for p in axes.patches if isinstance(p, Rectangle)]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in axes.texts]
    assert boxes or preset == "none"
    for said, box in boxes:
        assert any(f.x0 <= box.x0 and f.y0 <= box.y0 and box.x1 <= f.x1 and box.y1 <= f.y1 for f in frames), said
    for (said, one), (other, two) in combinations(boxes, 2):
        assert not one.overlaps(two), (said, other)
    page = figure.bbox
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text.get_text()
        assert text.get_fontsize() >= 11


def test_no_two_parts_share_a_colour() -> None:
    assert len(set(PARTS.values())) == len(PARTS)


def test_the_map_of_the_model_says_its_layers() -> None:
    said = texts(assembly_figure(LARGE))
    assert {"3 dense layers", "58 sparse layers", "1 MTP module", "embedding", "head"} <= set(said)
    small = ModelConfig.preset("nano", num_nextn_predict_layers=0)
    said = texts(assembly_figure(small))
    assert {"1 dense layer", "2 sparse layers"} <= set(said) and not any("MTP" in text for text in said)
    assert min(t.get_fontsize() for t in assembly_figure(LARGE).axes[0].texts) >= 11


def test_visibility_is_drawn_where_it_was_measured() -> None:
    changes = {"fresh": {"a": 0.0, "b": 1e-3, "c": 1e-5}, "awake": {"a": 0.5, "b": 1.0, "c": 2e-5}}
    figure = visibility_figure(changes, 1e-5)
    axes = figure.axes[0]
    drawn = {line.get_gid(): list(line.get_xdata()) for line in axes.lines if line.get_gid()}
    assert drawn == {"fresh": [NOTHING, 1e-3, 1e-5], "awake": [0.5, 1.0, 2e-5]}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert figure.get_suptitle() == "Of 3 mistakes a comparison misses 2 on fresh, 0 on awake weights"
    low, high = axes.get_xlim()
    assert low < NOTHING and high > 1


# ---- the widget --------------------------------------------------------------------------------------------------------


def test_every_control_moves_the_picture() -> None:
    explorer = treemap_explorer()
    assert explorer.values == {"model": "671b", "by": "part", "counted": "all", "mtp": False}
    seen = {explorer.picture.value}
    moves = [{"counted": COUNTED[1]}, {"by": "layer"}, {"mtp": True}, *({"model": name} for name in PRESETS)]
    for move in moves:
        explorer.set(**move)
        seen.add(explorer.picture.value)
    assert len(seen) == len(moves)  # back at 671b nothing is new: the last move is the picture before the presets


def test_configs_of_ones_own_come_first() -> None:
    mine = LARGE.replace(n_routed_experts=64)
    explorer = treemap_explorer({"few experts": mine, "tiny": ModelConfig.preset("tiny", vocab_size=100)})
    assert explorer.controls["model"].options == ("few experts", "tiny", "nano", "small", "16b", "671b")
    assert explorer.values["model"] == "few experts"
    assert treemap_explorer(model="nano").values["model"] == "nano"


def test_it_shows_something_without_a_kernel() -> None:
    data, _ = treemap_explorer()._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and "areas" in data["text/plain"]
