"""Paper: torch's real operations on tensors that have a shape, a type and no memory, as one rank of a cluster runs them.

    numbers with a fraction    live on the meta device: shapes are worked out, nothing is stored or computed
    whole numbers              are real: token ids, choices, counts; what is exchanged follows from them
    an exchange                is not made. *All ranks of a group are alike*: each would send what this one sends, so that
                               what arrives is known

Alike means: every rank has the same tokens and the same choices. So a sum over a group is its size times the own number,
and an all-to-all brings from each member what this rank sends to itself. With choices that load all experts evenly (`even_choice`)
this is what happens on a cluster, up to chance.

Where a GPU runs one kernel and torch takes its own formula apart on meta, the kernel is put in its place: what
attention and RMSNorm keep for backward is what they keep on a GPU.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork, Work
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3_mini.model.router import Router, Routing, expert_load, limit_to_groups
from dsv3_mini.parallel.dry_run.exchanges import Watching, group_of, tensors_in

META = torch.device("meta")


class Paper(Watching):
    """Runs operations as the module's docstring says, and shows them to watchers.

    Shapes are worked out once for each operation on tensors of the same shapes, and remembered: a step has tens of thousands
    of operations, and hundreds that differ.
    """

    def __init__(self, *watchers: Any) -> None:
        super().__init__(*watchers)
        self.known: dict[Any, tuple[type | None, tuple[tuple[Any, ...], ...]]] = {}

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            return exchanged(func, args)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0  # any number will do: it decides nothing but whether gradients are clipped
        if any(tensor.is_meta for tensor in tensors_in(args, *kwargs.values())):
            args, kwargs = [_to_meta(a) for a in args], {name: _to_meta(a) for name, a in kwargs.items()}
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": META}
            return self.worked_out(func, args, kwargs)
        if _is_factory(func) and _makes_fractions(func, kwargs.get("dtype")):
            kwargs = {**kwargs, "device": META}
        return func(*args, **kwargs)

    def worked_out(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result of an operation on tensors without memory, where it makes new ones: from what is known, or anew."""
        if not _makes_new(func):
            return func(*args, **kwargs)
        key = (func, _described(args), _described(tuple(kwargs.items())))
        if key in self.known:
            container, sizes = self.known[key]
            made = [torch.empty_strided(size, stride, dtype=dtype, device=META) for size, stride, dtype in sizes]
            return made[0] if container is None else container(made)
        result = func(*args, **kwargs)
        found = result if isinstance(result, (tuple, list)) else (result,)
        there = {tensor.untyped_storage()._cdata for tensor in tensors_in(args, *kwargs.values())}
        if all(type(t) is Tensor and t.is_meta and t.untyped_storage()._cdata not in there for t in found):
            container = type(result) if isinstance(result, (tuple, list)) else None
            self.known[key] = container, tuple((t.shape, t.stride(), t.dtype) for t in found)
        return result


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool, scale: float
) -> Tensor:
    """The kernel that scaled_dot_product_attention is on a GPU: it keeps its output and a number per row, not the scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]


def fused_norm(x: Tensor, shape: torch.Size, weight: Tensor, eps: float) -> Tensor:
    """The kernel that rms_norm is on a GPU: it keeps its input and a number per row."""
    return torch.ops.aten._fused_rms_norm(x, list(shape), weight, eps)[0]


@contextmanager
def on_paper(*watchers: Any) -> Iterator[None]:
    """Everything inside runs on paper, and `watchers` see it.

    Torch's FSDP and its fused AdamW refuse weights without memory, for no other reason than that nobody can have meant it.
    """
    with (
        mock.patch.object(F, "scaled_dot_product_attention", flash_attention),
        mock.patch.object(F, "rms_norm", fused_norm),
        mock.patch.object(FSDPParamGroup, "_validate_no_meta_params", lambda self: None),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]),
        Paper(*watchers),
    ):
        yield


def exchanged(func: Any, args: Sequence[Any]) -> Any:
    """The result of an exchange among ranks that are alike. Numbers with a fraction have no value that would travel."""
    name, done = func._opname, Work.boxed(FakeWork())
    if name in ("wait_tensor", "_wrap_tensor_autograd"):
        return args[0]
    group = group_of(func, args)
    size, me = group.size(), group.rank()
    if name == "all_to_all_single":
        rows, arriving, leaving = args[:3]
        if not rows.is_meta:
            return torch.cat([rows.split(leaving)[me]] * size)
        return rows.new_empty(sum(arriving), *rows.shape[1:])
    if name == "alltoall_base_":
        output, rows = args[:2]
        if not output.is_meta:
            output.copy_(rows.tensor_split(size)[me].repeat(size, *[1] * (rows.ndim - 1)))
        return done
    if name == "allreduce_":
        if not args[0][0].is_meta:
            args[0][0].mul_(size)
        return args[0], done
    return (args[0], done) if name in ("_allgather_base_", "_reduce_scatter_base_") else done


class EvenRouter(Router):
    """A router whose choices are written down before: those of `even_choice`, whatever the scores."""

    def forward(self, x: Float[Tensor, "b s d"]) -> Routing:
        routing = super().forward(x)
        b, s, e = routing.scores.shape
        chosen = even_choice(self, b * s, e).view(b, s, -1)
        gates = routing.scores.gather(-1, chosen) * self.scaling / self.k
        return Routing(self.layer, routing.scores, chosen, gates, expert_load(chosen, e))


def route_evenly(model: nn.Module) -> None:
    """Give all routers of a model written choices, in place."""
    for module in model.modules():
        if type(module) is Router:
            module.__class__ = EvenRouter


def even_choice(router: Router, tokens: int, experts: int) -> Int[Tensor, "T k"]:
    """Choices as the router makes them of random scores, turned on from token to token so that every expert gets as many.

    A draw serves as many tokens as there are experts: for the next token its groups and the places in them are turned on by
    one, in all combinations. Tokens that are a multiple of the experts load each of them, and each node, the same.
    """
    groups, places = router.n_group, experts // router.n_group
    draws = -(-tokens // experts)
    # Drawn as whole numbers, which are real on paper too.
    scores = torch.randint(2**24, (1, draws, experts), generator=torch.Generator().manual_seed(0)).float()
    chosen = limit_to_groups(scores, groups, router.topk_group).topk(router.k, dim=-1).indices[0]
    token = torch.arange(tokens)
    picked = chosen[token // experts]
    group = (picked // places + (token % groups)[:, None]) % groups
    place = (picked % places + (token // groups)[:, None]) % places
    return group * places + place


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """This process as one of `ranks` that are not there."""
    # Torch puts "[rank0]: " before every error from here on, once more for each group that it ever made.
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


@functools.cache
def _is_factory(func: Any) -> bool:
    """Makes a tensor of nothing but sizes."""
    takes = {argument.name: str(argument.type) for argument in func._schema.arguments}
    return "device" in takes and "Tensor" not in takes.values()


@functools.cache
def _makes_new(func: Any) -> bool:
    """Writes into none of its arguments, and its results are no views of them."""
    schema = func._schema
    return all(part.alias_info is None for part in (*schema.arguments, *schema.returns))


def _described(thing: Any) -> Any:
    """All that a result's shape can hang on, to be looked up by."""
    if isinstance(thing, Tensor):
        return thing.shape, thing.stride(), thing.dtype
    if isinstance(thing, (list, tuple)):
        return tuple(map(_described, thing))
    return type(thing), thing


def _to_meta(thing: Any) -> Any:
    if isinstance(thing, (list, tuple)):
        return type(thing)(_to_meta(part) for part in thing)
    if not isinstance(thing, Tensor) or thing.is_meta:
        return thing
    return torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device=META)


def _makes_fractions(func: Any, dtype: torch.dtype | None) -> bool:
    if dtype is None:
        return func._opname not in ("arange", "randint", "randperm")
    return dtype.is_floating_point
