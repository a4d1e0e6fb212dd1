"""The ledger explorer shows the ledger's numbers, and every control moves its picture."""

from __future__ import annotations

import base64

import pytest
from matplotlib.figure import Figure

from dsv3_mini.config import PRESETS, ModelConfig
from dsv3_mini.ledger import ledger
from dsv3_mini.viz.figures.ledger import PALE, byte_size, ledger_figure, short
from dsv3_mini.viz.widgets.ledger import CONTEXTS, books, draw_ledger, ledger_explorer


def heights(figure: Figure) -> dict[str, float]:
    return {bar.get_gid(): bar.get_height() for axes in figure.axes for bar in axes.patches if bar.get_gid()}


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_bars_are_the_ledgers_numbers() -> None:
    bars = heights(draw_ledger("small", 1024))
    assert len(bars) == 5 * len(PRESETS)
    for name in PRESETS:
        book = ledger(ModelConfig.preset(name), 1024)
        assert bars[f"all-{name}"] == book.parameters.main
        assert bars[f"activated for a token-{name}"] == book.parameters.activated
        assert bars[f"keys and values of all heads-{name}"] == 1024 * book.cache.bytes("mha")
        assert bars[f"the latent of MLA-{name}"] == 1024 * book.cache.bytes("mla")
        assert bars[f"-{name}"] == pytest.approx(book.cost.dollars)


def test_the_marked_model_has_its_numbers_written_out() -> None:
    figure = draw_ledger("671b", 4096)
    assert labels(figure) == ["671B", "37.6B", "20.5 GB", "288 MB", "$5.3M"]
    assert "70,272 bytes" in figure.get_suptitle() and "6% of them" in figure.get_suptitle()
    full = {bar.get_gid() for axes in figure.axes for bar in axes.patches if bar.get_alpha() == 1.0}
    assert full == {gid for gid in heights(figure) if gid.endswith("-671b")}
    assert {bar.get_alpha() for axes in figure.axes for bar in axes.patches if bar.get_gid()} == {1.0, PALE}


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_bar_is_on_its_axis(context: int) -> None:
    for axes in draw_ledger("nano", context).axes:
        low, high = axes.get_ylim()
        assert all(low < bar.get_height() < high / 5 for bar in axes.patches if bar.get_gid())


def test_a_figure_of_fewer_models() -> None:
    two = {name: books(512)[name] for name in ("nano", "16b")}
    assert len(heights(ledger_figure(two, "16b", 512))) == 10


def test_numbers_as_one_reads_them() -> None:
    assert [short(x) for x in (671026419200, 15_200_000, 970, 4096, 2.5, 1.4e13)] == [
        "671B",
        "15.2M",
        "970",
        "4.1k",
        "2.5",
        "14.0T",
    ]
    assert [byte_size(x) for x in (70_272, 9.2107e9, 12, 6.5e11)] == ["70.3 kB", "9.2 GB", "12 B", "650 GB"]


def test_every_control_moves_the_picture() -> None:
    explorer = ledger_explorer()
    seen = {explorer.picture.value}
    for preset in PRESETS:
        explorer.set(preset=preset)
        seen.add(explorer.picture.value)
    assert len(seen) == len(PRESETS)
    explorer.set(context=CONTEXTS[-1])
    assert explorer.picture.value not in seen
    assert explorer.values == {"preset": "671b", "context": CONTEXTS[-1]}


def test_it_shows_something_without_a_kernel() -> None:
    data, _ = ledger_explorer()._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and "671b" in data["text/plain"]
