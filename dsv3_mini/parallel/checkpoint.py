"""Checkpoints of shared weights: every process writes its pieces, and any plan reads what it needs (torch's own engine).

    step-00001200/shard-*.safetensors    the pieces, each with its place in the whole weight
                  state.json             as in a checkpoint of one process (train/checkpoint.py)

Names and shapes are those of whole weights, so that a checkpoint knows nothing of the plan that wrote it: 2, 4 or 1 processes go
on from it in another layout. It appears under its name when all have written, as one process's does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dsv3_mini.parallel.layout import Layout
from dsv3_mini.train.checkpoint import Checkpoint, begin, checkpoint_name, load_state, publish, write_state


def save_pieces(
    run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], layouts: Mapping[str, Layout]
) -> None:
    """Write a checkpoint; all processes call this together.

    Args:
        tensors: this process's pieces, by `key.weight`; what belongs to no weight is the same in every process.
    """
    first = dist.get_rank() == 0
    temporary = run / "checkpoints" / f".{checkpoint_name(step)}.partial"
    if first:
        begin(temporary)
    dist.barrier()
    whole = {key: _spread(key, tensor, layouts) for key, tensor in tensors.items()}
    # In safetensors: torch's own form of a checkpoint is a pickle.
    dcp.save(whole, storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    if first:
        write_state(temporary, state)
        publish(temporary, run / "checkpoints" / checkpoint_name(step))
    dist.barrier()


def load_pieces(folder: Path, layouts: Mapping[str, Layout]) -> Checkpoint:
    """This process's pieces of a checkpoint, whatever plan wrote it; all processes call this together."""
    state = load_state(folder)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    kept = reader.read_metadata().state_dict_metadata
    own = {}
    for key, whole in kept.items():
        layout = layouts.get(key.partition(".")[2])
        shape = [s.stop - s.start for s in layout.piece(dist.get_rank())] if layout and whole.size else whole.size
        own[key] = torch.empty(shape, dtype=whole.properties.dtype)
    dcp.load({key: _spread(key, tensor, layouts) for key, tensor in own.items()}, storage_reader=reader)
    return Checkpoint(folder, own, state)


def _spread(key: str, tensor: Tensor, layouts: Mapping[str, Layout]) -> Tensor:
    layout = layouts.get(key.partition(".")[2])
    return layout.spread(tensor) if layout and tensor.ndim else tensor
