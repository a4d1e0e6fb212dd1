"""What a smaller cache costs a model that is trained already: its latent cut, or its heads averaged, and the loss after it.

A layer caches a latent of c numbers for each token, and `kv_b_proj` ("up", [h(n+v) c]) rebuilds from it the keys and values
of all heads. A matrix of rank k in its place is a product A B, where B [k c] makes k numbers of the latent: those k are then
all that has to be cached, and A [h(n+v) k] is the new up-projection. So a cut replaces one matrix in each layer. Nothing
else of the model changes, and nothing is trained on.

Simplified: every cut is fitted to the latents of the whole model, also in layers that stand behind a cut one, and the
rotated key, which is cached beside the latent, is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.evaluate.bits_per_byte import held_out_loss
from dsv3_mini.model import DeepSeekV3

# up [o c], latents [T c] of some tokens, rank -> up with that rank
Cut = Callable[[Float[Tensor, "o c"], Float[Tensor, "T c"], int], Float[Tensor, "o c"]]


@dataclass(frozen=True)
class Measured:
    """Losses of a trained model with smaller caches, in nats per token.

    cuts: width of the latent -> loss. averaged: groups of heads -> loss. Both hold the model as it is: at its own latent
    width, and at as many groups as heads.
    """

    cfg: ModelConfig
    cuts: Mapping[int, float]
    averaged: Mapping[int, float]


def ups_of(model: DeepSeekV3) -> list[Float[Tensor, "o c"]]:
    """The up-projection of every main layer: rows are (head, n of its key then v of its value)."""
    return [block.self_attn.kv_b_proj.weight.detach().clone() for block in model.layers]


@torch.no_grad()
def collect_latents(model: DeepSeekV3, tokens: Int[Tensor, "b s"]) -> list[Float[Tensor, "T c"]]:
    """What every main layer would cache of these tokens, the rotated key left out."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], latent: Tensor) -> None:
        kept.append(rearrange(latent, "b s c -> (b s) c"))

    hooks = [block.self_attn.kv_a_layernorm.register_forward_hook(keep) for block in model.layers]
    try:
        model.main_states(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


# ---- three ways to cut a latent ----------------------------------------------------------------------------------------


def fitted_to_the_data(up: Float[Tensor, "o c"], latents: Float[Tensor, "T c"], rank: int) -> Float[Tensor, "o c"]:
    """Of all matrices of that rank the one that rebuilds the keys and values of these tokens best, in mean square.

    The keys and values are latents up^T [T o]. Projected onto their `rank` first right singular vectors they lose least of
    all projections (Eckart and Young), and a projection of the outputs is one of the matrix that makes them.
    """
    directions = torch.linalg.svd(latents @ up.T, full_matrices=False).Vh[:rank]
    return directions.T @ (directions @ up)


def from_the_weights(up: Float[Tensor, "o c"], latents: Float[Tensor, "T c"], rank: int) -> Float[Tensor, "o c"]:
    """The nearest matrix of that rank: best where latents point everywhere alike. `latents` are not looked at."""
    left, sizes, right = torch.linalg.svd(up, full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank]


def at_random(up: Float[Tensor, "o c"], latents: Float[Tensor, "T c"], rank: int) -> Float[Tensor, "o c"]:
    """`rank` directions of the latent, blindly chosen (always the same). `latents` are not looked at."""
    random = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(up.shape[1], rank, generator=random)).Q.to(up)
    return (up @ directions) @ directions.T


CUTS: dict[str, Cut] = {
    "fitted to the data": fitted_to_the_data,
    "from the weights alone": from_the_weights,
    "random directions": at_random,
}


def heads_averaged(up: Float[Tensor, "o c"], heads: int, groups: int) -> Float[Tensor, "o c"]:
    """Neighbouring heads share the mean of their keys and of their values: MLA's heads turned into `groups` of GQA.

    Raises:
        ConfigError: the heads do not fall into that many groups of one size.
    """
    if groups < 1 or heads % groups:
        raise ConfigError(f"groups = {groups} must divide heads ({heads}): each group serves as many heads")
    members = heads // groups
    shared = reduce(up, "(g m nv) c -> g nv c", "mean", g=groups, m=members)
    return repeat(shared, "g nv c -> (g m nv) c", m=members)


# ---- what it costs -----------------------------------------------------------------------------------------------------


def loss_after(model: DeepSeekV3, ups: Sequence[Float[Tensor, "o c"]], rows: Int[Tensor, "b s1"], pad_id: int) -> float:
    """Nats per token with these up-projections in place of the model's own, which it has back afterwards."""
    before = ups_of(model)
    try:
        _put(model, ups)
        return held_out_loss(model, rows, pad_id).per_token
    finally:
        _put(model, before)


@torch.no_grad()
def _put(model: DeepSeekV3, ups: Sequence[Tensor]) -> None:
    for block, up in zip(model.layers, ups, strict=True):
        block.self_attn.kv_b_proj.weight.copy_(up)
