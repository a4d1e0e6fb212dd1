"""The live writer: a model writes, and each token's experts light up layer by layer.

Python generates and sends what happened; `writer.js` shows it at a pace that one can follow, and lets the reader stop, step
back, hover over a token, and give another opening.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import anywidget
import matplotlib
import torch
import traitlets
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.inference.generate import choose
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.router import Routing
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.routing import GATE_MAP, visit_figure
from dsv3_mini.viz.widgets.explorer import with_picture
from dsv3_mini.viz.widgets.page import save_page

MODULE = Path(__file__).with_suffix(".js")
SHADES = 32  # of the gate colours
CANDIDATES = 3  # next tokens shown with each token, at most


class Step(TypedDict):
    """One token on its way: its text, whether it was given, a row for each sparse layer of experts and their gate values
    (largest first), and the likeliest next tokens with their probabilities."""

    text: str
    given: bool
    chosen: list[list[int]]
    gates: list[list[float]]
    next: list[tuple[str, float]]


@torch.no_grad()
def watch(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    opening: str,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """Continue `opening` up to the end of its document, token by token, and say of each token where it went.

    Raises:
        DataError: the opening fills the model's context.
    """
    ids = [tokenizer.eos_id, *tokenizer.encode(opening)]
    room = model.cfg.max_position_embeddings - len(ids)
    if room < 1:
        raise DataError(f"an opening of {len(ids)} tokens leaves no room in a context of {len(ids) + room}: shorten it")
    weight = model.lm_head.weight
    cache = LatentCache.for_model(model.cfg, 1, len(ids) + room, weight.dtype, weight.device)
    output = model(torch.tensor([ids], device=weight.device), cache=cache)
    for position in range(1, len(ids)):  # position 0 is the token that begins every document
        yield _step(tokenizer, ids[position], True, output.routing, output.logits[0], position)
    for _ in range(min(max_new_tokens, room)):
        token = choose(output.logits[:, -1].float(), temperature, generator)
        if int(token) == tokenizer.eos_id:
            return
        output = model(token[:, None], cache=cache)
        yield _step(tokenizer, int(token), False, output.routing, output.logits[0], 0)


def _step(tokenizer: Tokenizer, token: int, given: bool, routing: list[Routing], logits: Tensor, position: int) -> Step:
    chosen, gates = [], []
    for layer in routing:
        order = layer.gates[0, position].argsort(descending=True)
        chosen.append(layer.chosen[0, position][order].tolist())
        gates.append([round(gate, 4) for gate in layer.gates[0, position][order].tolist()])
    likely = logits[position].float().softmax(-1).topk(CANDIDATES)
    following = [
        ("(end)" if i == tokenizer.eos_id else tokenizer.decode([i]), round(share, 4))
        for rank, (i, share) in enumerate(zip(likely.indices.tolist(), likely.values.tolist(), strict=True))
        if rank == 0 or share >= 0.005  # less would be shown as 0%
    ]
    return Step(text=tokenizer.decode([token]), given=given, chosen=chosen, gates=gates, next=following)


class Writer(anywidget.AnyWidget):
    """`writer.write("One rainy morning, Nora")` lets the model write; a displayed writer shows it as it comes.

    Args:
        model, tokenizer: what writes.
        temperature: 0 writes the likeliest token; above, tokens are drawn, from one seed for each text.
    """

    _esm = MODULE
    steps = traitlets.List(help="what has been written, a Step for each token").tag(sync=True)
    writing = traitlets.Bool(False, help="whether more is to come").tag(sync=True)
    run = traitlets.Int(0, help="counts the texts, so that the page begins again with each").tag(sync=True)
    cursor = traitlets.Int(-1, help="the token that the reader stands on; -1: none chosen yet").tag(sync=True)
    note = traitlets.Unicode("", help="what went wrong with an opening").tag(sync=True)
    shape = traitlets.Dict(help="of the model: experts, groups, dense, sparse").tag(sync=True)
    ramp = traitlets.List(help="colours from the smallest to the largest gate value").tag(sync=True)

    def __init__(self, model: DeepSeekV3, tokenizer: Tokenizer, temperature: float = 0.0) -> None:
        cfg = model.cfg
        shades = matplotlib.colormaps[GATE_MAP]
        super().__init__(
            shape={
                "experts": cfg.n_routed_experts,
                "groups": cfg.n_group,
                "dense": cfg.first_k_dense_replace,
                "sparse": cfg.num_hidden_layers - cfg.first_k_dense_replace,
            },
            ramp=[to_hex(shades(i / (SHADES - 1))) for i in range(SHADES)],
        )
        self.language_model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.on_msg(self._asked)

    def write(self, opening: str, max_new_tokens: int = 200) -> str:
        """Continue `opening`; returns the whole text.

        Raises:
            DataError: the opening fills the model's context.
        """
        generator = torch.Generator(device=self.language_model.lm_head.weight.device).manual_seed(0)
        steps = watch(self.language_model, self.tokenizer, opening, max_new_tokens, self.temperature, generator)
        first = next(steps, None)  # an opening that cannot be continued leaves what stands there
        written: list[Step] = []
        due = 1
        self.steps, self.cursor, self.note, self.writing = [], -1, "", True
        self.run += 1
        for step in [] if first is None else chain([first], steps):
            written.append(step)
            # The page gets all of the list each time: sent when it has grown by a quarter, the whole is sent five times.
            if len(written) >= due:
                self.steps, due = list(written), len(written) * 5 // 4 + 1
        self.steps, self.writing = written, False
        return self.text

    def show(self, token: int) -> None:
        """Stand on a token, as a click on it does; negative numbers count from the end.

        Raises:
            DataError: there is no such token.
        """
        if not -len(self.steps) <= token < len(self.steps):
            raise DataError(f"token {token} is not there: {len(self.steps)} have been written")
        self.cursor = token % len(self.steps)

    @property
    def text(self) -> str:
        """All tokens so far, together."""
        return "".join(step["text"] for step in self.steps)

    @property
    def here(self) -> int:
        """The token that the reader stands on: the first that the model wrote, until another is chosen."""
        given = sum(step["given"] for step in self.steps)
        return self.cursor if 0 <= self.cursor < len(self.steps) else min(given, len(self.steps) - 1)

    def figure(self) -> Figure:
        """The same picture without a browser.

        Raises:
            DataError: nothing has been written yet.
        """
        if not self.steps:
            raise DataError("nothing has been written yet: call write() first")
        step = self.steps[self.here]
        return visit_figure(
            [each["text"] for each in self.steps],
            sum(each["given"] for each in self.steps),
            self.here,
            torch.tensor(step["chosen"]),
            torch.tensor(step["gates"]),
            self.shape["experts"],
            self.shape["groups"],
            self.shape["dense"],
            step["next"],
            max(gate for each in self.steps for row in each["gates"] for gate in row),
        )

    @property
    def alt(self) -> str:
        return (
            f"A text that the model wrote; one token is marked, and below it stand {self.shape['sparse']} rows of "
            f"{self.shape['experts']} experts, those that the token visits coloured by gate value."
        )

    def save_html(self, path: str | Path) -> Path:
        """Write one file that plays this text in any browser, without Python and without a network. Returns the path."""
        state = {name: getattr(self, name) for name in ("steps", "writing", "run", "cursor", "note", "shape", "ramp")}
        return save_page(path, MODULE, "A model writes, and its experts light up", self.alt, state, max_width="860px")

    def _asked(self, _: Any, content: Any, buffers: Any) -> None:
        """The page asks for another text. An error in here would show nowhere, so that it becomes the note."""
        if isinstance(content, dict) and isinstance(content.get("write"), str):
            try:
                self.write(content["write"])
            except DataError as error:
                self.note = str(error)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        picture = png(self.figure()) if self.steps else None
        return with_picture(super()._repr_mimebundle_(**kwargs), self.alt, picture)
