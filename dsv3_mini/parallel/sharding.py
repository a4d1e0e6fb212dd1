"""Sharing weights, gradients and optimizer state among data processes: FSDP2 in its ZeRO-1, 2 and 3 forms.

Each process keeps a piece of every weight, in FP32, with its piece of the optimizer's state. A block's weights are put
together from the pieces when the block runs, in the precision that it computes in; gradients are added up, in FP32, and each
process keeps the sum of its own piece. The forms differ in how long what was put together is kept:

                weights                                  gradients
    zero 1      until the optimizer's step               added up over micro-batches here, over processes once
    zero 2      until the optimizer's step               over processes with every micro-batch
    zero 3      until the block has run, each way        over processes with every micro-batch

Experts are a unit of their own, over the processes that hold the same ones (`expert_shard`), not over all of dp_shard.

Simplification: embedding, final norm and head stay put together from forward to backward in every form.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.block import Block
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.model.mtp import MTPModule
from dsv3_mini.parallel.layout import expert_dimension
from dsv3_mini.parallel.mesh import Mesh


def shard(model: DeepSeekV3, mesh: Mesh, dtype: torch.dtype) -> None:
    """Cut the weights of `model`, in place; its experts already are those of this process. `dtype`: to compute in."""
    # Inputs are not cast: gate values and rotations come in FP32 and stay so, hidden states follow the embedding.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    dense = _sharing(mesh.dense, "dp_replicate", "dp_shard")
    experts = _sharing(mesh.experts, "expert_replicate", "expert_shard")
    again = mesh.plan.zero == 3
    dimension = expert_dimension(model.cfg.n_routed_experts, mesh)
    for module in reversed(list(model.modules())):  # what lies inside first
        if isinstance(module, GroupedExperts):
            fully_shard(module, mesh=experts, reshard_after_forward=again, mp_policy=precision,
                        shard_placement_fn=lambda weight: Shard(dimension))  # fmt: skip
        elif isinstance(module, (Block, MTPModule)):
            fully_shard(module, mesh=dense, reshard_after_forward=again, mp_policy=precision)
    fully_shard(model, mesh=dense, reshard_after_forward=False, mp_policy=precision)
    # The losses run parts of the model and read the head's weight; `main_states` is the part that always comes first.
    if isinstance(model, DeepSeekV3):  # a stage of it has one way in
        register_fsdp_forward_method(model, "main_states")
    for unit in units(model):
        # Losses are shares of the whole batch's mean, so gradients are added up. A sum with a factor is not known to gloo.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def gather_once(model: DeepSeekV3) -> None:
    """Put every unit together and apart again, before the first step.

    A unit that rests in that step (MTP's, where lambda begins at 0) has to know its own shape by then: torch looks for
    gradients in every unit when micro-batches are added up here.
    """
    for unit in units(model):
        unit.unshard()
        unit.reshard()


def before_micro_batch(model: DeepSeekV3, zero: int, last: bool) -> None:
    """Say what its backward shall do with weights and gradients; `last` of the optimizer step."""
    model.set_is_last_backward(last)
    model.set_reshard_after_backward(last or zero == 3)
    model.set_requires_gradient_sync(last or zero > 1)


def units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _sharing(mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh:
    """Two dimensions where copies have their gradients summed too, else one."""
    return mesh[replicate, shard] if mesh[replicate].size() > 1 else mesh[shard]
