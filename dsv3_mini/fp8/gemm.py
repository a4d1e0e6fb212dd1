"""One interface to every FP8 GEMM: a [m k] times b [n k], transposed, chosen by name.

    y = gemm(a, b)                                 the best that this machine has
    y = gemm(a, b, backend="exact")                or one by its name
    y = gemm(a, b, backend=Hopper(promote_every=None))     or one made by hand

Both operands have their contraction k last, which is the only layout that Hopper's tensor cores take in FP8. So the three
GEMMs of a linear with weight W [o i] all read the same way; what changes is which operand is laid out anew first:

    Fprop   Y [T o]  = X [T i]    @ W [o i]^T
    Dgrad   dX [T i] = dY [T o]   @ (W^T) [i o]^T
    Wgrad   dW [o i] = (dY^T) [o T] @ (X^T) [i T]^T

| name      | what it is                                                          | where                                |
|-----------|---------------------------------------------------------------------|--------------------------------------|
| deep_gemm | DeepSeek's kernels, where the package is installed                  | Hopper                               |
| scaled_mm | torch's own, on cuBLAS                                              | Hopper, torch for CUDA 12.9 or newer |
| triton    | this project's kernels                                              | a GPU with FP8; the interpreter      |
| exact     | dequantize, multiply in FP32: what the others approximate           | everywhere                           |
| hopper    | the arithmetic of Hopper's tensor core, bit by bit: slow, to study  | everywhere, never chosen by "auto"   |
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.quantize import TILE, Quantized

AUTO = ("deep_gemm", "scaled_mm", "triton", "exact")
"""What "auto" tries, in this order; `exact` always can."""


class Backend(Protocol):
    """One way to multiply. Inherit from it: what is the same for all is here."""

    name: str
    fp32: bool = False
    """Multiplies in FP32, so operands need not be made small for it: it takes them `in_fp32`, too."""

    def missing(self) -> str | None:
        """Why this machine cannot run it, in one line that also says what to use; None where it can."""
        return None

    def refuses(self, a: Quantized, b: Quantized) -> str | None:
        """Why it cannot multiply these two, or None. The rule here is a tensor core's and its kernels'."""
        if a.tile != (1, TILE) or b.tile not in ((TILE, TILE), (1, TILE)):
            return f"it multiplies tiles (1, {TILE}) by ({TILE}, {TILE}) or (1, {TILE}), not {a.tile} by {b.tile}"
        if a.fmt.bits != 8 or b.fmt.bits != 8:
            return f"it multiplies numbers of 8 bits, not {a.fmt.name} by {b.fmt.name}: retile them in E4M3"
        return self.misplaced(a, b)

    def misplaced(self, a: Quantized, b: Quantized) -> str | None:
        """Why their device will not do, or None."""
        return (
            None if a.q.is_cuda and b.q.is_cuda else f"it multiplies on a CUDA device, not {a.q.device} by {b.q.device}"
        )

    def gemm(self, a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Float[Tensor, "m n"]:
        """a [m k] @ b [n k]^T."""
        ...

    def grouped_gemm(
        self, a: Quantized, b: Quantized, ends: Int[Tensor, " e"], out_dtype: torch.dtype
    ) -> Float[Tensor, "T n"]:
        """Rows ends[i-1] : ends[i] of a [T k] times b[i] [n k]^T; one after the other, unless a backend does better."""
        out = a.scale.new_zeros(a.shape[0], b.shape[-2], dtype=out_dtype)
        for expert, start, end in groups(ends):
            out[start:end] = self.gemm(a.rows(start, end), b.matrix(expert), out_dtype)
        return out

    def grouped_wgrad(
        self, a: Quantized, b: Quantized, ends: Int[Tensor, " e"], out_dtype: torch.dtype
    ) -> Float[Tensor, "e m n"]:
        """Columns ends[i-1] : ends[i] of a [m T] times the same of b [n T]^T; zeros for an expert without."""
        out = a.scale.new_zeros(len(ends), a.shape[0], b.shape[0], dtype=out_dtype)
        for expert, start, end in groups(ends):
            out[expert] = self.gemm(a.along(start, end), b.along(start, end), out_dtype)
        return out


def groups(ends: Int[Tensor, " e"]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, row behind the last) of each expert that has rows. Waits for the GPU, once."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, start, end
        start = end


def gemm(
    a: Quantized, b: Quantized, backend: str | Backend = "auto", out_dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "m n"]:
    """a [m k] @ b [n k]^T, rounded once to `out_dtype`.

    Raises:
        ConfigError: the contractions differ, no backend has that name, or it cannot multiply these here.
    """
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[-1] != b.shape[-1]:
        raise ConfigError(
            f"a {list(a.shape)} and b {list(b.shape)} must be [m k] and [n k], with one k: transpose one of them"
        )
    return _choose(backend, a, b).gemm(a, b, out_dtype)


def grouped_gemm(
    a: Quantized,
    b: Quantized,
    ends: Int[Tensor, " e"],
    backend: str | Backend = "auto",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "T n"]:
    """Each expert on its own rows: rows ends[i-1] : ends[i] of a [T k] times b[i]^T of b [e n k].

    Args:
        ends: int32, where each expert's rows end; the last is T. Experts without rows are allowed.

    Raises:
        ConfigError: as `gemm`, or `ends` does not fit.
    """
    if len(a.shape) != 2 or len(b.shape) != 3 or a.shape[-1] != b.shape[-1] or ends.shape != b.shape[:1]:
        raise ConfigError(
            f"a {list(a.shape)}, b {list(b.shape)} and ends {list(ends.shape)} must be [T k], [e n k] and [e], with one k"
        )
    return _choose(backend, a, b).grouped_gemm(a, b, ends, out_dtype)


def grouped_wgrad(
    a: Quantized,
    b: Quantized,
    ends: Int[Tensor, " e"],
    backend: str | Backend = "auto",
    out_dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "e m n"]:
    """Each expert's sum over its own tokens: columns ends[i-1] : ends[i] of a [m T] times the same of b [n T], transposed.

    Args:
        ends: where each expert's tokens end, each at the end of a tile; the last is T. Experts without tokens get zeros.

    Raises:
        ConfigError: as `gemm`, or `ends` cuts through tiles.
    """
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[-1] != b.shape[-1]:
        raise ConfigError(f"a {list(a.shape)} and b {list(b.shape)} must be [m T] and [n T], with one T")
    return _choose(backend, a, b).grouped_wgrad(a, b, ends, out_dtype)


def in_fp32(chosen: str | Backend) -> bool:
    """Whether this backend multiplies in FP32; "auto" does where all that it can choose from do."""
    if chosen == "auto":
        return all(one.fp32 for one in _present())
    return (backend(chosen) if isinstance(chosen, str) else chosen).fp32


@functools.cache
def backends() -> dict[str, Backend]:
    """All backends by name, whether this machine can run them or not; "auto" prefers the first."""
    # Here and not above: each of these modules imports this one.
    from dsv3_mini.fp8.backends.deep_gemm import DeepGemm
    from dsv3_mini.fp8.backends.exact import Exact
    from dsv3_mini.fp8.backends.hopper import Hopper
    from dsv3_mini.fp8.backends.scaled_mm import ScaledMM
    from dsv3_mini.fp8.backends.triton_backend import Triton

    return {one.name: one for one in (DeepGemm(), ScaledMM(), Triton(), Exact(), Hopper())}


def backend(name: str) -> Backend:
    """The backend of that name. ConfigError says why, where there is none or this machine cannot run it."""
    if name not in backends():
        raise ConfigError(f"FP8 backend {name!r} is not known: choose one of auto, {', '.join(backends())}")
    if reason := backends()[name].missing():
        raise ConfigError(f"FP8 backend {name!r} cannot run here: {reason}")
    return backends()[name]


@functools.cache
def _present() -> tuple[Backend, ...]:
    """What "auto" can choose from. A machine does not change while a program runs, so it is asked once."""
    return tuple(backends()[name] for name in AUTO if backends()[name].missing() is None)


def _choose(chosen: str | Backend, a: Quantized, b: Quantized) -> Backend:
    if chosen == "auto":
        return next(one for one in _present() if one.refuses(a, b) is None)
    one = backend(chosen) if isinstance(chosen, str) else chosen
    if reason := one.refuses(a, b):
        raise ConfigError(f"FP8 backend {one.name!r} cannot multiply these: {reason}; backend='exact' takes all")
    return one
