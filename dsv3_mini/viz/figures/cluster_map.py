"""The cluster map: nodes, their GPUs, the experts on them, and the wires that one token's copies take.

Places are in pixels, y downwards, and are computed here once: the widget in viz/widgets/cluster_map.py draws the same boxes
and lets the copies travel along the same paths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsv3_mini.parallel.traffic import Cluster, Journey, journey
from dsv3_mini.viz.style import COLOURS, house_style

WIDTH = 860.0
EDGE, NODE_GAP, PAD, GPU_GAP, CELL_GAP = 6.0, 14.0, 8.0, 6.0, 3.0
HEAD, FOOT = 26.0, 22.0  # of a node: its name above the GPUs, a bar below them
CELL = 16.0  # height of an expert
LANE, STRIP, ROAD = 8.0, 22.0, 14.0  # of the network: a lane for each node, its name above, space around it
SPREAD = 3.0  # between two wires that leave one GPU
TITLE, KEY = 32.0, 28.0  # of a still picture, above and below the map

HOME, NETWORK, INSIDE, CHOSEN = COLOURS[1], COLOURS[0], COLOURS[2], COLOURS[3]
IDLE, LINE, QUIET = "#F4F4F4", "#BDBDBD", "#5F5F5F"

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle: its upper left corner, its width and height."""

    x: float
    y: float
    width: float
    height: float

    @property
    def centre(self) -> Point:
        return self.x + self.width / 2, self.y + self.height / 2

    def cut(self, columns: int, rows: int, gap: float) -> list[Box]:
        """Equal boxes, row by row, with a gap between them."""
        width, height = (self.width + gap) / columns, (self.height + gap) / rows
        return [
            Box(self.x + column * width, self.y + row * height, width - gap, height - gap)
            for row in range(rows)
            for column in range(columns)
        ]


@dataclass(frozen=True)
class Layout:
    """Where everything stands. `road` is the network between the nodes' two rows."""

    height: float
    nodes: tuple[Box, ...]
    gpus: tuple[Box, ...]
    experts: tuple[Box, ...]
    road: Box


def layout(cluster: Cluster) -> Layout:
    """Nodes in two rows with the network between them; in a node up to four GPUs a row; in a GPU its experts."""
    columns = math.ceil(cluster.nodes / 2)
    gpu_columns = min(4, cluster.gpus)
    gpu_rows = math.ceil(cluster.gpus / gpu_columns)
    cell_columns = math.ceil(math.sqrt(cluster.experts))
    cell_rows = math.ceil(cluster.experts / cell_columns)
    gpu_height = cell_rows * (CELL + CELL_GAP) - CELL_GAP + PAD
    rack_height = gpu_rows * (gpu_height + GPU_GAP) - GPU_GAP
    node_height = HEAD + rack_height + FOOT
    road = Box(EDGE, EDGE + node_height + ROAD, WIDTH - 2 * EDGE, STRIP + LANE * cluster.nodes)
    below = road.y + road.height + ROAD
    rows = [Box(EDGE, y, WIDTH - 2 * EDGE, node_height).cut(columns, 1, NODE_GAP) for y in (EDGE, below)]
    nodes = [*rows[0], *rows[1]][: cluster.nodes]
    racks = [Box(node.x + PAD, node.y + HEAD, node.width - 2 * PAD, rack_height) for node in nodes]
    gpus = [gpu for rack in racks for gpu in rack.cut(gpu_columns, gpu_rows, GPU_GAP)[: cluster.gpus]]
    insides = [Box(gpu.x + PAD / 2, gpu.y + PAD / 2, gpu.width - PAD, gpu.height - PAD) for gpu in gpus]
    experts = [cell for each in insides for cell in each.cut(cell_columns, cell_rows, CELL_GAP)[: cluster.experts]]
    return Layout(below + node_height + EDGE, tuple(nodes), tuple(gpus), tuple(experts), road)


def path(cluster: Cluster, plan: Layout, start: int, end: int) -> list[Point]:
    """The wire from one GPU to another: straight inside a node, else over the network, on the goal's lane."""
    (x, y), (u, v) = plan.gpus[start].centre, plan.gpus[end].centre
    sender, receiver = cluster.node_of(start), cluster.node_of(end)
    if sender == receiver:
        return [(x, y), (u, v)]
    middle = (cluster.nodes - 1) / 2
    out, into = x + SPREAD * (receiver - middle), u + SPREAD * (sender - middle)
    lane = plan.road.y + STRIP + LANE * (receiver + 0.5)
    return [(out, y), (out, lane), (into, lane), (into, v)]


@dataclass(frozen=True)
class View:
    """One moment: a token's experts (best first), the GPU it lies on, its messages, and what each node has received."""

    title: str
    chosen: tuple[int, ...]
    home: int
    journey: Journey
    received: tuple[int, ...]

    @classmethod
    def of(
        cls, cluster: Cluster, name: str, chosen: Sequence[int], home: int, trips: Sequence[Journey] | None = None
    ) -> View:
        """A token, its title saying what it is and how far it travels.

        Args:
            trips: all journeys so far, the token's own the last; without them, it travels alone, a copy for each node.
        """
        trips = [journey(cluster, chosen, home)] if trips is None else trips
        nodes = {cluster.node_of(cluster.gpu_of(expert)) for expert in chosen}
        title = (
            f"{name}: {_count(len(chosen), 'expert', 'experts')} on {_count(len(nodes), 'node', 'nodes')}, "
            f"{_count(len(trips[-1].network), 'copy', 'copies')} over the network"
        )
        return cls(title, tuple(chosen), home, trips[-1], received(cluster, trips))


def received(cluster: Cluster, trips: Sequence[Journey]) -> tuple[int, ...]:
    """How many messages of these journeys came to each node over the network."""
    counts = [0] * cluster.nodes
    for trip in trips:
        for _, gpu in trip.network:
            counts[cluster.node_of(gpu)] += 1
    return tuple(counts)


def cluster_figure(cluster: Cluster, *views: View) -> Figure:
    """The map, once for each view, one below the other, and what the colours mean."""
    plan = layout(cluster)
    each = TITLE + plan.height
    height = each * len(views) + KEY
    with house_style():
        figure = Figure(figsize=(WIDTH / 100, height / 100), layout="none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        axes.axis("off")
        for number, view in enumerate(views):
            top = number * each + TITLE
            axes.text(EDGE, top - 10, view.title, fontsize=14, fontweight="bold", gid=f"title-{number}")
            _draw(axes, cluster, plan, view, top, f"{number}-")
        _key(axes, height - KEY / 2)
    return figure


def _draw(axes: Axes, cluster: Cluster, plan: Layout, view: View, top: float, name: str) -> None:
    nodes = {cluster.node_of(cluster.gpu_of(expert)) for expert in view.chosen}
    most = max(1, *view.received)
    _box(axes, plan.road, top, f"{name}road", facecolor="#EAF2F8", edgecolor="none")
    for number, node in enumerate(plan.nodes):
        here = number in nodes
        _box(axes, node, top, f"{name}node-{number}", facecolor="white", edgecolor="black" if here else LINE,
             linewidth=2 if here else 1)  # fmt: skip
        colour = "black" if here else QUIET
        halo = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # words stand upon wires
        axes.text(node.x + PAD, top + node.y + 18, f"node {number}", fontsize=11, color=colour, bbox=halo)
        axes.text(node.x + node.width - PAD, top + node.y + 18, f"received {view.received[number]}", fontsize=11,
                  ha="right", color=colour, bbox=halo, gid=f"{name}received-{number}")  # fmt: skip
        bar = Box(node.x + PAD, node.y + node.height - FOOT + 8, node.width - 2 * PAD, 7)
        _box(axes, bar, top, f"{name}room-{number}", facecolor=IDLE, edgecolor="none")
        full = Box(bar.x, bar.y, bar.width * view.received[number] / most, bar.height)
        _box(axes, full, top, f"{name}bar-{number}", facecolor=NETWORK, edgecolor="none")
    for number, gpu in enumerate(plan.gpus):
        home = number == view.home
        _box(axes, gpu, top, f"{name}gpu-{number}", facecolor=HOME if home else "white", edgecolor=LINE)
    for number, cell in enumerate(plan.experts):
        _box(axes, cell, top, f"{name}expert-{number}", facecolor=CHOSEN if number in view.chosen else IDLE,
             edgecolor=LINE, linewidth=0.6)  # fmt: skip
    for kind, colour, width in (("network", NETWORK, 2.0), ("inside", INSIDE, 1.6)):
        for number, (start, end) in enumerate(getattr(view.journey, kind)):
            xs, ys = zip(*path(cluster, plan, start, end), strict=True)
            axes.plot(xs, [top + y for y in ys], color=colour, linewidth=width, gid=f"{name}{kind}-{number}",
                      marker="o", markevery=[len(xs) - 1], markersize=5, solid_joinstyle="round")  # fmt: skip
    axes.text(plan.road.x + plan.road.width - 8, top + plan.road.y + 17, "network between the nodes", fontsize=11,
              ha="right", color=QUIET, bbox={"facecolor": "#EAF2F8", "edgecolor": "none", "pad": 1})  # fmt: skip


def _box(axes: Axes, box: Box, top: float, name: str, **style: object) -> None:
    axes.add_patch(Rectangle((box.x, top + box.y), box.width, box.height, gid=name, **style))


def _key(axes: Axes, y: float) -> None:
    names = ("the token's own GPU", "its experts", "a copy between nodes", "a copy inside a node")
    for x, colour, name in zip((10, 210, 345, 555), (HOME, CHOSEN, NETWORK, INSIDE), names, strict=True):
        if colour in (HOME, CHOSEN):
            axes.add_patch(Rectangle((x, y - 7), 20, 14, facecolor=colour, edgecolor=LINE))
        else:
            axes.plot([x, x + 20], [y, y], color=colour, linewidth=2, marker="o", markevery=[1], markersize=5)
        axes.text(x + 32, y, name, fontsize=11, va="center")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
