"""What lesson 18's processes do with torch's own collectives and the package's: each function is the work of one rank."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.ranks import Rank
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.parallel.mesh import Mesh
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.parallel.sharding import before_micro_batch, shard, units
from dsv3_mini.train.losses import training_losses

RATE, MOMENTUM = 1.0, 0.9
CFG = ModelConfig.preset("nano", vocab_size=256, num_hidden_layers=2)


def with_torch(me: Rank, x: Float[Tensor, "n m"]) -> dict[str, Tensor]:
    """torch's five, each on a copy of x, whose row r is for rank r where that matters."""
    told, total, own, swapped = x.clone(), x.clone(), x[0].clone(), torch.empty_like(x)
    every = [torch.empty_like(own) for _ in range(me.count)]
    dist.broadcast(told, src=0)
    dist.all_reduce(total)
    dist.reduce_scatter(own, list(x))
    dist.all_gather(every, x[0])
    dist.all_to_all_single(swapped, x)
    named = ("broadcast", "all-reduce", "reduce-scatter", "all-gather", "all-to-all")
    return dict(zip(named, (told, total, own, torch.stack(every), swapped), strict=True))


def fresh_model() -> DeepSeekV3:
    """The same weights in every process and at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(18)
        return DeepSeekV3(CFG)


def random_rows(count: int, length: int = 16) -> Int[Tensor, "b s1"]:
    return torch.randint(0, CFG.vocab_size, (count, length + 1), generator=torch.Generator().manual_seed(18))


def backward(model: DeepSeekV3, rows: Int[Tensor, "own s1"], batch: Int[Tensor, "b s1"]) -> None:
    """Add to the model's gradients what these rows of the batch have to say to the whole batch's mean loss."""
    training_losses(model, rows[:, :-1], rows[:, 1:], 0.3, 1e-4, batch_targets=batch[:, 1:]).total.backward()


def flat(tensors: Mapping[str, Tensor], whole: int) -> Float[Tensor, " whole"]:
    """Tensors one behind the other, with zeros at the end to make it `whole` numbers."""
    row = torch.cat([tensor.detach().flatten() for tensor in tensors.values()])
    return torch.cat([row, row.new_zeros(whole - len(row))])


def gradient_of_rows(me: Rank, batch: Int[Tensor, "b s1"]) -> Float[Tensor, " p"]:
    """Data parallelism: this rank's rows of the batch, and all ranks' gradients added up."""
    model = fresh_model()
    backward(model, batch[me.number :: me.count], batch)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    row = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(row)
    return row


def axes(me: Rank, plan: dict[str, int]) -> dict[str, list[int]]:
    """With whom this rank shares each axis of the package's meshes."""
    mesh = Mesh.join(ParallelPlan(**plan), CFG)
    named = {name: mesh.dense for name in mesh.dense.mesh_dim_names} | {
        n: mesh.experts for n in mesh.experts.mesh_dim_names
    }
    return {name: dist.get_process_group_ranks(of.get_group(name)) for name, of in named.items()}


class Exchanges(TorchDispatchMode):
    """Counts torch's operations by name, exchanges included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def here(tensors: list[Tensor]) -> int:
    """Numbers that lie in this process: of a shared tensor its piece."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)


def shared_step(me: Rank, zero: int, batch: Int[Tensor, "b s1"], parts: int) -> dict[str, Any]:
    """One step of SGD with the package's `shard`, in `parts` micro-batches: the weights after it, and what it took.

    weights, gradients: numbers of them in this process after the first micro-batch's forward, and after its backward.
    gathers, sums: how often weights were put together and gradients added up, for each unit (a block, or its experts).
    """
    plan = ParallelPlan(dp_shard=me.count, zero=zero)
    model = fresh_model()
    shard(model, Mesh.join(plan, CFG), torch.float32)
    pieces = list(model.parameters())
    optimizer = torch.optim.SGD(pieces, lr=RATE, momentum=MOMENTUM)
    held, own = {"weights": 0, "gradients": 0}, batch[me.number :: me.count]
    with Exchanges() as exchanges:
        for number, rows in enumerate(own.chunk(parts)):
            before_micro_batch(model, zero, last=number == parts - 1)
            loss = training_losses(model, rows[:, :-1], rows[:, 1:], 0.3, 1e-4, batch_targets=batch[:, 1:])
            if number == 0:
                held["weights"] = here(list(model.parameters()))
            loss.total.backward()
            if number == 0:
                either = {id(p): p for p in (*pieces, *model.parameters())}  # summed and cut, or still whole
                held["gradients"] = here([p.grad for p in either.values() if p.grad is not None])
    optimizer.step()
    count = len(units(model))
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    return held | {
        "gathers": round(exchanges.calls["c10d::_allgather_base_"] / count),
        "sums": round(exchanges.calls["c10d::_reduce_scatter_base_"] / count),
        "momentum": here([state["momentum_buffer"] for state in optimizer.state.values()]),
        "after": whole,
    }


def not_all_come(me: Rank, patience: float) -> str:
    """All but the last rank enter an all-reduce: what they are told when their patience (seconds) is over."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=patience))
    if me.number == me.count - 1:
        return "went home early"
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError:
        return "gave up waiting"
    return "got its sum"
