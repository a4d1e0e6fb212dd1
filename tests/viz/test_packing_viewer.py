"""The packing pictures, read back from their artists, and the viewer: what it shows is what the package packs and masks."""

import base64
import io

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from dsv3_mini.data.packing import pack
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.model.transformer import same_document
from dsv3_mini.viz.figures import packing as figures
from dsv3_mini.viz.widgets.explorer import png
from dsv3_mini.viz.widgets.packing import LONGEST, SHORTEST, TEXTS, packing_explorer

EOS, PAD = 0, 1
DOCUMENTS = [[10] * 5, [11] * 4, [12] * 7, [13] * 3]


@pytest.fixture
def block():
    return pack(DOCUMENTS, 10, EOS, PAD)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.shipped()


def words_of(block):
    names = {EOS: "<eos>", PAD: "<pad>"}
    return [[names.get(token, f" w{token}") for token in row] for row in block.tokens.tolist()]


def pixels(axes):
    return np.asarray(axes.images[0].get_array())


def texts(axes):
    return [text.get_text() for text in axes.texts]


def hatched(axes):
    """(row, first place, how many places) of each stretch of padding."""
    found = [patch for patch in axes.patches if patch.get_hatch()]
    return [(round(p.get_y() + 0.5), round(p.get_x() + 0.5), round(p.get_width())) for p in found]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_show_each_document_where_it_stands_and_mark_the_torn_ones():
    cut = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 2, 2, 2], [3, 3, 3, 3, -1]])
    whole = torch.tensor([[0, 0, 0, -1, -1], [1, 1, 1, 1, -1], [2, 2, 2, -1, -1], [3, 3, 3, 3, -1]])
    figure = figures.rows_figure({"cut": cut, "whole": whole})
    above, below = figure.axes
    assert above.get_title(loc="left") == "cut: 1 of 4 documents torn, 93% filled"
    assert below.get_title(loc="left") == "whole: 0 of 4 documents torn, 70% filled"
    assert texts(above) == ["0", "1..", "..1", "2", "3"] and texts(below) == ["0", "1", "2", "3"]
    for axes, rows in ((above, cut), (below, whole)):
        shown = pixels(axes)
        same_colour = (shown.reshape(-1, 1, 3) == shown.reshape(1, -1, 3)).all(-1)
        assert (same_colour == (rows.flatten()[:, None] == rows.flatten()[None, :]).numpy()).all()
    assert hatched(above) == [(2, 4, 1)]
    assert hatched(below) == [(0, 3, 2), (1, 4, 1), (2, 3, 2), (3, 4, 1)]


def test_torn_documents_are_those_in_more_than_one_row():
    assert figures.torn_documents(torch.tensor([[0, 0, 1], [1, 1, 2], [2, 3, -1]])) == (2, 4)
    assert figures.torn_documents(torch.tensor([[4, 4, -1], [7, -1, -1]])) == (0, 2)


def test_costs_are_drawn_in_percent_at_their_row_lengths():
    figure = figures.packing_cost_figure([64, 128], {"cut": [0.5, 0.25]}, {"cut": [0, 0], "best fit": [0.1, 0.02]})
    torn, padding = figure.axes
    assert torn.lines[0].get_xydata().tolist() == [[64, 50], [128, 25]]
    assert [list(line.get_ydata()) for line in padding.lines] == [[0, 0], [10, 2]]
    assert [text.get_text() for text in padding.get_legend().get_texts()] == ["cut", "best fit"]
    assert torn.lines[0].get_color() == padding.lines[0].get_color() != padding.lines[1].get_color()
    assert "Documents torn" in torn.get_title(loc="left") and "padding" in padding.get_title(loc="left")
    assert torn.get_ylabel() == "share (%)"


# ---- domains ---------------------------------------------------------------------------------------------------------


def test_lengths_are_shares_of_each_domain_s_documents():
    figure = figures.lengths_figure({"sums": [12, 15, 18, 48], "code": [100, 205]}, row_length=160)
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "83% of the documents fit into a row of 160 tokens"
    sums, code = (patch.get_data() for patch in axes.patches)
    assert sums.values[1] == 75 and sums.values[4] == 25 and sums.values.sum() == 100
    assert sums.edges[1] == 10 and sums.edges[4] == 40
    assert code.values[10] == 50 and code.values[20] == 50
    assert list(axes.lines[0].get_xdata()) == [160, 160]


def test_bits_are_the_bars_lengths():
    axes = figures.bits_figure({"sums": 1.05, "prose": 2.7}).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1.05, 2.7]
    assert texts(axes) == ["1.05", "2.70"]


def test_samples_keep_their_lines_and_say_when_they_are_cut():
    code = "def f(x):\n    return x\n" + "\n".join(f"# {i}" for i in range(20))
    samples = {"sums": "1 + 1 = ?\nanswer: $2$", "code": code, "prose": " ".join(["long"] * 50)}
    figure = figures.samples_figure(samples, lines=6, width=80)
    sums, short, prose = figure.axes
    assert texts(sums) == ["1 + 1 = ?\nanswer: $2$"]
    lines = texts(short)[0].split("\n")
    assert lines[:2] == ["def f(x):", "    return x"] and lines[-1] == "..." and len(lines) == 6
    assert texts(prose)[0].split() == ["long"] * 50
    assert max(map(len, texts(prose)[0].split("\n"))) <= 80
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(samples)
    assert png(figure).startswith(b"\x89PNG")  # dollar signs are no formula


# ---- what a token sees -----------------------------------------------------------------------------------------------


def test_masks_are_coloured_where_a_query_sees_a_key(block):
    ids = block.document_ids[0]
    mask = same_document(ids[None])[0]
    causal = torch.ones_like(mask).tril()
    one, other = figures.mask_figure({"with": mask, "without": causal}, ids).axes
    for axes, shown in ((one, mask), (other, causal)):
        assert ((pixels(axes) < 1).any(-1) == shown.numpy()).all()
        assert axes.get_title(loc="left").endswith(f": {int(shown.sum())} pairs")
    borders = int((ids.diff() != 0).sum())
    assert len(one.lines) == 2 * borders


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("row", "query"), [(0, 0), (0, 7), (1, 3), (1, 9)])
def test_the_viewer_shows_what_attention_may_see(block, masked, row, query):
    figure = figures.packing_figure(words_of(block), block.document_ids, row, query, masked)
    rows, text = figure.axes
    ids = block.document_ids
    may_see = same_document(ids)[row, query] if masked else torch.arange(ids.shape[1]) <= query
    assert torch.equal(figures.visible_from(ids[row], query, masked), may_see)
    shown, real = pixels(rows), (ids >= 0).numpy()
    full = np.zeros(ids.shape, dtype=bool)
    full[row] = may_see.numpy()
    strong = (1 - shown).max(-1) > 0.3  # full colours are far from white, pale ones are near it
    assert (strong[real] == full[real]).all()
    boxes = [patch for patch in text.patches if str(patch.get_gid()).startswith("token")]
    assert len(boxes) == len(text.texts) == ids.shape[1]
    for place, box in enumerate(boxes):
        assert np.allclose(box.get_facecolor()[:3], shown[row, place])
    assert [place for place, box in enumerate(boxes) if box.get_linewidth() > 0] == [query]
    (outline,) = [patch for patch in rows.patches if patch.get_gid() == "looks"]
    assert (outline.get_y() + 0.5, outline.get_x() + 0.5) == (row, query)
    documents = len(set(ids[row][may_see].tolist()) - {-1})
    assert f"sees {int(may_see.sum())} token" in text.get_title(loc="left")
    assert f"of {documents} document" in text.get_title(loc="left")


def test_the_viewer_names_token_target_fill_and_padding(block):
    figure = figures.packing_figure(words_of(block), block.document_ids, 0, 1, masked=False)
    rows, text = figure.axes
    first, second = words_of(block)[0][1:3]
    title = text.get_title(loc="left")
    assert f"place 1: '{first.replace(' ', '·')}'" in title and f"its target: '{second.replace(' ', '·')}'" in title
    assert (
        rows.get_title(loc="left") == f"{len(block.tokens)} rows: {block.fill:.1%} filled, {1 - block.fill:.1%} padding"
    )
    padding = [(r, i) for r, i in (block.document_ids < 0).nonzero().tolist()]
    assert [(r, i + k) for r, i, n in hatched(rows) for k in range(n)] == padding
    assert texts(text) == [word.replace(" ", "·") for word in words_of(block)[0]]
    last = figures.packing_figure(words_of(block), block.document_ids, padding[0][0], padding[0][1] - 1, masked=True)
    assert "its target: padding, ignored" in last.axes[1].get_title(loc="left")


# ---- the widget ------------------------------------------------------------------------------------------------------


def test_its_texts_show_several_documents_in_a_row_and_some_padding(tokenizer):
    viewer = packing_explorer(tokenizer)
    block = packed(tokenizer, 32)
    row, query = viewer.values["row"], viewer.values["query"]
    assert block.document_ids[row].max() >= 1 and block.fill < 1
    unmasked, masked = (figures.visible_from(block.document_ids[row], query, each).sum() for each in (False, True))
    assert masked < unmasked  # so that the checkbox changes the first picture


def packed(tokenizer, length):
    documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    return pack(documents, length, tokenizer.eos_id, tokenizer.pad_id)


def test_each_control_changes_the_picture(tokenizer):
    viewer = packing_explorer(tokenizer)
    pictures = [viewer.picture.value]
    viewer.set(masked=True)
    pictures.append(viewer.picture.value)
    viewer.set(query=viewer.values["query"] - 3)
    pictures.append(viewer.picture.value)
    viewer.set(row=(viewer.values["row"] + 1) % (viewer.controls["row"].max + 1))
    pictures.append(viewer.picture.value)
    viewer.set(row_length=40)
    pictures.append(viewer.picture.value)
    assert len(set(pictures)) == 5
    assert imread(io.BytesIO(pictures[-1])).shape[:2] == imread(io.BytesIO(pictures[0])).shape[:2]


def test_row_and_query_stay_in_what_is_packed(tokenizer):
    viewer = packing_explorer(tokenizer)
    viewer.set(row_length=SHORTEST)
    viewer.set(row=viewer.controls["row"].max, query=viewer.controls["query"].max)
    assert viewer.values["row"] == len(packed(tokenizer, SHORTEST).tokens) - 1
    assert viewer.values["query"] == SHORTEST - 1
    viewer.set(row_length=LONGEST)
    assert viewer.values["row"] == len(packed(tokenizer, LONGEST).tokens) - 1
    assert viewer.controls["query"].max == LONGEST - 1


def test_without_a_kernel_there_is_a_picture_and_a_sentence(tokenizer):
    viewer = packing_explorer(tokenizer)
    data, _ = viewer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == viewer.picture.value and len(viewer.picture.value) < 120_000
    assert "packed documents" in data["text/plain"]
