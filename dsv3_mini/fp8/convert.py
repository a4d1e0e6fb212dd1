"""A model into its FP8 twin, and back: modules change their class and keep all else.

    nn.Linear                  -> FP8Linear             all that the released checkpoint stores in FP8
    SwiGLU                     -> FP8SwiGLU
    GroupedExperts             -> FP8GroupedExperts
    MultiHeadLatentAttention   -> FP8Attention          its linears in FP8; its core as it was

What is sensitive and cheap stays as it is (report section 3.3.1): embedding, head, router, norms, attention's core, and MTP's
`eh_proj`, which the released checkpoint has in BF16 too. Parameters are the same objects under the same names, so an
optimizer made before goes on, and state dicts of both fit both.

A class is given to a module that exists, as torch's `fully_shard` does, because only then whoever refers to it (a
parent, a hook, a list) refers to its twin.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.attention import FP8Attention
from dsv3_mini.fp8.experts import FP8GroupedExperts
from dsv3_mini.fp8.linear import FP8Linear
from dsv3_mini.fp8.recipe import REPORT, Fp8Recipe
from dsv3_mini.fp8.swiglu import FP8SwiGLU
from dsv3_mini.hub.names import is_fp8_name
from dsv3_mini.model.attention import MultiHeadLatentAttention
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.model.feed_forward import SwiGLU

Model = TypeVar("Model", bound=nn.Module)

TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FP8Linear,
    SwiGLU: FP8SwiGLU,
    GroupedExperts: FP8GroupedExperts,
    MultiHeadLatentAttention: FP8Attention,
}
ORIGINALS = {twin: original for original, twin in TWINS.items()}
ADDED = ("recipe", "after_attention")  # the attributes that a twin has and its original has not


def to_fp8(model: Model, recipe: Fp8Recipe = REPORT) -> Model:
    """Turn `model` into its FP8 twin, in place, and return it. A twin is given the new recipe.

    Weights of twins stay FP32 from here on: `model.to(torch.bfloat16)` rounds all others.

    Raises:
        ConfigError: a linear has a bias, or the experts are of a kind that has no twin.
    """
    for name, module in model.named_modules():
        _refuse(name, module)  # before anything is turned
    for name, module in model.named_modules():
        if type(module) in TWINS and _belongs(name, module):
            module.__class__ = TWINS[type(module)]
        if hasattr(type(module), "recipe"):
            module.recipe = recipe
        if isinstance(module, FP8Linear):
            module.after_attention = name.rpartition(".")[-1] == "o_proj"
    return model


def from_fp8(model: Model) -> Model:
    """Turn a twin back, in place, and return it. Weights that are masters are FP32: `.to(torch.bfloat16)` rounds them."""
    for module in model.modules():
        if type(module) in ORIGINALS:
            module.__class__ = ORIGINALS[type(module)]
            for name in ADDED:
                vars(module).pop(name, None)
    return model


def _belongs(name: str, module: nn.Module) -> bool:
    """Of linears, only those that the released layout stores in FP8."""
    return not isinstance(module, nn.Linear) or is_fp8_name(f".{name}.weight")


def _refuse(name: str, module: nn.Module) -> None:
    if type(module) is nn.Linear and _belongs(name, module) and module.bias is not None:
        raise ConfigError(f"{name} has a bias, which FP8Linear has not: DeepSeek-V3's linears have none")
    if isinstance(module, GroupedExperts) and type(module) not in (GroupedExperts, FP8GroupedExperts):
        kind = type(module).__name__
        raise ConfigError(f"{name or 'experts'}: {kind} has no FP8 twin: build the model with GroupedExperts")
