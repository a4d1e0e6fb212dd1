"""The packing viewer: documents packed into rows of a length of your choice, and what each token there can see."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
from matplotlib.figure import Figure

from dsv3_mini.data.packing import NO_DOCUMENT, PackedBlock, pack
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.viz.figures.packing import packing_figure
from dsv3_mini.viz.widgets.explorer import Explorer

TEXTS = (
    "The kettle sings.",
    "47 + 38 = ?\nones: 7 + 8 = 15, write 5, carry 1\nanswer: 85",
    "Rain fell on the harbour all night, and the boats stayed in.",
    "def area(width, height):\n    return width * height",
    "Nora left the key under the bench.\nQuestion: Where is the key?\nAnswer: under the bench",
    "A list keeps its order.",
    "for line in file:\n    print(line)",
    "The baker gave the miller two loaves, and the miller gave him flour.",
    "9 + 6 = 15",
    "Owls hunt at night.",
)
SHORTEST, LONGEST = 12, 48

ALT = (
    "Rows of packed documents, each document in its own colour, padding grey and hatched. One token is outlined: what it "
    "can attend to is in full colour, the rest is pale; below, the row of that token as text."
)


def packing_explorer(tokenizer: Tokenizer, texts: Sequence[str] = TEXTS, row_length: int = 32) -> Explorer:
    """Controls: `row_length` (tokens of inputs), `masked` (whether attention keeps to one document), `row` and `query`
    (the token that looks).
    """
    documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]

    def packed(length: int) -> PackedBlock:
        return pack(documents, length, tokenizer.eos_id, tokenizer.pad_id)

    def draw(row_length: int, masked: bool, row: int, query: int) -> Figure:
        block = packed(row_length)
        words = [[_word(tokenizer, i) for i in tokens] for tokens in block.tokens.tolist()]
        return packing_figure(words, block.document_ids, min(row, len(words) - 1), min(query, row_length - 1), masked)

    length = ipywidgets.IntSlider(
        row_length, SHORTEST, LONGEST, 4, description="row length (tokens)", continuous_update=False
    )
    masked = ipywidgets.Checkbox(False, description="mask other documents", indent=False)
    first = packed(row_length).document_ids
    richest = int(first.amax(dim=1).argmax())  # the row with the most documents: there a mask changes something
    row = ipywidgets.IntSlider(richest, 0, len(first) - 1, description="row", continuous_update=False)
    in_last = int((first[richest] != NO_DOCUMENT).sum()) - 2  # in the last document of that row, with a target
    query = ipywidgets.IntSlider(in_last, 0, row_length - 1, description="token that looks", continuous_update=False)

    def keep_in_range(change: dict) -> None:
        row.max, query.max = len(packed(change["new"]).tokens) - 1, change["new"] - 1

    length.observe(keep_in_range, names="value")  # before Explorer's own, so that one picture has all four right
    return Explorer(draw, ALT, row_length=length, masked=masked, row=row, query=query)


def _word(tokenizer: Tokenizer, token: int) -> str:
    names = {tokenizer.eos_id: "<eos>", tokenizer.pad_id: "<pad>"}
    return names.get(token) or tokenizer.decode([token])
