"""Floating-point operations per token. A multiplication with its addition counts as two.

Training, the way the field quotes it (and the way 250.46 GFLOP per token of the 671B model comes about):

    linear     2 N forward, where N are the activated parameters without the input embedding (a lookup multiplies
               nothing; the output head does). Norm weights stay in N: that is the usual 6N, and they are 0.003% of it
    attention  2 (qk_head_dim + v_head_dim) heads layers x context / 2 forward: the scores and the weighted values,
               each a product over the tokens before, on average half of the context
    backward   twice the forward: one product for the inputs' gradients, one for the weights' (or the second operand's)

so a trained token costs 6 N + 3 x attention. Recomputation is not counted (it is work, but not the model's). Softmax,
RoPE, activations and the optimizer are not counted either.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger.parameters import count_parameters


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token: `linear` and `attention` are those of the forward pass."""

    context: int
    linear: int
    attention: int

    @property
    def forward(self) -> int:
        return self.linear + self.attention

    @property
    def backward(self) -> int:
        return 2 * self.forward

    @property
    def train(self) -> int:
        """Forward and backward: 6N + 3 x attention."""
        return 3 * self.forward

    @property
    def train_linear(self) -> int:
        return 3 * self.linear

    @property
    def train_attention(self) -> int:
        return 3 * self.attention


@dataclass(frozen=True)
class DecodeFlops:
    """FLOPs of one new token that attends to `context` tokens, itself included: 2N + attention, in three ways.

    absorbed    W_UK folded into the query and W_UV into the output; attention runs on the cached latent. The folds cost
                what up-projecting the new token costs, so `linear` is the same in all three
    expanded    keys and values of all heads are cached, as in MHA: fewest FLOPs, the largest cache
    re_expanded the latent is cached and up-projected again for every earlier token, at every step
    """

    context: int
    linear: int
    absorbed_attention: int
    expanded_attention: int
    re_expanded_attention: int

    @property
    def absorbed(self) -> int:
        return self.linear + self.absorbed_attention

    @property
    def expanded(self) -> int:
        return self.linear + self.expanded_attention

    @property
    def re_expanded(self) -> int:
        return self.linear + self.re_expanded_attention


def flops_per_token(cfg: ModelConfig, context: int = 4096) -> Flops:
    """The main model's FLOPs for each token of a sequence of `context` tokens, causal attention counted as half.

    Raises:
        ConfigError: `context` is not a whole number above 0.
    """
    _require_context(context)
    attention = cfg.num_hidden_layers * _attended(cfg) * context // 2
    return Flops(context, 2 * count_parameters(cfg).activated_without_embedding, attention)


def mtp_flops_per_token(cfg: ModelConfig, context: int = 4096) -> Flops:
    """What the MTP modules add to a trained token, their passes through the shared head included."""
    _require_context(context)
    attention = cfg.num_nextn_predict_layers * _attended(cfg) * context // 2
    return Flops(context, 2 * count_parameters(cfg).activated_mtp, attention)


def matmul_flops_per_token(cfg: ModelConfig, sequence: int) -> Flops:
    """The main model's matrix products as a plain implementation runs them: no norms, and every score computed.

    The products that a counter in the framework sees, for measuring a machine. Masked scores are computed and thrown
    away, so attention costs twice what `flops_per_token` counts.
    """
    _require_context(sequence)
    attention = cfg.num_hidden_layers * _attended(cfg) * sequence
    return Flops(sequence, 2 * count_parameters(cfg).multiplied, attention)


def decode_flops_per_token(cfg: ModelConfig, context: int = 4096) -> DecodeFlops:
    """FLOPs of decoding one token with `context` tokens in the cache, the new one included."""
    _require_context(context)
    parameters = count_parameters(cfg)
    layers, heads = cfg.num_hidden_layers, cfg.num_attention_heads
    # Scores on latent + rope key, values on the latent.
    on_latent = 2 * heads * (2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    expanded = layers * _attended(cfg) * context
    up_projection = layers * 2 * parameters.attention["kv_b"] * (context - 1)  # the new token's is in `linear`
    return DecodeFlops(
        context=context,
        linear=2 * parameters.activated_without_embedding,
        absorbed_attention=layers * on_latent * context,
        expanded_attention=expanded,
        re_expanded_attention=expanded + up_projection,
    )


def _attended(cfg: ModelConfig) -> int:
    """Forward FLOPs of one layer for each pair of a query and a key, all heads."""
    return 2 * cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim)


def _require_context(context: int) -> None:
    if not isinstance(context, int) or isinstance(context, bool) or context < 1:
        raise ConfigError(f"context = {context!r} must be a whole number of tokens, at least 1")
