"""The FP8 recipe of report section 3.3: exact on every CPU, the same modules on Hopper's tensor cores.

    formats      the numbers: E4M3, E5M2, E5M6, E8M0
    quantize     a matrix as small numbers with one scale per tile, and its change of tiles
    gemm         one interface to all FP8 GEMMs; backends/ holds them, kernels/ this project's own in Triton
    linear       FP8Linear: Fprop, Dgrad, Wgrad
    swiglu       SwiGLU whose input is kept in FP8 and whose output is computed again
    experts      the routed experts
    recipe       every choice of the report, and the ablations that turn one of them round
    convert      a model into its FP8 twin, and back
    inference    a model that multiplies with its weights as they are stored, one byte each

`formats`, `quantize` and `gemm` know nothing of the model; hub/ reads and writes its FP8 weights with them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dsv3_mini.fp8.formats import E4M3, E5M2, E5M6, E8M0, FloatFormat
from dsv3_mini.fp8.quantize import Quantized

if TYPE_CHECKING:
    from dsv3_mini.fp8.convert import from_fp8, to_fp8
    from dsv3_mini.fp8.inference import load_fp8
    from dsv3_mini.fp8.recipe import Fp8Recipe

__all__ = ["E4M3", "E5M2", "E5M6", "E8M0", "FloatFormat", "Fp8Recipe", "Quantized", "from_fp8", "load_fp8", "to_fp8"]

_HOMES = {"Fp8Recipe": "recipe", "from_fp8": "convert", "load_fp8": "inference", "to_fp8": "convert"}


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: hub/ imports `quantize` from here, and `inference` imports hub/."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
