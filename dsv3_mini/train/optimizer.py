"""AdamW on FP32 master weights, and the moving average of the weights (report sections 3.2.3, 3.3.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dsv3_mini.errors import CheckpointError


class MasterAdamW:
    """AdamW whose weights are FP32, whatever the model computes in.

    A BF16 weight has 8 bits: an update of a thousandth of it rounds away. So the optimizer keeps an FP32 copy of every
    BF16 parameter, steps on that, and rounds into the model. FP32 parameters are their own masters. Matrices decay
    towards zero, norms do not.
    """

    def __init__(self, model: nn.Module, betas: tuple[float, float], weight_decay: float, ema_decay: float) -> None:
        self.parameters = dict(model.named_parameters())
        self.masters = {n: p if p.dtype == torch.float32 else p.detach().float() for n, p in self.parameters.items()}
        matrices = [m for m in self.masters.values() if m.ndim > 1]
        others = [m for m in self.masters.values() if m.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        self.ema_decay = ema_decay
        self.ema = {n: m.detach().clone() for n, m in self.masters.items()} if ema_decay else {}

    def step(self, learning_rate: float, clip_norm: float) -> Tensor:
        """Clip, update, round into the model, forget the gradients; returns the gradient norm before clipping."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        norm = nn.utils.clip_grad_norm_(list(self.masters.values()), clip_norm)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            if self.ema:
                averages, masters = list(self.ema.values()), [m.detach() for m in self.masters.values()]
                torch._foreach_lerp_(averages, masters, 1 - self.ema_decay)
            self._round_into_model()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """All state by name: master.*, ema.*, and AdamW's exp_avg.*, exp_avg_sq.*, step.*."""
        kept = {f"master.{n}": m.detach() for n, m in self.masters.items()}
        kept |= {f"ema.{n}": m for n, m in self.ema.items()}
        for name, master in self.masters.items():
            kept |= {f"{key}.{name}": value for key, value in self.adamw.state.get(master, {}).items()}
        return kept

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave. CheckpointError names the first tensor that is missing or of another shape."""
        for prefix, own in (("master", self.masters), ("ema", self.ema)):
            for name, tensor in own.items():
                key = f"{prefix}.{name}"
                if key not in tensors or tensors[key].shape != tensor.shape:
                    found = "is missing" if key not in tensors else f"has shape {tuple(tensors[key].shape)}"
                    raise CheckpointError(
                        f"checkpoint: {key} {found}, expected {tuple(tensor.shape)}: resume with its config"
                    )
                tensor.copy_(tensors[key])
        for name, master in self.masters.items():
            state = {
                key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step") if f"{key}.{name}" in tensors
            }
            if state:
                self.adamw.state[master] = {key: value.clone() for key, value in state.items()}
        self._round_into_model()

    @torch.no_grad()
    def _round_into_model(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
