"""A model that multiplies with its weights as the released checkpoint stores them: one byte each.

    model = load_fp8(folder)          as from_pretrained, but q and weight_scale_inv stay what they are
    generate(model, tokens)

Every linear quantises what it reads, one scale per 1x128 tile, and hands it to an FP8 GEMM beside the stored numbers. On a
tensor core nothing is dequantised but sums; the `exact` backend dequantises one matrix at a time (of experts, one expert's),
multiplies and drops it. The one exception is kv_b_proj in absorbed decoding, which is no product of x with a weight: as in the
released inference code it is dequantised when it is read.

Gate and up projections stay two matrices, as they are stored: the blocks of 128 rows of each begin with its own first row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dsv3_mini.errors import CheckpointError
from dsv3_mini.fp8.formats import E4M3
from dsv3_mini.fp8.gemm import Backend, gemm, grouped_gemm
from dsv3_mini.fp8.quantize import Quantized, quantize
from dsv3_mini.hub.fp8_blocks import BLOCK, Fp8Weight
from dsv3_mini.hub.load import check_copies, open_checkpoint
from dsv3_mini.hub.names import released_name
from dsv3_mini.hub.reader import TensorFolder, as_dtype
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.experts import Dispatched, GroupedExperts, gated
from dsv3_mini.model.feed_forward import SwiGLU, swiglu


def load_fp8(
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    backend: str | Backend = "auto",
    mtp: bool = True,
) -> DeepSeekV3:
    """The model of a folder in the released FP8 layout, for inference: its FP8 weights are never held as anything else.

    Args:
        folder: as `save_pretrained(model, folder, dtype=torch.float8_e4m3fn)` writes it, and as it is released.
        dtype: of activations, and of what is not stored in FP8 (embedding, head, norms, router).
        device: where all of it lives.
        backend: who multiplies; a name that `fp8.gemm` knows.
        mtp: False leaves the MTP modules out.

    Raises:
        CheckpointError: as `from_pretrained`, or a linear is not stored in FP8.
    """
    tensors, model = open_checkpoint(folder, dtype, mtp=mtp)

    def read(stem: str, leaf: str) -> Fp8Weight:
        return _read(tensors, f"{stem}.{leaf}.weight")

    for name, module in list(model.named_modules()):
        stem = released_name(name, model.cfg)
        if isinstance(module, GroupedExperts):
            numbers = range(len(module.down_proj))
            leaves = [[read(f"{stem}.{e}", leaf) for e in numbers] for leaf in ("gate_proj", "up_proj", "down_proj")]
            model.set_submodule(name, StoredExperts(*(StoredWeight(_stack(each), dtype) for each in leaves), backend))
        elif isinstance(module, SwiGLU):
            leaves = [_whole(read(stem, leaf)) for leaf in ("gate_proj", "up_proj", "down_proj")]
            model.set_submodule(name, StoredSwiGLU(*(StoredLinear(each, dtype, backend) for each in leaves)))
        elif isinstance(module, nn.Linear) and ".self_attn." in name:  # SwiGLU's linears are done
            model.set_submodule(name, StoredLinear(_whole(_read(tensors, f"{stem}.weight")), dtype, backend))
    model.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            released = released_name(name, model.cfg)
            if released in tensors:
                tensor.copy_(as_dtype(tensors[released], tensor.dtype))
    check_copies(tensors, model)
    return model.requires_grad_(False).eval()


class StoredWeight(nn.Module):
    """A weight [o i], or a stack of them [e o i], as numbers in E4M3 and scales of their blocks; no parameters.

    Moving the module to another device moves them; no change of dtype touches them.
    """

    def __init__(self, weight: Quantized, dtype: torch.dtype) -> None:
        super().__init__()
        self.columns, self.dtype = weight.columns, dtype
        self.register_buffer("q", weight.q)
        self.register_buffer("scale", weight.scale)

    @property
    def quantized(self) -> Quantized:
        return Quantized(self.q, self.scale, (BLOCK, BLOCK), E4M3, self.columns)

    @property
    def weight(self) -> Float[Tensor, "... o i"]:
        """Dequantised, anew each time that it is asked for."""
        return self.quantized.dequantize(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredWeight:
        stored = {"q": self.q, "scale": self.scale}
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self


class StoredLinear(StoredWeight):
    """y = x W^T."""

    def __init__(self, weight: Quantized, dtype: torch.dtype, backend: str | Backend) -> None:
        super().__init__(weight, dtype)
        self.backend = backend

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        rows = quantize(rearrange(x, "... i -> (...) i"))
        y = gemm(rows, self.quantized, self.backend, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


class StoredSwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, gate_proj: StoredLinear, up_proj: StoredLinear, down_proj: StoredLinear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.down_proj(swiglu(torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1)))


class StoredExperts(GroupedExperts):
    """All routed experts of a layer: three stacks of stored weights."""

    def __init__(
        self, gate_proj: StoredWeight, up_proj: StoredWeight, down_proj: StoredWeight, backend: str | Backend
    ) -> None:
        nn.Module.__init__(self)  # GroupedExperts' own would make parameters
        self.gate_proj, self.up_proj, self.down_proj, self.backend = gate_proj, up_proj, down_proj, backend

    def compute(self, sent: Dispatched, weight: Float[Tensor, " Tk"]) -> Float[Tensor, "Tk d"]:
        ends, dtype = sent.load.cumsum(0).to(torch.int32), sent.rows.dtype
        rows = quantize(sent.rows, power_of_two=True)
        halves = [
            grouped_gemm(rows, half.quantized, ends, self.backend, dtype) for half in (self.gate_proj, self.up_proj)
        ]
        hidden = quantize(gated(torch.cat(halves, dim=-1), weight))
        return grouped_gemm(hidden, self.down_proj.quantized, ends, self.backend, dtype)


def _read(tensors: TensorFolder, name: str) -> Fp8Weight:
    stored = tensors[name]
    if not isinstance(stored, Fp8Weight):
        raise CheckpointError(
            f"{tensors.folder}: {name} is stored as {tensors.stored_dtype(name)}, not in FP8: use from_pretrained, or "
            "save the model with dtype=torch.float8_e4m3fn"
        )
    return stored


def _whole(weight: Fp8Weight) -> Quantized:
    return Quantized(weight.q, weight.scale, (BLOCK, BLOCK), E4M3, weight.q.shape[-1])


def _stack(weights: list[Fp8Weight]) -> Quantized:
    # As bytes: what can be stacked depends on torch's version, and these are moved, not computed with.
    q = torch.stack([weight.q.view(torch.uint8) for weight in weights]).view(torch.float8_e4m3fn)
    return Quantized(q, torch.stack([weight.scale for weight in weights]), (BLOCK, BLOCK), E4M3, q.shape[-1])
