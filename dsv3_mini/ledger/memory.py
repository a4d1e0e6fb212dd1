"""Bytes: the cache of a token, the state of a training run, a checkpoint on disk."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger.parameters import Block, count_parameters

BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Cache:
    """Numbers that one token leaves in the cache over all layers, under four kinds of attention with the same heads.

    mla keeps the latent and the rope key, which all heads share; mha a key and a value for every head, gqa for each of
    `groups`, mqa for one.
    """

    mla: int
    mha: int
    gqa: int
    mqa: int
    groups: int
    dtype: str

    def bytes(self, kind: str) -> int:
        """Bytes per token; `kind` is "mla", "mha", "gqa" or "mqa"."""
        return BYTES[self.dtype] * {"mla": self.mla, "mha": self.mha, "gqa": self.gqa, "mqa": self.mqa}[kind]

    @property
    def saving(self) -> float:
        """How many times smaller MLA's cache is than MHA's."""
        return self.mha / self.mla


@dataclass(frozen=True)
class TrainingState:
    """Bytes that training keeps for the whole model, MTP included, activations not: spread them over the ranks yourself.

    `weights` are the copies that the matrix products read, with FP8 scales and gate biases where there are any.
    """

    parameters: int
    master: int
    gradients: int
    moments: int
    weights: int

    @property
    def total(self) -> int:
        return self.master + self.gradients + self.moments + self.weights

    @property
    def per_parameter(self) -> float:
        return self.total / self.parameters


def default_groups(cfg: ModelConfig) -> int:
    """GQA groups to compare with: the largest proper divisor of the heads up to 8, the usual choice."""
    heads = cfg.num_attention_heads
    return max((groups for groups in range(1, 9) if heads % groups == 0 and groups < heads), default=1)


def cache_per_token(cfg: ModelConfig, *, groups: int | None = None, dtype: str = "bf16") -> Cache:
    """What the main model caches for a token (report section 2.1.1).

    Args:
        groups: GQA's key-value heads; must divide num_attention_heads. None: `default_groups(cfg)`.
        dtype: "fp32", "bf16" or "fp8" (bare numbers, no scales).

    Raises:
        ConfigError: unknown dtype, or groups that do not divide the heads.
    """
    groups = default_groups(cfg) if groups is None else groups
    heads, layers = cfg.num_attention_heads, cfg.num_hidden_layers
    if not isinstance(groups, int) or groups < 1 or heads % groups:
        raise ConfigError(
            f"groups = {groups!r} must divide num_attention_heads ({heads}): each group serves as many heads"
        )
    _require_dtype("dtype", dtype, tuple(BYTES))
    pair = layers * (cfg.qk_head_dim + cfg.v_head_dim)
    latent = layers * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    return Cache(mla=latent, mha=heads * pair, gqa=groups * pair, mqa=pair, groups=groups, dtype=dtype)


def training_state(cfg: ModelConfig, *, weights: str = "bf16", moments: str = "bf16") -> TrainingState:
    """Bytes of master weights, gradients, Adam's moments and working weights (report section 3.3.2).

    Master weights and gradients are FP32.

    Args:
        weights: "bf16"; "fp8": attention, FFN and expert matrices in E4M3 with a FP32 scale for each 128 x 128 block,
            everything else in BF16; or "fp32": the master weights are the working weights.
        moments: "bf16" (the report's choice) or "fp32".

    Raises:
        ConfigError: unknown dtype.
    """
    _require_dtype("weights", weights, tuple(BYTES))
    _require_dtype("moments", moments, ("fp32", "bf16"))
    parameters = count_parameters(cfg)
    trainable = parameters.live_trainable
    biases = BYTES["fp32"] * (parameters.live - trainable)
    working = _stored_bytes(parameters.live_blocks, weights)
    return TrainingState(
        parameters=trainable,
        master=BYTES["fp32"] * trainable,
        gradients=BYTES["fp32"] * trainable,
        moments=2 * BYTES[moments] * trainable,
        weights=biases if weights == "fp32" else working,
    )


def checkpoint_bytes(cfg: ModelConfig, *, weights: str = "fp8") -> int:
    """Bytes of the tensors of a released checkpoint: MTP modules with their copies of embedding and head.

    Raises:
        ConfigError: unknown dtype.
    """
    _require_dtype("weights", weights, tuple(BYTES))
    return _stored_bytes(count_parameters(cfg).shipped_blocks, weights)


def _stored_bytes(blocks: tuple[tuple[Block, int], ...], weights: str) -> int:
    total = 0
    for block, times in blocks:
        for tensor in block.tensors:
            if tensor.kind == "bias":  # FP32 whatever the rest is
                size = BYTES["fp32"] * tensor.total
            elif weights == "fp8" and tensor.kind == "linear":
                size = BYTES["fp8"] * tensor.total + BYTES["fp32"] * tensor.fp8_scales
            else:
                size = (BYTES["fp32"] if weights == "fp32" else BYTES["bf16"]) * tensor.total
            total += times * size
    return total


def _require_dtype(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} = {value!r} is not known here: use one of {', '.join(allowed)}")
