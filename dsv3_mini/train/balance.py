"""Load balance without an auxiliary loss: biases that follow the load (report section 2.1.2).

Once per optimizer step, with the load of the whole batch (all micro-batches, all ranks), an expert that got more than
its share has its bias lowered by gamma, one that got less has it raised. Only the choice feels the bias, never the gate
values, so balance costs no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.router import Router, Routing


class LoadCounter:
    """Adds up the load of every sparse layer (MTP's too) over the micro-batches of one step."""

    def __init__(self) -> None:
        self.load: dict[int, Int[Tensor, " e"]] = {}

    def add(self, routings: Iterable[Routing]) -> None:
        for routing in routings:
            before = self.load.get(routing.layer)
            self.load[routing.layer] = routing.load.clone() if before is None else before + routing.load


@torch.no_grad()
def update_biases(model: DeepSeekV3, load: Mapping[int, Int[Tensor, " e"]], gamma: float) -> None:
    """b_i += gamma * sign(mean load - load_i), in every router that has biases.

    Args:
        load: layer number -> choices that fell on each expert in the whole batch; without MTP's if MTP did not run.
        gamma: the bias update speed; 0 leaves the biases alone.
    """
    for router in routers(model):
        if router.e_score_correction_bias is not None and gamma and router.layer in load:
            counted = load[router.layer].float()
            router.e_score_correction_bias += gamma * torch.sign(counted.mean() - counted)


def max_violation(load: Int[Tensor, " e"]) -> float:
    """MaxVio: by how much the busiest expert exceeds an even share, in shares. 0 is even; e - 1 is collapse onto one."""
    counted = load.float()
    return float(counted.max() / counted.mean().clamp(min=1e-9) - 1)


def routers(model: DeepSeekV3) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def mean_bias_spread(model: DeepSeekV3) -> Float[Tensor, ""]:
    """Mean over the routers of the biases' standard deviation: how hard balance has to push."""
    biases = [r.e_score_correction_bias.std() for r in routers(model) if r.e_score_correction_bias is not None]
    return torch.stack(biases).mean() if biases else torch.zeros(())
