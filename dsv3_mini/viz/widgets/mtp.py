"""The prediction ladder of lesson 11: what each depth of a trained model believes at each position of a text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import ipywidgets
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.data import sums
from dsv3_mini.data.stories import HELD_OUT_SEED, generate_story
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.viz.figures.mtp import Rung, ladder_figure
from dsv3_mini.viz.figures.tokens import shown
from dsv3_mini.viz.widgets.explorer import Explorer

CAME, OTHER = "the token that came", "the likeliest other token"
LENGTH = 48  # tokens of a text that are read
BEST = 5  # tokens that a panel of beliefs lists


@torch.no_grad()
def beliefs(model: DeepSeekV3, ids: Sequence[int]) -> list[Float[Tensor, "s_j v"]]:
    """Probabilities of every depth, the main model first: row i of depth j is about token i + j + 1."""
    out = model(torch.tensor([list(ids)]))
    return [logits[0].float().softmax(dim=-1) for logits in (out.logits, *out.mtp_logits)]


def sample_texts() -> dict[str, str]:
    """Texts that no training contained: three stories and a sum."""
    stories = {f"story {n + 1}": generate_story(HELD_OUT_SEED, n).text for n in range(3)}
    return {**stories, "a sum": sums.held_out_sum(0).text}


def ladder_explorer(model: DeepSeekV3, tokenizer: Tokenizer, texts: Mapping[str, str] | None = None) -> Explorer:
    """Every depth's guesses along a text, and one position's beliefs. `set(text=..., position=..., reads=...)` moves it.

    Args:
        texts: name -> text, to look at texts of one's own; three stories and a sum by default.

    Raises:
        DataError: the model has no MTP module, or a text is too short for its depths.
    """
    if not len(model.mtp):
        raise DataError("the model has no MTP module: a ladder needs one (num_nextn_predict_layers of at least 1)")
    rungs = len(model.mtp) + 1
    chosen = sample_texts() if texts is None else texts
    rows = {name: [tokenizer.eos_id, *tokenizer.encode(text)][:LENGTH] for name, text in chosen.items()}
    shortest = min(rows, key=lambda name: len(rows[name]))
    last = len(rows[shortest]) - 1 - rungs  # from here the deepest prediction is about the last token
    if last < 1:
        raise DataError(
            f"text {shortest!r} has {len(rows[shortest]) - 1} tokens: at least {rungs + 1} are needed, to climb every rung"
        )

    def word(id_: int) -> str:
        return shown(tokenizer.token_bytes(id_))

    @functools.cache
    def told(text: str) -> list[Tensor]:
        return beliefs(model, rows[text])

    def draw(text: str, position: int, reads: str) -> Figure:
        ids, said = rows[text], told(text)
        read = ids[position + 1]
        if reads == OTHER:
            read = next(i for i in said[0][position].topk(2).indices.tolist() if i != read)
            # Only what is said at this position has read the other token; elsewhere the text stays as it is.
            supposed = beliefs(model, [*ids[: position + 1], read, *ids[position + 2 :]])
            deeper = zip(said[1:], supposed[1:], strict=True)
            said = [said[0], *(_with_row(old, position, new[position]) for old, new in deeper)]
        best = []
        for table in said:
            likely = table[position].topk(BEST)
            best.append([(word(i), p) for p, i in zip(likely.values.tolist(), likely.indices.tolist(), strict=True)])
        drawn = [_rung(depth, table, ids, word) for depth, table in enumerate(said)]
        return ladder_figure([word(i) for i in ids], drawn, position, word(read), best)

    return Explorer(
        draw,
        "A table: the tokens of a text, and under each what the main model and each depth had guessed, with the "
        "probability they gave it; below, bars of the likeliest tokens at one position.",
        text=ipywidgets.Dropdown(options=list(rows), description="text"),
        position=ipywidgets.IntSlider(
            value=min(8, last), min=1, max=last, description="position", continuous_update=False
        ),
        reads=ipywidgets.Dropdown(
            options=(CAME, OTHER), description="depth 1 reads", layout=ipywidgets.Layout(width="max-content")
        ),
    )


def _rung(depth: int, probabilities: Tensor, ids: Sequence[int], word: Callable[[int], str]) -> Rung:
    """The prediction of the last position is about a token that the text does not have: it is left out."""
    came = torch.tensor(ids[depth + 1 :])
    said = probabilities[: len(came)]
    right = said.gather(-1, came[:, None])[:, 0]
    return Rung(depth, [word(i) for i in said.argmax(-1).tolist()], right.tolist())


def _with_row(table: Tensor, row: int, values: Tensor) -> Tensor:
    changed = table.clone()
    changed[row] = values
    return changed
