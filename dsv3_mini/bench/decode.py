"""Absorbed against expanded attention over a cache of latents, timed side by side in this process.

For lessons and tests, which ask one question: which way is faster for so many new tokens? The two run one right after the
other, so that the ratio of a pair compares two programs and not two moments. (`dsv3 bench` measures whole steps, each side
in a process of its own.)

    python -m dsv3_mini.bench.decode       the ratios that lesson 07 shows behind the reader's own, on one core
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.model.attention import MultiHeadLatentAttention

CONTEXT = 1024
NEW = (1, 8, 32, 128, 512, 1024)
HEADS = 8
RUNS = 15


@dataclass(frozen=True)
class Inputs:
    """What attention gets for `s` new tokens when `t` stand in the cache, these included."""

    query_nope: Float[Tensor, "1 s h n"]
    query_rope: Float[Tensor, "1 s h r"]
    latent: Float[Tensor, "1 t c"]
    key_rope: Float[Tensor, "1 t r"]
    mask: Bool[Tensor, "1 s t"]

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.query_nope, self.query_rope, self.latent, self.key_rope, self.mask


@dataclass(frozen=True)
class Seconds:
    """One run of each way."""

    expanded: float
    absorbed: float

    @property
    def ratio(self) -> float:
        """How many times faster absorbed was; below 1, expanded was faster."""
        return self.expanded / self.absorbed


def one_layer(cfg: ModelConfig, heads: int) -> MultiHeadLatentAttention:
    """An attention layer of cfg's widths with fewer heads, and little else, so that it fits everywhere.

    Both ways cost in proportion to the heads: which one wins does not depend on their number.
    """
    small = cfg.replace(num_attention_heads=heads, hidden_size=8, q_lora_rank=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MultiHeadLatentAttention(small).requires_grad_(False)


def random_inputs(layer: MultiHeadLatentAttention, new: int, context: int) -> Inputs:
    """Random numbers in the right shapes; the new tokens are the last ones."""
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=random)

    positions = torch.arange(context)
    return Inputs(
        numbers(new, layer.heads, layer.nope),
        numbers(new, layer.heads, layer.rope),
        numbers(context, layer.kv_a_layernorm.weight.shape[0]),
        numbers(context, layer.rope),
        (positions[context - new :, None] >= positions)[None],
    )


@torch.no_grad()
def side_by_side(layer: MultiHeadLatentAttention, inputs: Inputs) -> Seconds:
    """Run both ways once, one right after the other."""
    marks = [time.perf_counter()]
    for attend in (layer.expanded, layer.absorbed):
        attend(*inputs.all)
        marks.append(time.perf_counter())
    return Seconds(marks[1] - marks[0], marks[2] - marks[1])


@torch.no_grad()
def largest_difference(layer: MultiHeadLatentAttention, inputs: Inputs) -> float:
    """How far the two outputs are apart, as a share of the largest number in them."""
    expanded, absorbed = layer.expanded(*inputs.all), layer.absorbed(*inputs.all)
    return float((absorbed - expanded).abs().max() / expanded.abs().max())


def shortest_ratio(layer: MultiHeadLatentAttention, inputs: Inputs, runs: int = RUNS) -> float:
    """The shortest of `runs` runs of expanded over the shortest of absorbed: what else the machine does only lengthens."""
    side_by_side(layer, inputs)  # sets up what later runs find ready
    timed = [side_by_side(layer, inputs) for _ in range(runs)]
    return min(each.expanded for each in timed) / min(each.absorbed for each in timed)


def main() -> None:
    torch.set_num_threads(1)
    cfg = ModelConfig.preset("671b")
    layer = one_layer(cfg, HEADS)
    ratios = {new: shortest_ratio(layer, random_inputs(layer, new, CONTEXT)) for new in NEW}
    print({new: float(f"{ratio:.2g}") for new, ratio in ratios.items()})


if __name__ == "__main__":
    main()
