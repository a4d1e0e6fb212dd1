"""One decode step, part by part: FLOPs, bytes, and the time that a machine needs for the larger of the two.

Each of `batch` rows reads `new` tokens (1 in plain decoding, 2 with one speculated token) and ends with `context` tokens
in its cache, the new ones included. Attention over the cache can be done in three ways:

    absorbed      the latents are cached; W_UK is folded into the query and W_UV into the output (one fold for each query)
    rebuilt       the latents are cached; keys and values of all heads are built from them again at every step
    heads cached  keys and values of all heads are cached, as in multi-head attention

The roofline: a part takes as long as the machine needs for its products or for its bytes, whichever is longer. Where we
simplify:

- every number takes two bytes (BF16), weights as well; the released weights are FP8, half of that
- activations are not counted, but for the keys and values that `rebuilt` writes to memory and reads again
- all scores are computed, as a masked one costs as much as any other; softmax, norms, RoPE and routing are free
- a token's experts are drawn evenly and independently, which is what balancing aims at
- one machine holds everything: on many, both peaks grow alike, and what they say to each other comes on top
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger.cost import H800_PEAK
from dsv3_mini.ledger.parameters import count_parameters

WAYS = ("absorbed", "rebuilt", "heads cached")
ELEMENT = 2  # bytes of a number in BF16


@dataclass(frozen=True)
class Machine:
    """A roof: FLOP/s at most, and bytes/s between memory and processor at most."""

    name: str
    flops_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on the products are what takes the time."""
        return self.flops_per_second / self.bytes_per_second

    def reached(self, intensity: float) -> float:
        """FLOP/s under the roof for work of so many FLOPs per byte."""
        return min(self.flops_per_second, intensity * self.bytes_per_second)


# Dense BF16 as in the ledger; the memory is that of an H100 (SXM), 3.35 TB/s by its data sheet.
H800 = Machine("H800", H800_PEAK, 3.35e12)


@dataclass(frozen=True)
class Work:
    """A part of a step: its FLOPs, and the bytes that it moves between memory and processor."""

    name: str
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def seconds(self, machine: Machine) -> float:
        return max(self.flops / machine.flops_per_second, self.bytes / machine.bytes_per_second)

    def limit(self, machine: Machine) -> str:
        """What takes the time: "compute" or "memory"."""
        return "compute" if self.intensity >= machine.ridge else "memory"


@dataclass(frozen=True)
class AttentionFlops:
    """FLOPs of one layer and one row, from the new queries and latents to the heads' outputs, in the three ways."""

    absorbed: int
    rebuilt: int
    heads_cached: int

    def by_way(self, way: str) -> int:
        return dict(zip(WAYS, (self.absorbed, self.rebuilt, self.heads_cached), strict=True))[way]


def attention_flops(cfg: ModelConfig, new: int, context: int) -> AttentionFlops:
    """What attention costs for `new` queries over `context` keys, W_UK and W_UV included.

    Raises:
        ConfigError: `new` or `context` is not a whole number above 0, or more tokens are new than there are.
    """
    _require(1, new, context)
    up = _up_projection(cfg)
    on_heads = cfg.qk_head_dim + cfg.v_head_dim
    on_latents = 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    pairs = new * context
    ways = (new * up + pairs * on_latents, context * up + pairs * on_heads, new * up + pairs * on_heads)
    return AttentionFlops(*(2 * cfg.num_attention_heads * each for each in ways))


def crossing(cfg: ModelConfig, context: int) -> float:
    """How many new tokens make `absorbed` and `rebuilt` equal in FLOPs; with fewer, absorbed is cheaper.

    Both cost the same where context * A = new * (A + context * B), with A = c (n + v), the multiplications that build one
    token's key and value in one head, and B = 2c - n - v, how much wider a pair of query and key is on the latents.
    Infinite where the latent is so narrow that B is not positive: absorbed is then never dearer.
    """
    _require(1, 1, context)
    wider = 2 * cfg.kv_lora_rank - cfg.qk_nope_head_dim - cfg.v_head_dim
    if wider <= 0:
        return math.inf
    return context * _up_projection(cfg) / (_up_projection(cfg) + context * wider)


def decode_step(cfg: ModelConfig, batch: int, context: int, new: int = 1, way: str = "absorbed") -> tuple[Work, ...]:
    """The main model's parts in one step: attention over the cache, and the weights that the step reads.

    The products of a new token with kv_b (its up-projection, or the folds: as many) stand with attention's weights.

    Raises:
        ConfigError: a count is not a whole number above 0, more tokens are new than there are, or the way is not known.
    """
    _require(batch, new, context)
    if way not in WAYS:
        raise ConfigError(f"way = {way!r} is not known here: use one of {', '.join(WAYS)}")
    parameters = count_parameters(cfg)
    layers, tokens = cfg.num_hidden_layers, batch * new
    core = attention_flops(cfg, new, context).by_way(way) - 2 * cfg.num_attention_heads * new * _up_projection(cfg)
    attention = layers * parameters.attention.multiplied
    routed = parameters.moe_layers * parameters.expert.multiplied
    other = parameters.multiplied - attention - cfg.num_experts_per_tok * routed
    parts = [
        Work("attention over the cache", layers * batch * core, layers * batch * context * _cache_traffic(cfg, way)),
        Work("attention's weights", 2 * attention * tokens, ELEMENT * attention),
    ]
    if routed:
        visited = distinct_experts(cfg, tokens)
        parts.append(Work("routed experts", 2 * cfg.num_experts_per_tok * routed * tokens, ELEMENT * routed * visited))
    return (*parts, Work("other weights", 2 * other * tokens, ELEMENT * other))


def distinct_experts(cfg: ModelConfig, tokens: int) -> float:
    """How many of a layer's experts `tokens` tokens visit together, on average, when each draws its own evenly."""
    share = cfg.num_experts_per_tok / cfg.n_routed_experts
    return cfg.n_routed_experts * (1 - (1 - share) ** tokens)


def _up_projection(cfg: ModelConfig) -> int:
    """Multiplications from one latent to one head's key and value, as many as the folds of one query."""
    return cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)


def _cache_traffic(cfg: ModelConfig, way: str) -> int:
    """Bytes that a step moves for each token of a row's context, in one layer."""
    latent = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    heads = cfg.num_attention_heads
    if way == "absorbed":
        return ELEMENT * latent
    if way == "rebuilt":  # keys and values without the shared rope key: written, and read again
        return ELEMENT * (latent + 2 * heads * (cfg.qk_nope_head_dim + cfg.v_head_dim))
    return ELEMENT * heads * (cfg.qk_head_dim + cfg.v_head_dim)


def _require(batch: int, new: int, context: int) -> None:
    for name, value in (("batch", batch), ("new", new), ("context", context)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} = {value!r} must be a whole number of at least 1")
    if new > context:
        raise ConfigError(f"new = {new} must be at most the context ({context}), which holds the new tokens too")
