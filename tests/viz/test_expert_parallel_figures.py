"""Lesson 19's pictures, read back from their artists; its explorer's numbers, walked by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.parallel.exchange_time import PARTS, PartTime, exchange_times
from dsv3_mini.parallel.traffic import INSIDE_SPEED, NETWORK_SPEED, Cluster, journey, row_bytes
from dsv3_mini.viz.figures.expert_parallel import exchange_figure, skew_figure, wires_figure
from dsv3_mini.viz.style import COLOURS
from dsv3_mini.viz.widgets.expert_parallel import wires_explorer

SMALL = Cluster(nodes=3, gpus=2, experts=2)


def choices(tokens: int, k: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(tokens, SMALL.n_experts, generator=torch.Generator().manual_seed(seed)).topk(k).indices


# ---- times -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_times_are_those_of_the_fullest_gpu_and_of_a_mean_one(kind: str) -> None:
    chosen, home = choices(40), torch.randint(0, 6, (40,), generator=torch.Generator().manual_seed(1))
    sent, got = ({wire: [0] * 6 for wire in ("network", "inside")} for _ in range(2))
    for token, gpu in zip(chosen.tolist(), home.tolist(), strict=True):
        trip = journey(SMALL, token, gpu)
        for wire in sent:
            for start, end in getattr(trip, wire):
                sent[wire][start] += 1
                got[wire][end] += 1
    times = exchange_times(SMALL, chosen, home, 300, kind)
    assert tuple(times) == PARTS
    assert {tuple(part.split(", ")) for part in PARTS} == set(product(("dispatch", "combine"), ("network", "inside")))
    for part, time in times.items():
        way, wire = part.split(", ")
        size = row_bytes(300, kind)[way == "combine"]
        speed = NETWORK_SPEED if wire == "network" else INSIDE_SPEED
        assert time.seconds == pytest.approx(max(*sent[wire], *got[wire]) * size / speed)
        assert time.even == pytest.approx(sum(sent[wire]) / 6 * size / speed)
        assert time.waiting == pytest.approx(time.seconds - time.even) and time.waiting >= 0


# ---- figures -----------------------------------------------------------------------------------------------------------


def test_every_token_lies_where_it_should_at_each_stop() -> None:
    chosen = torch.tensor([[0, 1], [5, 2], [3, 2], [4, 0]])
    home = torch.tensor([0, 0, 2, 2])
    before, away, after = exchange_figure(chosen, home, experts=6, ranks=3).axes
    expected = {  # rank, place, token
        before: {(0, 0, 0), (0, 1, 1), (2, 0, 2), (2, 1, 3)},
        away: {(0, 0, 0), (0, 1, 3), (1, 0, 1), (1, 1, 2), (2, 0, 1), (2, 1, 3)},
    }
    expected[after] = expected[before]
    for axes, squares in expected.items():
        found = {tuple(map(int, patch.get_gid().split("-"))): patch for patch in axes.patches}
        assert set(found) == squares
        for (rank, place, token), patch in found.items():
            assert (patch.get_x(), patch.get_y()) == (place, pytest.approx(rank - 0.4))
            assert to_hex(patch.get_facecolor()) == COLOURS[int(home[token])].lower()
            assert (to_hex(patch.get_edgecolor()) == "#000000") == (axes is after), "a result has a black frame"
        assert [text.get_text() for text in axes.texts] == [str(token) for _, _, token in sorted(found)]


def test_skew_figure_draws_the_curves() -> None:
    curves = {"rows": [1.0, 8.0], "inside": [1.1, 4.0], "network": [1.1, 2.0]}
    axes = skew_figure([0.0, 3.0], curves, ceiling=2.0).axes[0]
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines[:3]} == curves
    assert set(axes.lines[3].get_ydata()) == {2.0} and axes.get_yscale() == "log"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "2", "5", "10"]


TIMES = {name: PartTime(seconds=0.003 * (i + 1), even=0.001 * (i + 1)) for i, name in enumerate(PARTS)}


def test_wires_figure_shows_bytes_by_gpu_and_waiting_by_part() -> None:
    received = torch.tensor([1e6, 2e6, 3e6, 6e6], dtype=torch.float64)
    bars, clock = wires_figure(received, 2, TIMES, "title").axes
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([1, 2, 3, 6])
    colours = [to_hex(bar.get_facecolor()) for bar in bars.patches]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert [line.get_ydata()[0] for line in bars.lines] == pytest.approx([3, 6])
    even, waiting = clock.patches[:4], clock.patches[4:]
    assert [bar.get_width() for bar in even] == pytest.approx([1, 2, 3, 4])
    assert [(bar.get_x(), bar.get_width()) for bar in waiting] == [
        (pytest.approx(i), pytest.approx(2 * i)) for i in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize(
    "figure",
    [
        exchange_figure(choices(9), torch.arange(9) % 6, experts=12, ranks=6),
        skew_figure([0.0, 3.0], {"rows that a GPU computes": [1.0, 40.0], "copies": [1.0, 2.1]}, 2.0),
        wires_figure(torch.rand(64, dtype=torch.float64) * 1e6, 8, TIMES, "Skew 3, at most 4 nodes"),
    ],
    ids=["exchange", "skew", "wires"],
)
def test_figures_have_titles_units_and_nothing_small_or_cut_off(figure: Figure) -> None:
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        assert axes.get_title(loc="left") and axes.get_xlabel()
    assert figure.axes[0].get_ylabel()
    texts = [t for t in figure.findobj(lambda a: hasattr(a, "get_fontsize")) if t.get_text() and t.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 11
    for axes in figure.axes:
        for text in (
            axes.title,
            axes._left_title,
            axes.xaxis.label,
            axes.yaxis.label,
            *axes.get_legend_handles_labels()[0:0],
        ):
            if text.get_text():
                box = text.get_window_extent(renderer)
                assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text


# ---- the explorer ------------------------------------------------------------------------------------------------------


def words_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_the_explorers_picture_moves_with_each_control_and_tells_the_sums() -> None:
    home = torch.arange(60) % 6
    asked = []

    def route(skew: float, limit: int) -> Tensor:
        asked.append((skew, limit))
        return choices(60, k=limit, seed=int(4 * skew))

    explorer = wires_explorer(SMALL, route, home, width=256)
    pictures = [explorer.picture.value]
    for control in ({"skew": 1.0}, {"limit": 2}, {"tokens_in": "BF16"}):
        explorer.set(**control)
        pictures.append(explorer.picture.value)
    assert len(set(pictures)) == 4
    assert len(asked) == len(set(asked)) == 3, "a routing is made once, whatever tokens travel in"
    times = exchange_times(SMALL, choices(60, k=2, seed=4), home, 256, "plain")
    total, even = (sum(getattr(time, what) for time in times.values()) for what in ("seconds", "even"))
    said = f"Skew 1, at most 2 nodes, tokens in BF16: {1e3 * total:.1f} ms, {1 - even / total:.0%} of it waiting"
    assert said in words_of(explorer.draw(**explorer.values))


def test_fp8_makes_dispatch_smaller_and_leaves_combine() -> None:
    chosen, home = choices(60), torch.arange(60) % 6
    large, small = (exchange_times(SMALL, chosen, home, 256, kind) for kind in ("plain", "fp8"))
    for part in PARTS:
        shrunk = small[part].seconds / large[part].seconds
        assert shrunk == pytest.approx((256 + 2) / 512 if part.startswith("dispatch") else 1.0)
