"""AdamW on FP32 master weights, and the moving average of the weights (report sections 3.2.3, 3.3.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dsv3_mini.train.checkpoint import Checkpoint
from dsv3_mini.train.ema import MovingAverage


class MasterAdamW:
    """AdamW whose weights are FP32, whatever the model computes in.

    A BF16 weight has 8 bits: an update of a thousandth of it rounds away. So the optimizer keeps an FP32 copy of every
    BF16 parameter, steps on that, and rounds into the model. FP32 parameters are their own masters. Matrices decay
    towards zero, norms do not.

    Of a weight that processes share (`parallel/sharding.py`) the master is this process's piece, as a plain tensor: AdamW
    takes each number on its own, and torch's fused step does not mix pieces that lie on different meshes.
    """

    def __init__(
        self,
        model: nn.Module,
        betas: tuple[float, float],
        weight_decay: float,
        ema_decay: float,
        start: Mapping[str, Tensor] | None = None,
        moments: torch.dtype = torch.float32,
    ) -> None:
        """`start`: the FP32 weights that the model was rounded from; without it, masters start at the rounded ones.

        `moments`: what Adam's two moments are kept in between steps; BF16 in an FP8 run (report section 3.3.3).
        """
        self.parameters = dict(model.named_parameters())
        start = start or self.parameters
        self.masters = {
            n: own_piece(p) if p.dtype == torch.float32 else start[n].detach().float()
            for n, p in self.parameters.items()
        }
        matrices = [m for m in self.masters.values() if m.ndim > 1]
        others = [m for m in self.masters.values() if m.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        self.moments = moments
        self.ema = MovingAverage(self.masters if ema_decay else {}, ema_decay)

    def collect_gradients(self) -> None:
        """Add the model's gradients to the masters', in FP32: many micro-batches added up in BF16 would lose their tails."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                gradient = own_piece(parameter.grad).float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def gradients(self, resting: str | None = None) -> dict[str, Tensor]:
        """The masters' gradients, in one order in every process; zeros for a weight that no token of the batch used.

        Args:
            resting: weights whose names begin so are not trained in this step, by any process. They get no gradient, as
                zeros would still let AdamW decay them.
        """
        trained = {n: m for n, m in self.masters.items() if resting is None or not n.startswith(resting)}
        for master in trained.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return {name: master.grad for name, master in trained.items()}

    def clip_gradients(self, clip_norm: float) -> Tensor:
        """Scale the masters' gradients down to a norm of at most `clip_norm`; returns the norm before.

        A norm that is not finite leaves the gradients as they are, so that the guilty one can still be told.
        """
        self.collect_gradients()
        masters = list(self.masters.values())
        norm = nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
        # Where nothing is too long torch would multiply by 1: a pass over all gradients.
        if clip_norm < norm < torch.inf:
            nn.utils.clip_grads_with_norm_(masters, clip_norm, norm)
        return norm

    def step(self, learning_rate: float) -> None:
        """Update the masters, their moving average and the model, and forget the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self._hold_moments(torch.float32)
        self.ema.before_step()
        self.adamw.step()
        self._hold_moments(self.moments)
        self.adamw.zero_grad(set_to_none=True)
        self.ema.update()
        self._round_into_model()

    def tensors(self) -> dict[str, Tensor]:
        """All state by name: master.*, ema.*, and AdamW's exp_avg.*, exp_avg_sq.*, step.*."""
        kept = {f"master.{n}": m.detach() for n, m in self.masters.items()}
        kept |= {f"ema.{n}": m for n, m in self.ema.items()}
        for name, master in self.masters.items():
            kept |= {f"{key}.{name}": value for key, value in self.adamw.state.get(master, {}).items()}
        return kept

    @torch.no_grad()
    def load_tensors(self, checkpoint: Checkpoint) -> None:
        """Take back what `tensors` gave. CheckpointError names the first tensor that is missing or of another shape."""
        for prefix, own in (("master", self.masters), ("ema", self.ema)):
            for name, tensor in own.items():
                tensor.copy_(checkpoint.tensor(f"{prefix}.{name}", tensor.shape))
        for name, master in self.masters.items():
            shapes = {"exp_avg": master.shape, "exp_avg_sq": master.shape, "step": torch.Size()}
            if any(f"{key}.{name}" in checkpoint.tensors for key in shapes):  # none before the first step
                self.adamw.state[master] = {
                    key: checkpoint.tensor(f"{key}.{name}", shape).to(master.device, copy=True)
                    for key, shape in shapes.items()
                }
        self._round_into_model()

    @torch.no_grad()
    def _round_into_model(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                parameter.copy_(self.masters[name])

    def _hold_moments(self, dtype: torch.dtype) -> None:
        """AdamW computes in FP32; of moments kept in BF16 that makes a copy for the time of a step."""
        for state in self.adamw.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(dtype)


def own_piece(weight: Tensor) -> Tensor:
    """Of a weight or gradient that processes share: this process's piece, in the same memory. Else the tensor itself."""
    return weight.detach().to_local() if hasattr(weight, "to_local") else weight
