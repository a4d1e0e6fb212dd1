"""What is minimised: cross-entropy, the multi-token prediction loss, and the sequence-wise balance loss.

L = L_main + lambda * mean_j L_MTP_j + alpha * sum_layers L_Bal        (report equations 24, 25 and 17-20)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.data.packing import IGNORED
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.router import Routing
from dsv3_mini.model.transformer import HiddenStates


@dataclass(frozen=True)
class Losses:
    """`total` carries the gradient; `main` and `mtp` are in nats per token, `balance` without its alpha, all detached."""

    total: Float[Tensor, ""]
    main: Float[Tensor, ""]
    mtp: Float[Tensor, ""]
    balance: Float[Tensor, ""]
    routing: list[Routing]


def training_losses(
    model: DeepSeekV3,
    tokens: Int[Tensor, "b s"],
    targets: Int[Tensor, "b s"],
    mtp_weight: float,
    balance_weight: float,
    document_ids: Int[Tensor, "b s"] | None = None,
    batch_targets: Int[Tensor, "B s"] | None = None,
) -> Losses:
    """All losses of one micro-batch.

    Args:
        targets: the token that follows each of `tokens`, or `packing.IGNORED`.
        mtp_weight: the report's lambda. balance_weight: the report's alpha.
        batch_targets: of the whole batch, where these tokens are a part of it. Each loss is then this part of the
            batch's mean, and the parts add up to the same step however the batch is cut.
    """
    whole = targets if batch_targets is None else batch_targets
    # At weight 0 the MTP modules do not run: that saves their time, and their experts see no load.
    if mtp_weight:
        states = model.hidden_states(tokens, document_ids)
    else:
        main_states, main_routing = model.main_states(tokens, document_ids)
        states = HiddenStates(main_states, [], main_routing)
    head = model.lm_head.weight
    main = cross_entropy(states.main, head, targets, kept_targets(whole))
    zero = main.new_zeros(())
    # Depth j reads j tokens further, so its targets start j positions later.
    depths = [
        cross_entropy(hidden, head, targets[:, j:], kept_targets(whole[:, j:]))
        for j, hidden in enumerate(states.mtp, start=1)
    ]
    mtp = torch.stack(depths).mean() if depths else zero
    balance = sum((sequence_balance_loss(r.scores, r.chosen.shape[-1]) for r in states.routing), zero)
    balance = balance * (len(targets) / len(whole))
    total = main + mtp_weight * mtp + balance_weight * balance
    routing = [r.detach() for r in states.routing]
    return Losses(total, main.detach(), mtp.detach(), balance.detach(), routing)


def sequence_balance_loss(scores: Float[Tensor, "b s e"], k: int) -> Float[Tensor, ""]:
    """sum_i f_i P_i, averaged over the sequences: 1 where a sequence spreads evenly, e/k where it uses k experts alone.

    f_i is how often expert i is among the k best *unbiased* scores, relative to an even share; it carries no gradient.
    P_i is the mean over the sequence of the scores normalised over *all* experts (equations 18-20).
    """
    experts = scores.shape[-1]
    picked = torch.zeros_like(scores).scatter(-1, scores.topk(k, dim=-1).indices, 1.0)
    f = reduce(picked.detach(), "b s e -> b e", "mean") * experts / k
    p = reduce(scores / reduce(scores, "b s e -> b s 1", "sum"), "b s e -> b e", "mean")
    return (f * p).sum(dim=-1).mean()


def cross_entropy(
    hidden: Float[Tensor, "b s d"],
    head: Float[Tensor, "v d"],
    targets: Int[Tensor, "b s"],
    count: Int[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of `hidden @ head.T` against targets, without ever holding all logits.

    The logits of a batch are by far its largest tensor (b s v). Here they live for one chunk of tokens at a time, and
    their gradient is formed while they are there. `dsv3 bench loss` prints time and memory beside the plain way.

    Args:
        count: what the sum is divided by; the number of targets that are not ignored, by default.
    """
    rows, flat = rearrange(hidden, "b s d -> (b s) d"), rearrange(targets, "b s -> (b s)")
    return _ChunkedCrossEntropy.apply(rows, head, flat, kept_targets(targets) if count is None else count)


def kept_targets(targets: Int[Tensor, "b s"]) -> Int[Tensor, ""]:
    """How many targets are not ignored; at least 1, so that a mean over none is 0."""
    return (targets != IGNORED).sum().clamp(min=1)


CHUNK = 512
"""Tokens whose logits exist at one time: large enough for a good GEMM, small enough for a few MB."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward computes loss and gradients chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, count: Tensor) -> Tensor:
        kept = targets != IGNORED
        wants_grad = hidden.requires_grad or head.requires_grad
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if wants_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK):
            rows, target, keep = (x[start : start + CHUNK] for x in (hidden, targets, kept))
            safe, keep = rearrange(target.clamp(min=0), "T -> T 1"), rearrange(keep, "T -> T 1")
            # All in place, in the memory of the logits: exp(logit - largest), whose sum makes them shares.
            logits = (rows @ head.T).float()
            logits -= logits.amax(dim=-1, keepdim=True)
            right = logits.gather(-1, safe)
            weights = logits.exp_()
            norm = weights.sum(dim=-1, keepdim=True)
            total += ((norm.log() - right) * keep).sum()
            if wants_grad:
                # d loss / d logits = (share - one_hot) / count = (weights - norm one_hot) / (norm count) where kept. What
                # is a number per token is multiplied in where a token is d wide, not v.
                weights = weights.scatter_add_(-1, safe, -norm).to(head.dtype)
                scale = (keep / (norm * count)).to(head.dtype)
                grad_hidden[start : start + CHUNK] = (weights @ head) * scale
                grad_head += weights.T @ (rows * scale)
        if wants_grad:
            ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad, grad_head * grad, None, None


def token_losses(
    hidden: Float[Tensor, "b s d"], head: Float[Tensor, "v d"], targets: Int[Tensor, "b s"]
) -> Float[Tensor, "b s"]:
    """Cross-entropy of every position in nats (0 where ignored), for evaluation: row by row, without gradient."""
    with torch.no_grad():
        rows = [
            F.cross_entropy((h @ head.T).float(), t, ignore_index=IGNORED, reduction="none")
            for h, t in zip(hidden, targets, strict=True)
        ]
    return torch.stack(rows)


def total_load(routings: Sequence[Routing]) -> dict[int, Int[Tensor, " e"]]:
    """Layer -> how many choices fell on each expert."""
    return {routing.layer: routing.load for routing in routings}
