"""Dropping, for comparison: what DeepSeek-V3 does without (lesson 10).

Many mixtures of experts give each expert a fixed number of places, its *capacity*: `factor` times an even share of the
choices. Who comes later finds the expert full and is dropped: that expert adds nothing to that token. Places keep tensors of
one size; the price is lost work where an expert is popular, and empty places where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.router import Router, Routing


def capacity_for(factor: float, choices: int, n_experts: int) -> int:
    """Places of each expert: `factor` even shares of all the choices (tokens times k), rounded up."""
    return math.ceil(factor * choices / n_experts)


def within_capacity(chosen: Int[Tensor, "T k"], n_experts: int, capacity: int) -> Bool[Tensor, "T k"]:
    """True where a choice finds a place: the first `capacity` choices of each expert, token by token, slot by slot."""
    queue = torch.nn.functional.one_hot(chosen.flatten(), n_experts).cumsum(0)
    place = queue.gather(1, rearrange(chosen, "T k -> (T k) 1"))
    return rearrange(place <= capacity, "(T k) 1 -> T k", k=chosen.shape[1])


@contextmanager
def dropping(model: DeepSeekV3, factor: float) -> Iterator[list[float]]:
    """Inside, every router of the model drops what is beyond its capacity, counted over each batch that it is given.

    Yields a list to which each router appends the share of choices that it dropped.
    """
    shares: list[float] = []

    def drop(router: Router, _: Any, routing: Routing) -> Routing:
        chosen, experts = rearrange(routing.chosen, "b s k -> (b s) k"), routing.scores.shape[-1]
        kept = within_capacity(chosen, experts, capacity_for(factor, chosen.numel(), experts))
        shares.append(1 - kept.float().mean().item())
        return replace(routing, gates=routing.gates * kept.view_as(routing.gates))

    hooks = [module.register_forward_hook(drop) for module in model.modules() if isinstance(module, Router)]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()
