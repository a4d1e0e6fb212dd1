"""What stands in for the package `deep_ep` in tests: its documented calls, over gloo, with every argument checked.

Written from the documentation of DeepEP's `Buffer` alone: what each argument's type and shape must be, and what comes back.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer:
    made = 0
    calls: Counter[str] = Counter()

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        assert num_nvl_bytes > 0 and num_rdma_bytes == 0
        self.group, self.experts, Buffer.made = group, 0, Buffer.made + 1

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config()

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64 and topk_idx.dim() == 2 and topk_idx.is_contiguous()
        self.experts = num_experts
        ranks = self.group.size()
        owner = topk_idx // (num_experts // ranks)
        in_rank = (owner[:, :, None] == torch.arange(ranks)).any(dim=1)
        per_expert = topk_idx.flatten().bincount(minlength=num_experts).int()
        return in_rank.sum(dim=0).int(), None, per_expert, in_rank, None

    def dispatch(
        self, x: Any, handle: Any = None, num_tokens_per_rank: Any = None, num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None, num_tokens_per_expert: Any = None, topk_idx: Any = None, topk_weights: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        numbers, scales = x
        tokens, width = numbers.shape
        assert numbers.dtype == torch.float8_e4m3fn and width % 128 == 0 and numbers.is_contiguous()
        assert scales.dtype == torch.float32 and scales.shape == (tokens, width // 128)
        Buffer.calls["dispatch, known" if handle else "dispatch"] += 1
        if handle is None:
            assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
            assert is_token_in_rank.dtype == torch.bool and is_token_in_rank.shape == (tokens, self.group.size())
            assert topk_idx.shape == topk_weights.shape and topk_weights.dtype == torch.float32
            leaving = num_tokens_per_rank.long()
            arriving = torch.empty_like(leaving)
            dist.all_to_all_single(arriving, leaving, group=self.group)
            sender_row = is_token_in_rank.T.nonzero()[:, 1]
            handle = (tokens, sender_row, leaving.tolist(), arriving.tolist())
        else:
            assert topk_idx is None and topk_weights is None and num_tokens_per_rank is None
        got = self._there(numbers.view(torch.uint8), handle).view(torch.float8_e4m3fn), self._there(scales, handle)
        if topk_idx is None:
            return got, None, None, None, None, None
        idx, weights = self._there(topk_idx, handle), self._there(topk_weights, handle)
        here = self.experts // self.group.size()
        local = idx - self.group.rank() * here
        elsewhere = (local < 0) | (local >= here)
        return got, local.masked_fill(elsewhere, -1), weights.masked_fill(elsewhere, 0.0), [], handle, None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and len(x) == sum(handle[3])
        Buffer.calls["combine" if topk_weights is None else "combine, weights"] += 1
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and len(topk_weights) == len(x) and topk_weights.is_contiguous()
            topk_weights = self._home(topk_weights, handle)
        return self._home(x, handle).bfloat16(), topk_weights, None

    def _there(self, rows: Tensor, handle: Any) -> Tensor:
        _, sender_row, leaving, arriving = handle
        return self._exchange(rows.index_select(0, sender_row), leaving, arriving)

    def _home(self, rows: Tensor, handle: Any) -> Tensor:
        tokens, sender_row, leaving, arriving = handle
        back = self._exchange(rows, arriving, leaving).float()
        return torch.zeros(tokens, rows.shape[1]).index_add_(0, sender_row, back)

    def _exchange(self, rows: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        received = rows.new_empty(sum(arriving), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), arriving, leaving, self.group)
        return received
