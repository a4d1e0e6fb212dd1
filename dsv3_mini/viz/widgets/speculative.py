"""Widget of lesson 22: a text as its passes come, drafts that held and drafts that fell, and the speed that makes of it."""

from __future__ import annotations

import functools

import ipywidgets
import torch
from matplotlib.figure import Figure

from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.inference.watching import Pass, watch
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.viz.figures.marked_text import Kind, draw_marked_text, marked_height
from dsv3_mini.viz.figures.speculative import draw_speed
from dsv3_mini.viz.style import house_style
from dsv3_mini.viz.widgets.explorer import Explorer

MOST = 4  # drafts a pass


def marked(tokenizer: Tokenizer, passes: list[Pass]) -> tuple[list[str], list[Kind]]:
    """The tokens of some passes as text, each with where it came from; a draft that fell stands before what replaced it."""
    words: list[str] = []
    kinds: list[Kind] = []
    for each in passes:
        for place, token in enumerate(each.written):
            drafted = place < each.from_drafts
            if not drafted and each.refused is not None:
                words.append(_word(tokenizer, each.refused))
                kinds.append("refused")
            words.append(_word(tokenizer, token))
            kinds.append("drafted" if drafted else "own")
    return words, kinds


def judged(passes: list[Pass]) -> tuple[int, int]:
    """How many drafts held, and how many were judged (those before them had held)."""
    held = sum(each.from_drafts for each in passes)
    return held, held + sum(each.refused is not None for each in passes)


def draft_explorer(model: DeepSeekV3, tokenizer: Tokenizer, opening: str, max_new_tokens: int = 72) -> Explorer:
    """`set(passes=..., drafts=..., temperature=..., cost=...)`: the text after so many passes, and its speed.

    Raises:
        DataError: the model has no MTP module, or the opening leaves no room.
    """
    if not len(model.mtp):
        raise DataError("the model has no MTP module: nothing drafts (num_nextn_predict_layers of at least 1)")
    prompt = [tokenizer.eos_id, *tokenizer.encode(opening)]
    if len(prompt) + max_new_tokens > model.cfg.max_position_embeddings:
        raise DataError(f"an opening of {len(prompt)} tokens leaves no room for {max_new_tokens} more: shorten it")

    @functools.cache
    def passes_of(drafts: int, temperature: float) -> list[Pass]:
        generator = torch.Generator(device=model.lm_head.weight.device).manual_seed(0)
        return list(
            watch(
                model,
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                generator=generator,
                stop_id=tokenizer.eos_id,
                use_mtp=True,
                drafts=drafts,
            )  # fmt: skip
        )

    def draw(passes: int, drafts: int, temperature: float, cost: float) -> Figure:
        everything = passes_of(drafts, temperature)
        chosen = everything[: passes + 1]  # the first reads the opening and drafts nothing
        held, checked = judged(chosen)
        written = sum(len(each.written) for each in chosen[1:])
        words, kinds = marked(tokenizer, chosen)
        words, kinds = [opening, *words], ["given", *kinds]
        text, speed = marked_height(words, kinds), 3.6
        end = " (the end)" if passes >= len(everything) - 1 else ""
        with house_style():
            figure = Figure(figsize=(9.2, text + speed), layout="none")
            title = f"{len(chosen) - 1} passes, {written} tokens; {held} of {checked} drafts held{end}"
            draw_marked_text(figure, words, kinds, title, bottom=speed)
            axes = figure.add_axes((0.1, 0.62 / (text + speed), 0.87, (speed - 1.1) / (text + speed)))
            draw_speed(axes, drafts, cost, held / max(1, checked), written / max(1, len(chosen) - 1))
        return figure

    return Explorer(
        draw,
        "A text in lines; drafted tokens that held have one colour, the main model's own another, drafts that fell are struck "
        "through. Below, curves of speed against the share of drafts that hold, with a point for this text.",
        passes=ipywidgets.IntSlider(12, min=1, max=max_new_tokens, description="passes", continuous_update=False),
        drafts=ipywidgets.IntSlider(1, min=1, max=MOST, description="drafts a pass", continuous_update=False),
        temperature=ipywidgets.FloatSlider(
            0.0, min=0, max=1.5, step=0.5, description="temperature", continuous_update=False
        ),
        # A browser tells a screen reader a float's first digit alone; of a list it tells every place.
        cost=ipywidgets.SelectionSlider(
            options=[(f"{price:.2f}", price) for price in (1 + n / 20 for n in range(21))],
            value=1.05,
            description="price of a pass with drafts",
            continuous_update=False,
        ),
    )


def _word(tokenizer: Tokenizer, token: int) -> str:
    return "(end)" if token == tokenizer.eos_id else tokenizer.decode([token])
