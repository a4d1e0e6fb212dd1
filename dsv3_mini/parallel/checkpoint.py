"""Checkpoints of shared weights: every process writes its pieces, and any plan reads what it needs (torch's own engine).

    step-00001200/shard-*.safetensors    the pieces, each with its place in the whole weight
                  state.json             as in a checkpoint of one process (train/checkpoint.py)

Names and shapes are those of whole weights, so that a checkpoint knows nothing of the plan that wrote it: 2, 4 or 1 processes go
on from it in another layout. It appears under its name when all have written, as one process's does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor

from dsv3_mini.errors import CheckpointError
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
    # A weight's state has a shape; AdamW's count of its steps has none.
    layout_of = {key: layouts.get(key.partition(".")[2]) for key, tensor in tensors.items() if tensor.ndim}
    whole = {key: layout.spread(t) if (layout := layout_of.get(key)) else t for key, t in tensors.items()}
    # In safetensors: torch's own form of a checkpoint is a pickle.
    dcp.save(whole, storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    if first:
        write_state(temporary, state)
        publish(temporary, run / "checkpoints" / checkpoint_name(step))
    dist.barrier()


def load_pieces(folder: Path, layouts: Mapping[str, Layout], elsewhere: Collection[str] = ()) -> Checkpoint:
    """This process's pieces of a checkpoint, whatever plan wrote it; all processes call this together.

    Args:
        elsewhere: weights of which this process has nothing, as they are of other stages.
    """
    state = load_state(folder)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        kept = reader.read_metadata().state_dict_metadata
        own, wanted = {}, {}
        for key, whole in kept.items():
            if key.partition(".")[2] in elsewhere:
                continue
            layout = layouts.get(key.partition(".")[2])
            # What has not the weight's shape is of another model, which is told where it is used.
            layout = layout if layout and layout.shape == whole.size else None
            own[key] = torch.empty(layout.own_shape if layout else whole.size, dtype=whole.properties.dtype)
            wanted[key] = layout.spread(own[key]) if layout else own[key]
        dcp.load(wanted, storage_reader=reader)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, dcp.CheckpointException) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder} cannot be read ({first_line}): remove it to resume from the one before"
        ) from None
    return Checkpoint(folder, own, state)
