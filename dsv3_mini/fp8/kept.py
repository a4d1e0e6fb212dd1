"""What a computation keeps for its backward pass, measured: the bytes of the tensors that autograd saves.

Autograd hands every tensor that it saves to a hook; memory that several of them share, or that is seen through a view, is
counted once and whole, since it lives as long as any of them. Parameters are left out: they are there anyway.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def bytes_kept(compute: Callable[[], object], parameters: Iterable[Tensor]) -> dict[torch.dtype, int]:
    """Bytes that the graph of `compute()` keeps until backward, by the type of the numbers.

    Args:
        compute: runs forward.
        parameters: tensors whose memory is not counted.
    """
    there = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Held here as well, so that its address cannot be given to another while we count.
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    count: dict[torch.dtype, int] = defaultdict(int)
    for address, tensor in saved.items():
        if address not in there:
            count[tensor.dtype] += tensor.untyped_storage().nbytes()
    return dict(count)
