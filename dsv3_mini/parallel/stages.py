"""A model cut into stages, each a run of layers, which lie on different processes (report section 3.2.1).

The first stage also has the embedding, the last one the final norm, the head and the MTP modules. MTP reads the embedding,
too. Where the stages lie in a V (DualPipeV, ZBVZeroBubble) the first and the last are on one process, so that the embedding is
there once, as in the report; elsewhere the last stage has a copy, and the two add up their gradients.

From stage to stage travel the hidden states and one number, the balance losses of the layers so far. The last stage adds
them to the cross-entropies: so each loss has its gradient where its layer lies, and its value where the loss is told.

Weights keep the names that they have in the whole model. Of layers that lie elsewhere a process keeps the routers' biases:
they are few, and every process moves all of them by the load that all have been told. So checkpoints and the trainer do not
know of stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.rope import rotations
from dsv3_mini.model.router import Router, Routing
from dsv3_mini.train.balance import LoadCounter
from dsv3_mini.train.losses import cross_entropy, sequence_balance_loss


def split_layers(cfg: ModelConfig, n_stages: int) -> tuple[range, ...]:
    """The main layers of each stage, as even as may be; an MTP module counts as a layer of the last stage.

    Raises:
        ConfigError: there are fewer layers than stages.
    """
    if not 1 <= n_stages <= cfg.num_hidden_layers:
        raise ConfigError(
            f"{n_stages} stages of {cfg.num_hidden_layers} layers: each stage needs a layer, and there is at least one stage"
        )
    blocks = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    small, larger = divmod(blocks, n_stages)
    sizes = [small + (stage < larger) for stage in range(n_stages)]
    sizes[-1] -= cfg.num_nextn_predict_layers
    while sizes[-1] < 1:  # more MTP modules than a stage's share: the largest stage gives the last one a layer
        sizes[sizes.index(max(sizes))] -= 1
        sizes[-1] += 1
    ends = [sum(sizes[: stage + 1]) for stage in range(n_stages)]
    return tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True))


def stage_parts(cfg: ModelConfig, n_stages: int) -> tuple[tuple[str, ...], ...]:
    """The parts of the model that each stage has, by their names in it."""
    found = [[f"layers.{layer}" for layer in layers] for layers in split_layers(cfg, n_stages)]
    found[0].append("embed_tokens")
    mtp = [f"mtp.{depth}" for depth in range(cfg.num_nextn_predict_layers)]
    found[-1] += ["norm", "lm_head", *mtp]
    if mtp and n_stages > 1:
        found[-1].append("embed_tokens")
    return tuple(map(tuple, found))


@dataclass(frozen=True)
class Weighing:
    """What turns a micro-batch's sums into its part of the batch's loss. Worked out once for a batch, in every process.

    Args:
        counts: targets of the whole batch, for the next token and for each MTP depth.
        rows: of the whole batch. mtp, balance: the report's lambda and alpha.
    """

    counts: tuple[int, ...]
    rows: int
    mtp: float
    balance: float


class Stage(nn.Module):
    """A part of a model, in the modules of the model itself.

    Args:
        run: what is called to compute; it is handed the stage and its inputs, and calls `compute`.
    """

    def __init__(self, model: DeepSeekV3, layers: range, first: bool, last: bool, run: Callable[..., Any]) -> None:
        super().__init__()
        self.cfg, self.first, self.last, self.run = model.cfg, first, last, run
        self.layers = nn.ModuleDict({str(layer): model.layers[layer] for layer in layers})
        if first or (last and len(model.mtp)):
            self.embed_tokens = model.embed_tokens
        if last:
            self.norm, self.lm_head, self.mtp = model.norm, model.lm_head, model.mtp
        self.begin()

    def begin(self) -> None:
        """Forget what the batch before has counted: the routers' load, and [main, mtp, balance] of each micro-batch."""
        self.counter, self.told = LoadCounter(), []

    def forward(self, *inputs: Tensor, **batch: Any) -> tuple[Tensor, Tensor] | Tensor:
        return self.run(self, *inputs, **batch)

    def compute(
        self,
        x: Float[Tensor, "rows s d"] | None = None,
        balance: Float[Tensor, " 1"] | None = None,
        *,
        tokens: Int[Tensor, "b s"],
        targets: Int[Tensor, "b s"],
        weighing: Weighing,
        rows: int,
    ) -> tuple[Float[Tensor, "rows s d"], Float[Tensor, " 1"]] | Float[Tensor, " 1"]:
        """Hidden states and balance losses for the next stage; of the last stage, this micro-batch's part of the loss.

        Args:
            x: hidden states; the first stage makes them from the tokens.
            rows: in a message. Torch sends messages of one size, and some micro-batches are a row shorter.
        """
        turn = rotations(self.cfg, torch.arange(tokens.shape[1], device=tokens.device))
        if self.first:
            x, balance = self.embed_tokens(tokens), torch.zeros(1, device=tokens.device)
        x, routings = x[: len(tokens)], []
        for block in self.layers.values():
            x, routing = block(x, turn)
            routings += [] if routing is None else [routing]
        ahead = []
        if self.last:
            x = self.norm(x)
            ahead = self._ahead(x, tokens, routings) if weighing.mtp else []
        self.counter.add([routing.detach() for routing in routings])
        share = len(tokens) / weighing.rows
        balance = balance + share * sum(sequence_balance_loss(r.scores, r.chosen.shape[-1]) for r in routings)
        if not self.last:
            return F.pad(x, (0, 0, 0, 0, 0, rows - len(x))), balance
        head, counts = self.lm_head.weight, torch.tensor(weighing.counts, device=tokens.device)
        main = cross_entropy(x, head, targets, counts[0])
        depths = [cross_entropy(h, head, targets[:, j:], counts[j]) for j, h in enumerate(ahead, start=1)]
        mtp = torch.stack(depths).mean() if depths else torch.zeros_like(main)
        self.told.append(torch.stack([main, mtp, balance[0]]).detach())
        return main + weighing.mtp * mtp + weighing.balance * balance

    def _ahead(self, hidden: Tensor, tokens: Tensor, routings: list[Routing]) -> list[Tensor]:
        """The states of each MTP depth, as DeepSeekV3.hidden_states has them; adds their routings."""
        embedding, states = self.embed_tokens(tokens), []
        for depth, module in enumerate(self.mtp, start=1):
            length = tokens.shape[1] - depth
            if length < 1:
                break
            turn = rotations(self.cfg, torch.arange(length, device=tokens.device))
            hidden, routing = module(embedding[:, depth:], hidden[:, :length], turn)
            states.append(hidden)
            routings += [] if routing is None else [routing]
        return states


class StagedModel(DeepSeekV3):
    """A model that lies here in part. FSDP, where weights are shared, puts them together for `run` as for a forward."""

    def run(self, stage: Stage, *inputs: Tensor, **batch: Any) -> tuple[Tensor, Tensor] | Tensor:
        return stage.compute(*inputs, **batch)


def take_stages(model: DeepSeekV3, n_stages: int, own: tuple[int, ...]) -> dict[int, Stage]:
    """The stages `own` of a whole model. All that they do not need is taken out of it, but for the routers' biases."""
    parts = stage_parts(model.cfg, n_stages)
    needed = {part for stage in own for part in parts[stage]}
    for part in {part for all_parts in parts for part in all_parts} - needed:
        within, _, name = part.rpartition(".")
        setattr(model.get_submodule(within), name, _biases_alone(model.get_submodule(part)))
    model.__class__ = StagedModel
    layers, last = split_layers(model.cfg, n_stages), n_stages - 1

    def run(*inputs: Any, **batch: Any) -> Any:
        return model.run(*inputs, **batch)  # FSDP puts another `run` into the model, later

    return {n: Stage(model, layers[n], n == 0, n == last, run) for n in own}


def _biases_alone(module: nn.Module) -> nn.Module:
    """The routers in a module, under their names, with nothing but their biases."""
    left = nn.Module()
    for name, child in module.named_children():
        if isinstance(child, Router):
            child.weight = None
            left.add_module(name, child)
        elif any(isinstance(part, Router) for part in child.modules()):
            left.add_module(name, _biases_alone(child))
    return left
