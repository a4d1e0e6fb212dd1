"""The latent cache: what a decoder keeps of each token, kv_lora_rank + qk_rope_head_dim numbers a layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.config import ModelConfig


class LatentCache:
    """One layer's cache, for `batch` rows of up to `capacity` tokens, allocated once."""

    def __init__(self, cfg: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.latent = torch.empty(batch, capacity, cfg.kv_lora_rank, dtype=dtype, device=device)
        self.key_rope = torch.empty(batch, capacity, cfg.qk_rope_head_dim, dtype=dtype, device=device)
        self.length = 0

    @classmethod
    def for_model(
        cls, cfg: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> list[LatentCache]:
        """One for each main layer."""
        return [cls(cfg, batch, capacity, dtype, device) for _ in range(cfg.num_hidden_layers)]

    def extend(
        self, latent: Float[Tensor, "b s c"], key_rope: Float[Tensor, "b s r"]
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t r"]]:
        """Keep new tokens; returns those of all tokens so far."""
        end = self.length + latent.shape[1]
        self.latent[:, self.length : end] = latent
        self.key_rope[:, self.length : end] = key_rope
        self.length = end
        return self.latent[:, :end], self.key_rope[:, :end]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in this layer."""
        return (self.latent.shape[-1] + self.key_rope.shape[-1]) * self.latent.element_size()
