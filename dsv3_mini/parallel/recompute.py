"""Recomputing what is cheap: a block forgets its norms and MLA's up-projections, and makes them again in backward.

Training keeps of each layer what backward will read. In a DeepSeek-V3 layer a large part of that follows from a small part by
little arithmetic (report section 3.2.3):

    kept           the residual stream, the two latents, attention's output: narrow
    made again     both of the block's norms, the latents' norms, and all heads' queries, keys and values from the latents: wide

Matrix products other than the up-projections, and attention itself, are not done twice. Numbers do not change: what is made
again is made by the same operations from the same inputs.

Simplification: the model's final norm and those that join MTP's two inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dsv3_mini.model.attention import LayerCache
from dsv3_mini.model.block import Block
from dsv3_mini.model.router import Routing


class RecomputingBlock(Block):
    """A block in training; with a cache, which is decoding, or without gradients there is nothing to keep or forget."""

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        turn: Complex[Tensor, "*b s pairs"],
        mask: Bool[Tensor, "#b s t"] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Tensor, "b s d"], Routing | None]:
        if cache is not None or not torch.is_grad_enabled():
            return super().forward(x, turn, mask, cache)
        contexts = partial(create_selective_checkpoint_contexts, self.policy)
        # The maths has no random numbers whose state would have to be put back.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        x = x + again(self._attended, x, turn, mask)
        normed = checkpoint(self.post_attention_layernorm, x, use_reentrant=False, preserve_rng_state=False)
        made_again = MadeAgain(self.post_attention_layernorm, x, normed)
        with torch.autograd.graph.saved_tensors_hooks(made_again.pack, made_again.unpack):
            fed = self.mlp(normed)
        fed, routing = fed if isinstance(fed, tuple) else (fed, None)
        return x + fed, routing

    def _attended(self, x: Tensor, turn: Tensor, mask: Tensor | None) -> Tensor:
        return self.self_attn(self.input_layernorm(x), turn, mask)


class MadeAgain:
    """Where operations save `output` for backward, or a view of it, they save where in it they look; then it is made again.

    The same holds for a copy of it in another number format, which is what the gate reads where the model is BF16.
    A checkpoint around the feed-forward would not do: it holds the exchange of tokens, which is not to be repeated.
    """

    def __init__(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        self.module, self.x = module, x.detach()
        self.storage, self.maker = output.untyped_storage()._cdata, output.grad_fn
        self.output: Tensor | None = None  # once for all that ask; it is freed with the last of them

    def pack(self, saved: Tensor) -> Any:
        # As long as the feed-forward runs, `output` is alive and no other tensor has its memory.
        if saved.untyped_storage()._cdata != self.storage and not self._is_copy(saved):
            return saved
        return saved.dtype, saved.size(), saved.stride(), saved.storage_offset()

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self.output is None:
            with torch.no_grad():
                self.output = self.module(self.x)
        dtype, *place = packed
        return self.output.to(dtype).as_strided(*place)

    def _is_copy(self, saved: Tensor) -> bool:
        """Whether it is `output` in another format, or a view of that."""
        made_by = saved.grad_fn
        while made_by is not None and made_by.name() in ("ViewBackward0", "UnsafeViewBackward0"):
            made_by = made_by.next_functions[0][0]
        return (
            made_by is not None and made_by.name() == "ToCopyBackward0" and made_by.next_functions[0][0] is self.maker
        )


def recompute(model: nn.Module) -> None:
    """Make all blocks of a model recompute, in place: weights and their names stay as they are."""
    for block in [module for module in model.modules() if type(module) is Block]:
        block.__class__ = RecomputingBlock
        attention = block.self_attn
        query = attention.q_proj
        # The last product's result is read by nobody in backward: making it again ends before it is due.
        cheap = [attention.kv_b_proj, attention.o_proj]
        block.policy = _policy(cheap + ([query.q_b_proj] if isinstance(query, nn.Sequential) else []))


def _policy(cheap: list[nn.Module]) -> Callable[..., CheckpointPolicy]:
    """Keep what matrix products and attention give, but for the products of the modules `cheap`."""
    running: list[nn.Module] = []
    for module in cheap:
        module.register_forward_pre_hook(lambda module, _: running.append(module))
        module.register_forward_hook(
            lambda *_: running.clear()
        )  # a hook that returned something would change the output

    def choose(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        name = operation.name()
        kept = name in ("aten::mm", "aten::addmm") and not running or name.startswith("aten::_scaled_dot_product_")
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE

    return choose
