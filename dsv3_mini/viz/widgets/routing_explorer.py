"""The routing explorer: type a text, and see token by token and layer by layer which experts it visits, and whom they serve.

Python routes a text in one pass and sends the result once; `routing_explorer.js` lets the reader hover, step with the arrow
keys and play, without a question to the kernel. Shown are the sparse layers of the main model; multi-token prediction,
which reads one token further, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import matplotlib
import torch
import traitlets
from jaxtyping import Int
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.data.corpora import DOMAINS
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.routing import GATE_MAP
from dsv3_mini.viz.figures.routing_explorer import Profile, Routed, explorer_figure, tints
from dsv3_mini.viz.style import COLOURS, DOMAIN_COLOURS
from dsv3_mini.viz.widgets.explorer import with_picture
from dsv3_mini.viz.widgets.page import save_page

MODULE = Path(__file__).with_suffix(".js")
STATE = (
    "samples", "typed", "shares", "often", "domains", "shape", "ramp", "text", "token", "layer", "expert", "note",
)  # fmt: skip
SHADES = 32  # of the gate colours
SAMPLE_TOKENS = 128  # of each domain's sample, at most
REFERENCE_ROWS, REFERENCE_TOKENS = 8, 255  # of each domain: what the experts' profile is measured on
OFTEN, SEEN = 5, 8  # tokens named for an expert; a token must have been seen about so often to count
NAMES = {"stories": "a story", "sums": "a sum", "code": "code", "prose": "prose"}
TYPED = "your text"


@torch.no_grad()
def route(model: DeepSeekV3, tokenizer: Tokenizer, ids: Sequence[int]) -> Routed:
    """One pass over one document.

    Args:
        ids: the document's tokens, without the token that begins it.

    Raises:
        DataError: there are no tokens, more than the model's context, or the model has no sparse layers.
    """
    room = model.cfg.max_position_embeddings - 1
    if not ids:
        raise DataError("there is nothing to route: type a word or more")
    if len(ids) > room:
        raise DataError(f"{len(ids)} tokens are more than the {room} that the model's context holds: shorten the text")
    tokens = torch.tensor([[tokenizer.eos_id, *ids]], device=model.lm_head.weight.device)
    _, routing = model.main_states(tokens)
    if not routing:
        raise DataError("this model has no sparse layers: there are no experts to show")
    chosen = torch.stack([layer.chosen[0, 1:] for layer in routing], dim=1).cpu()  # [s l k]
    gates = torch.stack([layer.gates[0, 1:] for layer in routing], dim=1).float().cpu()
    order = gates.argsort(dim=-1, descending=True, stable=True)
    return Routed([tokenizer.decode([i]) for i in ids], chosen.gather(-1, order), gates.gather(-1, order))


@torch.no_grad()
def profile_of(
    model: DeepSeekV3, tokenizer: Tokenizer, reference: Mapping[str, Int[Tensor, "b s"]] | None = None
) -> Profile:
    """Whom each expert serves, measured on rows of every domain.

    Args:
        reference: domain -> rows of tokens; None takes held-out rows of the course's four domains.
    """
    reference = reference_rows(model, tokenizer) if reference is None else reference
    special = torch.tensor([tokenizer.eos_id, tokenizer.pad_id])
    loads, visits, seen = [], 0, torch.zeros(tokenizer.n_vocab)
    for tokens in reference.values():
        _, routing = model.main_states(tokens.to(model.lm_head.weight.device))
        counts = ~torch.isin(tokens, special)
        ids = tokens[counts]
        table = torch.stack(
            [_visits(layer.chosen.cpu()[counts], ids, layer.scores.shape[-1], seen) for layer in routing]
        )
        loads.append(table.sum(dim=-1) / max(1, len(ids)))
        visits = visits + table  # [l e v]
        seen += torch.bincount(ids, minlength=len(seen))
    load = torch.stack(loads, dim=-1)  # [l e n]: how often a token of the domain comes
    shares = load / load.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    faithful = visits / (seen + SEEN)  # the share of a token's visits that fall here, rare tokens held back
    often = [[_words(tokenizer, expert) for expert in layer] for layer in faithful]
    return Profile(tuple(reference), shares, often)


def _visits(chosen: Int[Tensor, "T k"], ids: Int[Tensor, " T"], n_experts: int, like: Tensor) -> Tensor:
    """[e v]: how often each token of the vocabulary visited each expert."""
    vocabulary = len(like)
    return torch.bincount((chosen * vocabulary + ids[:, None]).flatten(), minlength=n_experts * vocabulary).view(
        n_experts, vocabulary
    )


def _words(tokenizer: Tokenizer, faithful: Tensor) -> list[str]:
    best = faithful.argsort(descending=True, stable=True)[: 4 * OFTEN].tolist()
    words = [tokenizer.decode([i]) for i in best if faithful[i] > 0]
    return [word for word in words if "\ufffd" not in word][:OFTEN]


def reference_rows(model: DeepSeekV3, tokenizer: Tokenizer) -> dict[str, Int[Tensor, "b s"]]:
    """Rows of held-out text from each of the course's domains, as long as the model reads them."""
    length = min(REFERENCE_TOKENS, model.cfg.max_position_embeddings - 1)
    return {domain: held_out_rows(domain, tokenizer, length, REFERENCE_ROWS).tokens for domain in DOMAINS}


def first_documents(
    reference: Mapping[str, Int[Tensor, "b s"]], tokenizer: Tokenizer, length: int = SAMPLE_TOKENS
) -> dict[str, list[int]]:
    """A sample of each domain: its longest document of at most `length` tokens, or the beginning of a longer one."""
    ends = {tokenizer.eos_id, tokenizer.pad_id}
    samples = {}
    for domain, rows in reference.items():
        documents: list[list[int]] = [[]]
        for token in rows.flatten().tolist():
            if token in ends:
                documents.append([])
            else:
                documents[-1].append(token)
        whole = max((d for d in documents if len(d) <= length), key=len, default=[])
        longest = max(documents, key=len)
        samples[NAMES.get(domain, domain)] = whole if len(whole) > length // 2 else longest[:length]
    return samples


class RoutingExplorer(anywidget.AnyWidget):
    """`explorer = RoutingExplorer(model, tokenizer)` shows one text of each domain; `explorer.read(...)` one of yours.

    Args:
        model, tokenizer: what routes.
        reference: domain -> rows of tokens to learn the experts' profile from and to take samples of; None takes held-out
            rows of the course's four domains.
    """

    _esm = MODULE
    samples = traitlets.List(help="a routed text for each domain").tag(sync=True)
    typed = traitlets.Dict(help="the routed text that the reader typed; empty: none yet").tag(sync=True)
    shares = traitlets.List(help="of each expert's visitors, by domain").tag(sync=True)
    often = traitlets.List(help="tokens that each expert often gets").tag(sync=True)
    domains = traitlets.List(help="name and colour of each").tag(sync=True)
    shape = traitlets.Dict(help="of the model: experts, groups, dense, sparse").tag(sync=True)
    ramp = traitlets.List(help="colours from the smallest to the largest gate value").tag(sync=True)
    text = traitlets.Int(0, help="which text is shown: a sample, or behind them the typed one").tag(sync=True)
    token = traitlets.Int(0, help="the token that the reader stands on").tag(sync=True)
    layer = traitlets.Int(help="the layer that tints the text, by its number in the model").tag(sync=True)
    expert = traitlets.Int(-1, help="the expert of that layer that is looked at; -1: none").tag(sync=True)
    note = traitlets.Unicode("", help="what is wrong with a typed text").tag(sync=True)

    def __init__(
        self, model: DeepSeekV3, tokenizer: Tokenizer, reference: Mapping[str, Int[Tensor, "b s"]] | None = None
    ) -> None:
        cfg = model.cfg
        reference = reference_rows(model, tokenizer) if reference is None else reference
        self.language_model, self.tokenizer = model, tokenizer
        self.profile = profile_of(model, tokenizer, reference)
        self.routed = {
            name: route(model, tokenizer, ids) for name, ids in first_documents(reference, tokenizer).items()
        }
        shades = matplotlib.colormaps[GATE_MAP]
        colours = [DOMAIN_COLOURS.get(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(self.profile.domains)]
        super().__init__(
            samples=[_sent(name, routed, self.profile) for name, routed in self.routed.items()],
            shares=[[[round(s, 3) for s in expert] for expert in layer] for layer in self.profile.shares.tolist()],
            often=[[list(words) for words in layer] for layer in self.profile.often],
            domains=[list(pair) for pair in zip(self.profile.domains, colours, strict=True)],
            shape={
                "experts": cfg.n_routed_experts,
                "groups": cfg.n_group,
                "dense": cfg.first_k_dense_replace,
                "sparse": cfg.num_hidden_layers - cfg.first_k_dense_replace,
            },
            ramp=[to_hex(shades(i / (SHADES - 1))) for i in range(SHADES)],
            layer=cfg.first_k_dense_replace,
        )
        self.on_msg(self._asked)

    def read(self, text: str) -> Routed:
        """Route a text and show it, from its first token.

        Raises:
            DataError: it is empty, or longer than the model's context.
        """
        routed = route(self.language_model, self.tokenizer, self.tokenizer.encode(text))
        self.routed[TYPED] = routed
        with self.hold_sync():
            self.typed, self.note = _sent(TYPED, routed, self.profile), ""
            self.text, self.token, self.expert = len(self.samples), 0, -1
        return routed

    def set(
        self, text: str | None = None, token: int | None = None, layer: int | None = None, expert: int | None = None
    ) -> None:
        """Move the controls, as a reader would: a text by its name, a token by its place (negative: from the end), a layer
        by its number in the model, an expert by its number in that layer (-1: none).

        Raises:
            DataError: there is no such text, token, layer or expert.
        """
        names = list(self.routed)
        if text is not None and text not in names:
            raise DataError(f"text {text!r} is not here: choose one of {', '.join(names)}")
        shown = self.text if text is None else names.index(text)
        count = len(self.routed[names[shown]].words)
        token = (0 if text is not None else self.token) if token is None else token
        if not -count <= token < count:
            raise DataError(f"token {token} is not there: {names[shown]!r} has {count}")
        layer = self.layer if layer is None else layer
        if layer not in self.layers:
            raise DataError(
                f"layer {layer} has no experts to choose from: layers {self.layers[0]} to {self.layers[-1]} do"
            )
        expert = self.expert if expert is None else expert
        if not -1 <= expert < self.shape["experts"]:
            raise DataError(f"expert {expert} is not there: a layer has {self.shape['experts']}, counted from 0")
        with self.hold_sync():
            self.text, self.token, self.layer, self.expert = shown, token % count, layer, expert

    @property
    def layers(self) -> range:
        """The numbers of the sparse layers."""
        return range(self.shape["dense"], self.shape["dense"] + self.shape["sparse"])

    @property
    def shown(self) -> Routed:
        """The text that is shown."""
        return list(self.routed.values())[self.text]

    @property
    def experts_here(self) -> list[int]:
        """The experts that the marked token visits in the chosen layer, the largest gate value first."""
        return self.shown.chosen[self.token, self.layer - self.shape["dense"]].tolist()

    def figure(self) -> Figure:
        """The same picture without a browser."""
        return explorer_figure(
            self.shown,
            self.profile,
            self.token,
            self.layer - self.shape["dense"],
            self.shape["groups"],
            self.shape["dense"],
            None if self.expert < 0 else self.expert,
        )

    @property
    def alt(self) -> str:
        word = self.shown.words[self.token]
        return (
            f"Routing explorer: a text of {len(self.shown.words)} tokens, tinted by the domain that each token's experts "
            f"serve. Token {self.token + 1}, {word!r}, visits experts {', '.join(map(str, self.experts_here))} in layer "
            f"{self.layer}."
        )

    def save_html(self, path: str | Path) -> Path:
        """Write one file in which these texts can be explored in any browser, without Python and without a network."""
        state = {name: getattr(self, name) for name in STATE}
        return save_page(path, MODULE, "Which experts a text visits", self.alt, state, max_width="860px")

    def _asked(self, _: Any, content: Any, buffers: Any) -> None:
        """The page has another text. An error in here would show nowhere, so that it becomes the note."""
        if isinstance(content, dict) and isinstance(content.get("read"), str):
            try:
                self.read(content["read"])
            except DataError as error:
                self.note = str(error)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_picture(super()._repr_mimebundle_(**kwargs), self.alt, png(self.figure()))


def _sent(name: str, routed: Routed, profile: Profile) -> dict[str, Any]:
    """A routed text as plain numbers, a list for each token."""
    domain, strength = tints(routed, profile)
    return {
        "name": name,
        "words": list(routed.words),
        "chosen": routed.chosen.tolist(),
        "gates": [[[round(gate, 3) for gate in row] for row in rows] for rows in routed.gates.tolist()],
        "tint": [
            [[d, round(s, 2)] for d, s in zip(*rows, strict=True)]
            for rows in zip(domain.tolist(), strength.tolist(), strict=True)
        ],
    }
