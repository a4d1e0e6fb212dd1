"""Lesson 10's pictures, read back from their artists; the cluster map's numbers, in the picture and for the page."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.errors import UserError
from dsv3_mini.model.router import limit_to_groups
from dsv3_mini.parallel.traffic import Cluster, journey, nodes_reached, traffic
from dsv3_mini.viz.figures import cluster_map as figures
from dsv3_mini.viz.figures.cluster_map import View, cluster_figure, layout, path
from dsv3_mini.viz.figures.node_limited import (
    Counted,
    capacity_figure,
    messages_figure,
    price_figure,
    rank_figure,
)
from dsv3_mini.viz.widgets.cluster_map import MODULE, ClusterMap
from dsv3_mini.viz.widgets.node_limited import capacity_explorer, dropped_and_empty
from dsv3_mini.viz.widgets.page import EXPORT

SMALL, RELEASED = Cluster(nodes=4, gpus=2, experts=2), Cluster(nodes=8, gpus=8, experts=4)
WORDS = ["One", " rainy", " morning", ",", " Nora", " was", " out", ".\n"]
CLUSTERS = pytest.mark.parametrize(
    "cluster", [SMALL, RELEASED, Cluster(1, 3, 5), Cluster(5, 6, 1), Cluster(2, 1, 1)], ids=str
)


def choices(tokens: int, limit: int, k: int = 4) -> Tensor:
    preference = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(limit))
    return limit_to_groups(preference, 4, limit).topk(k).indices[0]


@pytest.fixture
def small_map() -> ClusterMap:
    homes = [0, 3, 6, 1, 4, 7, 2, 5]
    return ClusterMap(SMALL, WORDS, homes, {limit: choices(len(WORDS), limit) for limit in (1, 2, 4)})


# ---- places ------------------------------------------------------------------------------------------------------------


def inside(inner: figures.Box, outer: figures.Box) -> bool:
    return (
        outer.x <= inner.x
        and outer.y <= inner.y
        and inner.x + inner.width <= outer.x + outer.width + 1e-6
        and inner.y + inner.height <= outer.y + outer.height + 1e-6
    )


def apart(one: figures.Box, other: figures.Box) -> bool:
    return (
        one.x + one.width <= other.x + 1e-6
        or other.x + other.width <= one.x + 1e-6
        or one.y + one.height <= other.y + 1e-6
        or other.y + other.height <= one.y + 1e-6
    )


@CLUSTERS
def test_experts_lie_in_their_gpus_and_gpus_in_their_nodes_and_nothing_overlaps(cluster: Cluster) -> None:
    plan = layout(cluster)
    page = figures.Box(0, 0, figures.WIDTH, plan.height)
    assert (len(plan.nodes), len(plan.gpus), len(plan.experts)) == (cluster.nodes, cluster.n_gpus, cluster.n_experts)
    for expert, cell in enumerate(plan.experts):
        assert inside(cell, plan.gpus[cluster.gpu_of(expert)])
    for gpu, box in enumerate(plan.gpus):
        assert inside(box, plan.nodes[cluster.node_of(gpu)])
    assert all(inside(box, page) for box in (*plan.nodes, plan.road))
    for boxes in (plan.experts, plan.gpus, [*plan.nodes, plan.road]):
        assert all(apart(one, other) for i, one in enumerate(boxes) for other in boxes[:i])
        assert min(min(box.width, box.height) for box in boxes) > 4


def test_wires_end_in_their_gpus_and_cross_on_the_goals_lane() -> None:
    plan = layout(RELEASED)
    lanes = set()
    for end in (8, 17, 63):
        (x, y), (out, lane), (into, _), (u, v) = path(RELEASED, plan, 2, end)
        start_box, end_box = plan.gpus[2], plan.gpus[end]
        assert start_box.x < x < start_box.x + start_box.width and y == start_box.centre[1] and out == x
        assert end_box.x < u < end_box.x + end_box.width and v == end_box.centre[1] and into == u
        assert plan.road.y < lane < plan.road.y + plan.road.height
        lanes.add(lane)
    assert len(lanes) == 3
    assert path(RELEASED, plan, 2, 5) == [plan.gpus[2].centre, plan.gpus[5].centre]


# ---- the still map -----------------------------------------------------------------------------------------------------


def artists(figure: Figure) -> dict[str, Any]:
    axes = figure.axes[0]
    return {a.get_gid(): a for a in (*axes.patches, *axes.texts, *axes.lines) if a.get_gid()}


def test_the_picture_shows_experts_home_messages_and_what_was_received() -> None:
    chosen, home = [3, 14, 2, 9], 5
    before = journey(SMALL, [0, 12], 2)
    trip = journey(SMALL, chosen, home)
    figure = cluster_figure(SMALL, View.of(SMALL, "A token", chosen, home, [before, trip]))
    shown = artists(figure)
    for expert in range(16):
        right = figures.CHOSEN if expert in chosen else figures.IDLE
        assert to_hex(shown[f"0-expert-{expert}"].get_facecolor()) == right.lower()
    homes = [gpu for gpu in range(8) if to_hex(shown[f"0-gpu-{gpu}"].get_facecolor()) == figures.HOME.lower()]
    assert homes == [home]
    assert "A token: 4 experts on 3 nodes, 2 copies over the network" in shown["title-0"].get_text()
    for kind in ("network", "inside"):
        wires = getattr(trip, kind)
        drawn = [shown[f"0-{kind}-{i}"] for i in range(len(wires))]
        assert f"0-{kind}-{len(wires)}" not in shown and wires
        for line, (start, end) in zip(drawn, wires, strict=True):
            points = path(SMALL, layout(SMALL), start, end)
            assert list(line.get_xdata()) == pytest.approx([x for x, _ in points])
            assert list(line.get_ydata()) == pytest.approx([y + figures.TITLE for _, y in points])
    counts = [0] * 4
    for _, gpu in (*before.network, *trip.network):
        counts[gpu // 2] += 1
    assert [shown[f"0-received-{node}"].get_text() for node in range(4)] == [f"received {n}" for n in counts]
    full = [shown[f"0-bar-{node}"].get_width() for node in range(4)]
    room = shown["0-room-0"].get_width()
    assert full == pytest.approx([room * n / max(counts) for n in counts])


def test_two_views_stand_one_below_the_other() -> None:
    views = [View.of(RELEASED, name, [1, 60, 70, 200], 9) for name in ("above", "below")]
    shown = artists(cluster_figure(RELEASED, *views))
    assert shown["1-node-0"].get_y() - shown["0-node-0"].get_y() == pytest.approx(
        layout(RELEASED).height + figures.TITLE
    )
    assert shown["title-0"].get_text().startswith("above") and shown["title-1"].get_text().startswith("below")


@CLUSTERS
def test_no_text_is_small_or_cut_off_or_upon_another(cluster: Cluster) -> None:
    last = cluster.n_experts - 1
    figure = cluster_figure(cluster, View.of(cluster, "“morning”, M = 4", [last, 0], 0))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    width, height = figure.canvas.get_width_height()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert text.get_fontsize() >= 11
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
        assert not any(box.overlaps(other) for other in boxes if other is not box), text


# ---- the curves --------------------------------------------------------------------------------------------------------


def words_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_messages_figure_shows_means_worst_and_what_is_kept() -> None:
    counted = {1: Counted(0.9, 1, 0.4), 2: Counted(1.7, 2, 0.6), 4: Counted(3.4, 4, 0.9)}
    saved, cost = messages_figure(counted, 7.0).axes
    assert [bar.get_height() for bar in saved.patches] == [0.9, 1.7, 3.4]
    worst, line = saved.lines
    assert list(worst.get_ydata()) == [1, 2, 4] and set(line.get_ydata()) == {7.0}
    assert list(cost.lines[0].get_ydata()) == pytest.approx([40, 60, 90]) and list(cost.lines[0].get_xdata()) == [
        1,
        2,
        4,
    ]


def test_rank_figure_circles_the_rule() -> None:
    figure = rank_figure({1: [0.1, 0.2, 0.3, 0.4], 2: [0.5, 0.7, 0.6, 0.4]}, k=4)
    axes = figure.axes[0]
    circles = {line.get_gid(): line for line in axes.lines if str(line.get_gid()).startswith("rule-")}
    assert (circles["rule-1"].get_xdata()[0], circles["rule-1"].get_ydata()[0]) == (4, pytest.approx(40))
    assert (circles["rule-2"].get_xdata()[0], circles["rule-2"].get_ydata()[0]) == (2, pytest.approx(70))
    assert "M = 2: K/M = 2, best at j = 2" in words_of(figure)


def test_price_figure_shows_the_extra_loss() -> None:
    figure = price_figure({1: 1.5, 2: 1.0, 3: 0.9}, {1.0: (1.4, 0.25), 2.0: (1.1, 0.0)}, untouched=1.0, trained_with=2)
    limit, drop = figure.axes
    assert [bar.get_height() for bar in limit.patches] == pytest.approx([0.5, 0.0, -0.1])
    assert [bar.get_height() for bar in drop.patches] == pytest.approx([0.4, 0.1])
    assert [tick.get_text() for tick in drop.get_xticklabels()] == ["1\n(25.0%)", "2\n(0.0%)"]


def test_capacity_figure_cuts_each_bar_at_the_line() -> None:
    load = torch.tensor([10, 2, 5, 7])
    axes = capacity_figure(load, 6, "title").axes[0]
    room, kept, lost = (list(axes.patches[i : i + 4]) for i in (0, 4, 8))
    assert {bar.get_height() for bar in room} == {6}
    assert [bar.get_height() for bar in kept] == [6, 2, 5, 6]
    assert [(bar.get_height(), bar.get_y()) for bar in lost] == [(4, 6), (0, 2), (0, 5), (1, 6)]


@pytest.mark.parametrize(
    "figure",
    [
        messages_figure({1: Counted(0.9, 1, 0.4), 8: Counted(4.6, 8, 1.0)}, 7.0),
        rank_figure({1: [0.1] * 8, 2: [0.2] * 8, 4: [0.3] * 8}, 8),
        price_figure({1: 1.5, 2: 1.0}, {1.0: (1.4, 0.25)}, 1.0, 2),
        capacity_figure(torch.tensor([4, 9]), 6, "title"),
    ],
    ids=["messages", "rank", "price", "capacity"],
)
def test_curves_have_titles_units_and_no_small_words(figure: Figure) -> None:
    figure.draw(FigureCanvasAgg(figure).get_renderer())
    for axes in figure.axes:
        assert axes.get_title(loc="left") and axes.get_xlabel() and axes.get_ylabel()
    assert min(t.get_fontsize() for t in figure.findobj(lambda a: hasattr(a, "get_fontsize")) if t.get_text()) >= 11


def test_capacity_explorer_says_what_is_dropped_and_stays_empty() -> None:
    loads = {"even": torch.tensor([8, 8, 8, 8]), "odd": torch.tensor([20, 4, 4, 4])}
    assert dropped_and_empty(loads["even"], 1.0) == (0.0, 0.0)
    dropped, empty = dropped_and_empty(loads["odd"], 1.0)
    assert (dropped, empty) == (12 / 32, 12 / 32)
    assert dropped_and_empty(loads["odd"], 2.5) == (0.0, pytest.approx(1 - 32 / 80))
    explorer = capacity_explorer(loads)
    pictures = {explorer.picture.value}
    for control in ({"factor": 2.0}, {"batch": "odd"}, {"factor": 1.0}):
        explorer.set(**control)
        pictures.add(explorer.picture.value)
    assert len(pictures) == 4
    assert "38% of the choices dropped, 38% of the places empty" in words_of(explorer.draw(**explorer.values))


# ---- the widget --------------------------------------------------------------------------------------------------------


def test_the_map_counts_what_traffic_counts(small_map: ClusterMap) -> None:
    homes = torch.tensor(small_map.home) // SMALL.gpus
    for limit in small_map.limits:
        small_map.set(limit=limit, token=len(WORDS) - 1)
        reached = nodes_reached(choices(len(WORDS), limit), 16, 4)
        assert list(small_map.received) == traffic(reached, homes).sum(0).tolist()
        assert max(len(trip.network) for trip in small_map.trips["node", limit]) <= limit
        small_map.set(once_per="expert")
        away = choices(len(WORDS), limit) // 4 != homes[:, None]
        assert sum(small_map.received) == int(away.sum())
        small_map.set(once_per="node")


def test_the_page_gets_the_journeys_and_the_places(small_map: ClusterMap) -> None:
    state = json.loads(json.dumps({name: getattr(small_map, name) for name in ("scene", "journeys", "chosen")}))
    for (once_per, limit), trips in small_map.trips.items():
        for token, trip in enumerate(trips):
            network, inside = state["journeys"][once_per][small_map.limits.index(limit)][token]
            assert (network, inside) == ([list(m) for m in trip.network], [list(m) for m in trip.inside])
    plan = layout(SMALL)
    assert state["scene"]["height"] == plan.height and state["scene"]["faster"] == 3.2
    for name, boxes in (("node", plan.nodes), ("gpu", plan.gpus), ("expert", plan.experts)):
        assert [tuple(box) for box in state["scene"][f"{name}_boxes"]] == [
            pytest.approx((box.x, box.y, box.width, box.height), abs=0.01) for box in boxes
        ]


def test_each_control_changes_the_picture(small_map: ClusterMap) -> None:
    seen = [small_map.png()]
    for control in ({"token": 5}, {"limit": 1}, {"limit": 2}, {"token": 0}, {"limit": 4, "once_per": "expert"}):
        small_map.set(**control)
        seen.append(small_map.png())
    assert len(set(seen)) == len(seen)


def test_what_the_page_sends_is_taken(small_map: ClusterMap) -> None:
    small_map.set_state({"token": 3, "limit": 2, "once_per": "expert"})
    assert small_map.journey == journey(SMALL, small_map.experts, small_map.home[3], "expert")
    assert small_map.experts == choices(len(WORDS), 2)[3].tolist()


@pytest.mark.parametrize(
    ("control", "message"),
    [({"token": 8}, "has 8, counted from 0"), ({"token": -1}, "not there"), ({"limit": 3}, "the map has 1, 2, 4"),
     ({"once_per": "rack"}, "choose node or expert")],
)  # fmt: skip
def test_a_control_that_cannot_be_set_says_so(small_map: ClusterMap, control: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_map.set(**control)


@pytest.mark.parametrize(
    ("words", "home", "chosen", "message"),
    [
        ([], [], {4: torch.zeros(0, 4, dtype=torch.long)}, "no token to show"),
        (["a"], [0], {}, "no token to show"),
        (["a", "b"], [0], {4: choices(2, 4)}, "got \\[1, 2\\] tokens"),
        (["a"], [0], {4: torch.tensor([[3, 16]])}, "expert 16 is not in the cluster: it has 16"),
    ],
)
def test_a_map_of_nothing_is_refused(words: list[str], home: list[int], chosen: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClusterMap(SMALL, words, home, chosen)


def test_without_a_kernel_it_is_a_picture_and_a_sentence(small_map: ClusterMap) -> None:
    small_map.set(token=2)
    data, _ = small_map._repr_mimebundle_()
    assert base64.b64decode(data["image/png"], validate=True) == small_map.png()
    assert len(data["image/png"]) < 120_000
    trip = small_map.journey
    assert "at most 4 nodes: token 3 of 8, “ morning”, on node 3, has 4 experts" in data["text/plain"]
    assert f"{len(trip.network)} messages between nodes, {len(trip.inside)} inside" in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data


def test_it_is_saved_as_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    sly = ClusterMap(SMALL, ["</script><b>"], [0], {2: choices(1, 2)})
    page = sly.save_html(tmp_path / "map.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["map.html"]
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"\b(src|href|import)\b *[=(\"']", page)
    assert page.count("</script>") == 1 and "export" not in page
    assert MODULE.read_text(encoding="utf-8").endswith(EXPORT)
    assert json.loads(re.search(r"^const state = (.*);$", page, re.MULTILINE)[1])["words"] == ["</script><b>"]
