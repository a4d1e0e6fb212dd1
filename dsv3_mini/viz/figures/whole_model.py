"""The whole model as pictures: its map, its parameters as areas, and which mistakes a comparison of two models shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from dsv3_mini.config import ModelConfig
from dsv3_mini.ledger import Parameters, count_parameters
from dsv3_mini.ledger import Tensor as Entry
from dsv3_mini.viz.figures.ledger import short
from dsv3_mini.viz.style import COLOURS, house_style

STREAM, QUIET, INK = COLOURS[0], "#5F5F5F", "#111111"

# ---- the map -----------------------------------------------------------------------------------------------------------


def assembly_figure(cfg: ModelConfig) -> Figure:
    """The map of the model: embedding, dense layers, sparse layers, head, and below it what looks one token further."""
    dense, sparse = cfg.first_k_dense_replace, cfg.num_hidden_layers - cfg.first_k_dense_replace
    attention, feeds = COLOURS[2], COLOURS[1]
    with house_style():
        figure = Figure(figsize=(11.5, 4.4))
        axes = figure.subplots()
        axes.set(xlim=(0, 12.6), ylim=(0, 4.6), title="All parts are built; this lesson joins them to one stream")
        axes.axis("off")
        _line(axes, [(1.5, 3.1), (11.9, 3.1)], STREAM, 5)
        _box(axes, 0.1, 2.7, 1.4, 0.8, "embedding", STREAM)
        _frame(axes, 1.9, 2.3, 3.35, 1.55, f"{dense} dense {_layers(dense)}")
        _box(axes, 2.05, 2.65, 1.5, 0.9, "MLA\n05, 06, 07", attention)
        _box(axes, 3.7, 2.65, 1.4, 0.9, "SwiGLU\n04", feeds)
        _frame(axes, 5.5, 2.3, 3.35, 1.55, f"{sparse} sparse {_layers(sparse)}")
        _box(axes, 5.65, 2.65, 1.5, 0.9, "MLA\n05, 06, 07", attention)
        _box(axes, 7.3, 2.65, 1.4, 0.9, "experts\n08, 09, 10", feeds)
        _box(axes, 9.2, 2.75, 0.8, 0.7, "norm", QUIET)
        _box(axes, 10.3, 2.7, 0.9, 0.8, "head", STREAM)
        axes.text(12.0, 3.1, "next\ntoken", va="center")
        if cfg.num_nextn_predict_layers:
            _mtp_row(axes, cfg.num_nextn_predict_layers, attention)
    return figure


def _mtp_row(axes: Axes, modules: int, colour: str) -> None:
    name = "1 MTP module" if modules == 1 else f"{modules} MTP modules, one after the other"
    _line(axes, [(0.8, 2.7), (0.8, 0.85), (5.6, 0.85)], STREAM, 2)
    axes.text(1.0, 1.0, "the embedding of the token that came next", color=QUIET)
    _line(axes, [(9.6, 2.75), (9.6, 2.05), (6.3, 2.05), (6.3, 1.3)], STREAM, 2)
    axes.text(7.2, 1.97, "the normed state", va="top", color=QUIET, fontsize=12)
    _line(axes, [(6.9, 0.85), (11.9, 0.85)], STREAM, 5)
    _frame(axes, 5.5, 0.1, 4.6, 1.5, "")
    axes.text(5.5, -0.02, name, va="top", fontsize=12)
    _box(axes, 5.65, 0.4, 1.3, 0.9, "join\n11", STREAM)
    _box(axes, 7.15, 0.4, 1.7, 0.9, "sparse layer\n06 to 10", colour)
    _box(axes, 9.1, 0.5, 0.8, 0.7, "norm", QUIET)
    _box(axes, 10.3, 0.45, 0.9, 0.8, "same\nhead", STREAM)
    axes.text(12.0, 0.85, "the one\nafter", va="center")
    axes.set_ylim(-0.4, 4.6)


def _layers(count: int) -> str:
    return "layer" if count == 1 else "layers"


def _frame(axes: Axes, x: float, y: float, width: float, height: float, text: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, fill=False, linestyle="--", edgecolor=QUIET))
    axes.text(x, y + height + 0.08, text, va="bottom", fontsize=12)


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.1", facecolor="white")
    patch.set(edgecolor=colour, linewidth=2.5, zorder=3)
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=11, zorder=4)


def _line(axes: Axes, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
    """A line through the points, with an arrow at its end."""
    if len(points) > 2:
        axes.plot(*zip(*points[:-1], strict=True), color=colour, linewidth=width, zorder=1)
    arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=arrow, zorder=1)


# ---- parameters as areas -----------------------------------------------------------------------------------------------

PARTS = {  # part -> colour
    "routed experts": COLOURS[1],
    "attention": COLOURS[2],
    "shared experts": COLOURS[4],
    "dense FFN": COLOURS[5],
    "embedding": COLOURS[0],
    "output head": COLOURS[3],
    "MTP's join": COLOURS[6],
    "gates and norms": COLOURS[7],
}
GROUPINGS = ("part", "layer")
COUNTED = ("all", "at work for one token")
FRAME = (7.6, 5.2)  # inches of the map of areas


@dataclass(frozen=True)
class Leaf:
    """Numbers of one tensor (all its copies together) in one layer of the model."""

    layer: str
    part: str
    tensor: str
    count: int


@dataclass(frozen=True)
class Tile:
    """One rectangle of the map: `inner` of `outer`, in inches from the upper left corner."""

    outer: str
    inner: str
    part: str
    count: int
    x: float
    y: float
    width: float
    height: float


def leaves(cfg: ModelConfig, counted: str = "all", mtp: bool = True) -> list[Leaf]:
    """Every tensor of the ledger with its place in the model.

    Args:
        counted: "all" counts every number, gate biases included; "at work for one token" only those of the experts that it
            visits, as the report counts (no biases, embedding and head whole).
        mtp: whether MTP modules are there; their pass through the shared head is not counted again.
    """
    parameters, count = count_parameters(cfg), _activated if counted == COUNTED[1] else _total
    places = _entries(cfg, parameters, mtp)
    return [Leaf(layer, _part(entry, parameters), entry.name, count(entry)) for layer, entry in places if count(entry)]


def tiles(cfg: ModelConfig, by: str = "part", counted: str = "all", mtp: bool = True) -> list[Tile]:
    """The map of areas: an outer rectangle for each part (tensors inside) or for each layer (parts inside)."""
    groups: dict[str, dict[tuple[str, str], int]] = {}
    for leaf in leaves(cfg, counted, mtp):
        outer, inner = (leaf.part, leaf.tensor) if by == "part" else (leaf.layer, leaf.part)
        inside = groups.setdefault(outer, {})
        inside[inner, leaf.part] = inside.get((inner, leaf.part), 0) + leaf.count
    laid: list[Tile] = []
    frames = squarify([sum(inside.values()) for inside in groups.values()], 0, 0, *FRAME)
    for (outer, inside), frame in zip(groups.items(), frames, strict=True):
        for ((inner, part), count), box in zip(inside.items(), squarify(list(inside.values()), *frame), strict=True):
            laid.append(Tile(outer, inner, part, count, *box))
    return laid


def squarify(
    sizes: Sequence[float], x: float, y: float, width: float, height: float
) -> list[tuple[float, float, float, float]]:
    """Rectangles (x, y, width, height) that fill a frame, their areas in proportion to `sizes` (all above 0).

    Greedy: the largest first, in rows along the shorter side of what is still free. A row takes one more as long as its
    worst rectangle becomes squarer by it. The result is in the order of `sizes`.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    areas = [sizes[i] * width * height / sum(sizes) for i in order]
    placed: dict[int, tuple[float, float, float, float]] = {}
    start = 0
    while start < len(areas):
        side, end = min(width, height), start + 1
        while end < len(areas) and _worst(areas[start : end + 1], side) <= _worst(areas[start:end], side):
            end += 1
        thick, along = sum(areas[start:end]) / side, 0.0
        for i in range(start, end):
            length = areas[i] / thick
            placed[order[i]] = (x, y + along, thick, length) if width >= height else (x + along, y, length, thick)
            along += length
        if width >= height:
            x, width = x + thick, max(width - thick, 1e-12)  # rounding may leave a little less than nothing
        else:
            y, height = y + thick, max(height - thick, 1e-12)
        start = end
    return [placed[i] for i in range(len(sizes))]


def _worst(areas: Sequence[float], side: float) -> float:
    """The longest ratio of two sides in a row of these areas along `side`."""
    thick = sum(areas) / side
    return max(max(thick * thick / area, area / (thick * thick)) for area in areas)


def treemap_figure(name: str, cfg: ModelConfig, by: str = "part", counted: str = "all", mtp: bool = True) -> Figure:
    """Where the parameters are: areas by part or by layer, and the sum of each part beside them."""
    laid = tiles(cfg, by, counted, mtp)
    total = sum(tile.count for tile in laid)
    sums = {part: sum(tile.count for tile in laid if tile.part == part) for part in PARTS}
    largest = max(sums, key=lambda part: sums[part])
    what = "parameters" if counted == COUNTED[0] else "parameters at work for one token"
    with house_style():
        figure = Figure(figsize=(11.5, 6.0), layout="none")
        axes = figure.add_axes((0.01, 0.02, FRAME[0] / 11.5, FRAME[1] / 6.0))
        axes.set(xlim=(0, FRAME[0]), ylim=(FRAME[1], 0))
        axes.axis("off")
        for tile in laid:
            edge = {"edgecolor": "white", "linewidth": 0.6, "gid": f"{tile.outer}/{tile.inner}"}
            axes.add_patch(Rectangle((tile.x, tile.y), tile.width, tile.height, facecolor=PARTS[tile.part], **edge))
        for outer in dict.fromkeys(tile.outer for tile in laid):
            _name_outer(axes, outer, [tile for tile in laid if tile.outer == outer], total)
        if by == "part":
            for tile in laid:
                _name_inner(axes, tile)
        _legend(figure, sums, total)
        figure.text(
            0.01, 0.935, f"{name}: {short(total)} {what}, {sums[largest] / total:.0%} of them in {largest}",
            fontsize=14, fontweight="bold",
        )  # fmt: skip
    return figure


def _name_outer(axes: Axes, outer: str, own: Sequence[Tile], total: int) -> None:
    """An outline, and the name in the upper left corner where there is room."""
    left, top = min(t.x for t in own), min(t.y for t in own)
    width, height = max(t.x + t.width for t in own) - left, max(t.y + t.height for t in own) - top
    axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="white", linewidth=2.5))
    share = f"{sum(t.count for t in own) / total:.1%}"
    for text in (f"{outer}, {share}", outer, outer.removeprefix("layer ")):
        if _fits(text, width, height):
            ink = _ink(min(own, key=lambda t: (t.y, t.x)).part)
            axes.text(left + 0.07, top + 0.06, text, va="top", fontsize=11, fontweight="bold", color=ink)
            return


def _name_inner(axes: Axes, tile: Tile) -> None:
    """Name and count in the lower right corner, where they do not meet the outer name."""
    text = f"{tile.inner.removeprefix('routed ').removeprefix('shared ')} {short(tile.count)}"
    if _fits(text, tile.width, tile.height - 0.3):
        axes.text(
            tile.x + tile.width - 0.07, tile.y + tile.height - 0.06, text,
            ha="right", va="bottom", fontsize=11, color=_ink(tile.part),
        )  # fmt: skip


def _fits(text: str, width: float, height: float) -> bool:
    """Whether a line of 11 points has room in so many inches."""
    return 0.105 * len(text) + 0.14 < width and height > 0.26


def _ink(part: str) -> str:
    """White on the two dark colours, near black on the others."""
    return "white" if PARTS[part] in (COLOURS[0], COLOURS[3]) else INK


def _legend(figure: Figure, sums: Mapping[str, int], total: int) -> None:
    left, top, step = (FRAME[0] + 0.35) / 11.5, 0.87, 0.085
    for row, (part, count) in enumerate(sorted(sums.items(), key=lambda item: -item[1])):
        y = top - row * step
        patch = Rectangle((left, y - 0.03), 0.02, 0.045, facecolor=PARTS[part], transform=figure.transFigure)
        figure.add_artist(patch)
        figure.text(left + 0.028, y, part, va="bottom", fontsize=12)
        figure.text(left + 0.028, y - 0.005, f"{short(count)}, {count / total:.2%}" if count else "none", va="top",
                    fontsize=11, color=QUIET)  # fmt: skip


def _entries(cfg: ModelConfig, parameters: Parameters, mtp: bool) -> Iterator[tuple[str, Entry]]:
    """(layer, tensor) of the model as it trains, in the order of the stream."""
    yield from (("embedding", entry) for entry in parameters.embedding.tensors)
    for layer in range(cfg.num_hidden_layers):
        block = parameters.moe_layer if cfg.is_moe_layer(layer) else parameters.dense_layer
        yield from ((f"layer {layer}", entry) for entry in block.tensors)
    yield from (("head", entry) for entry in (*parameters.final_norm.tensors, *parameters.head.tensors))
    for module in range(cfg.num_nextn_predict_layers if mtp else 0):
        yield from ((f"MTP {module + 1}", entry) for entry in parameters.mtp_module.tensors)


def _part(entry: Entry, parameters: Parameters) -> str:
    """The key of PARTS that an entry of the ledger belongs to."""
    if entry.name in {own.name for own in parameters.attention.tensors}:  # its two norms with it
        return "attention"
    if entry.kind in ("norm", "bias") or entry.name == "gate":
        return "gates and norms"
    named = {"embedding": "embedding", "output head": "output head", "eh_proj": "MTP's join"}
    kind = entry.name.partition(" ")[0]
    return named.get(entry.name) or {"routed": "routed experts", "shared": "shared experts"}.get(kind, "dense FFN")


def _total(entry: Entry) -> int:
    return entry.total


def _activated(entry: Entry) -> int:
    return 0 if entry.kind == "bias" else entry.activated


# ---- what a comparison notices -----------------------------------------------------------------------------------------

NOTHING = 1e-9  # where no change at all is drawn
MARKS = (("o", COLOURS[1]), ("s", COLOURS[0]), ("^", COLOURS[4]))


def visibility_figure(changes: Mapping[str, Mapping[str, float]], tolerance: float) -> Figure:
    """How much each mistake moves the logits of each model; what lies left of the line passes the comparison.

    Args:
        changes: model -> mistake -> largest change of a logit, relative to the largest logit. tolerance: of the comparison.
    """
    mistakes = list(next(iter(changes.values())))
    hidden = {model: sum(change <= tolerance for change in own.values()) for model, own in changes.items()}
    with house_style():
        figure = Figure(figsize=(11, 0.42 * len(mistakes) + 1.9))
        axes = figure.subplots()
        for number, ((model, own), (mark, colour)) in enumerate(zip(changes.items(), MARKS, strict=False)):
            values = [max(own[mistake], NOTHING) for mistake in mistakes]
            places = [
                row + 0.16 * (number - (len(changes) - 1) / 2) for row in range(len(mistakes))
            ]  # none hides another
            axes.plot(values, places, mark, color=colour, markersize=9, alpha=0.85, label=model, gid=model)
        axes.axvline(tolerance, color=INK, linewidth=1.5)
        axes.text(tolerance, -0.75, "noticed from here on ", ha="left", va="center", fontsize=11)
        axes.text(tolerance, -0.75, "not noticed ", ha="right", va="center", fontsize=11)
        axes.set(
            xscale="log", xlim=(NOTHING / 3, 30), ylim=(len(mistakes) - 0.5, -1.2),
            xlabel="largest change of a logit over the largest logit (on the far left: no change at all)",
        )  # fmt: skip
        axes.set_yticks(range(len(mistakes)), mistakes)
        axes.grid(axis="y", color="#E5E5E5")
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=len(changes), title="weights")
        missed = ", ".join(f"{count} on {model}" for model, count in hidden.items())
        title = f"Of {len(mistakes)} mistakes a comparison misses {missed} weights"
        figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
    return figure
