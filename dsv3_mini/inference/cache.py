"""The latent cache: what a decoder keeps of each token, kv_lora_rank + qk_rope_head_dim numbers a layer.

Rows of a batch need not be equally long. Token i of a row lies in slot i of that row, whatever the others hold, so a slot
is a position: a query at position p may see the slots 0 to p of its own row, and needs no other mask. What lies beyond a
row's length (padding, drafts that were refuted, zeros) is seen by nobody, and the next tokens are written over it.
Forgetting the last tokens is therefore a change of one number.

    row 0   a b c d e f . .      lengths[0] = 6
    row 1   a b c x x . . .      lengths[1] = 3: two tokens were cut off; the next one goes to slot 3
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError


class LatentCache:
    """One layer's cache, for `batch` rows of up to `capacity` tokens; a row that needs more doubles the memory."""

    def __init__(self, cfg: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        # Zeros and not `empty`: a hidden slot weighs 0 in attention, and 0 times a NaN that lay there would be a NaN.
        # Latent and rope key of a token lie side by side: absorbed attention then meets both in one product.
        self.widths = [cfg.kv_lora_rank, cfg.qk_rope_head_dim]
        self.kept = torch.zeros(batch, capacity, sum(self.widths), dtype=dtype, device=device)
        self.lengths = [0] * batch

    @classmethod
    def for_model(
        cls, cfg: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> list[LatentCache]:
        """One for each main layer."""
        return [cls(cfg, batch, capacity, dtype, device) for _ in range(cfg.num_hidden_layers)]

    def extend(
        self, latent: Float[Tensor, "b s c"], key_rope: Float[Tensor, "b s r"]
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t r"]]:
        """Keep each row's new tokens behind those that it has; returns all slots up to the end of the longest row."""
        return self.append(torch.cat([latent, key_rope], dim=-1)).split(self.widths, dim=-1)

    def append(self, new: Float[Tensor, "b s cr"]) -> Float[Tensor, "b t cr"]:
        """`extend`, of latents and rope keys side by side."""
        count, end = new.shape[1], self.length + new.shape[1]
        if end > self.capacity:
            self.kept = F.pad(self.kept, (0, 0, 0, max(end, 2 * self.capacity) - self.capacity))
        if self.even:
            self.kept[:, self.length : end] = new
        else:
            rows = torch.arange(len(self.lengths), device=new.device)
            self.kept[rows[:, None], self.positions(count)] = new
        self.lengths = [length + count for length in self.lengths]
        return self.kept[:, :end]

    def positions(self, new: int) -> Int[Tensor, "#b new"]:
        """Where each row's next `new` tokens stand; one row for all where all are equally long."""
        if self.even:
            return torch.arange(self.length, self.length + new, device=self.kept.device)[None]
        starts = torch.tensor(self.lengths, device=self.kept.device)
        return rearrange(starts, "b -> b 1") + torch.arange(new, device=self.kept.device)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what each row holds beyond `lengths[row]` tokens.

        Raises:
            ConfigError: a row is shorter than that, or there are not as many rows.
        """
        if len(lengths) != len(self.lengths):
            raise ConfigError(f"{len(lengths)} lengths for {len(self.lengths)} rows: give one for each row")
        for row, (length, held) in enumerate(zip(lengths, self.lengths, strict=True)):
            if not 0 <= length <= held:
                raise ConfigError(f"row {row} holds {held} tokens and cannot be cut to {length}")
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> LatentCache:
        """A new cache with these rows, in memory of its own. [0, 0, 0] forks row 0: three texts go on from one prefix."""
        chosen = copy.copy(self)
        chosen.kept = self.kept[list(rows)]
        chosen.lengths = [self.lengths[row] for row in rows]
        return chosen

    @property
    def latent(self) -> Float[Tensor, "b capacity c"]:
        return self.kept[..., : self.widths[0]]

    @property
    def key_rope(self) -> Float[Tensor, "b capacity r"]:
        return self.kept[..., self.widths[0] :]

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return max(self.lengths, default=0)

    @property
    def even(self) -> bool:
        """Whether all rows are equally long."""
        return self.lengths.count(self.length) == len(self.lengths)

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold before more memory is taken."""
        return self.kept.shape[1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in this layer."""
        return self.kept.shape[-1] * self.kept.element_size()
