"""Checkpoints of shared weights: every process writes its pieces, and any plan reads what it needs (torch's own engine).

    step-00001200/shard-*.safetensors    the pieces, each with its place in the whole weight
                  state.json             as in a checkpoint of one process (train/checkpoint.py)

Names and shapes are those of whole weights, so that a checkpoint knows nothing of the plan that wrote it: 2, 4 or 1 processes go
on from it in another layout. It appears under its name when all have written, as one process's does.

Writing takes place beside the steps that follow: from a copy in the CPU's memory, in a thread, over a process group of its own.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor

from dsv3_mini.errors import CheckpointError
from dsv3_mini.parallel.layout import Layout
from dsv3_mini.train.checkpoint import Checkpoint, cannot_write, checkpoint_name, load_state, publish, write_state


class Scribe:
    """Writes one thing at a time, in a thread, while this process goes on; over a process group of its own."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[dist.ProcessGroup], None]) -> None:
        """Begin to write, once what was begun before is done; all processes call this together."""
        self.wait()
        group = self._group = self._group or dist.new_group(backend="gloo")

        def work() -> None:
            try:
                write(group)
            except BaseException as error:  # raised again where it is waited for
                self._error = error

        # A daemon: a process that fails need not wait for what it was writing, which counts as never begun.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it is written. Raises what kept it from being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def save_pieces(
    run: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    layouts: Mapping[str, Layout],
    group: dist.ProcessGroup,
) -> None:
    """Write a checkpoint; all processes of `group`, which is gloo's, call this together.

    Args:
        tensors: this process's pieces, in the CPU's memory, by `key.weight`; what belongs to no weight is the same in
            every process.

    Raises:
        CheckpointError: in every process, if the disk refuses in one; what was there before stays.
    """
    first = dist.get_rank(group) == 0
    # A name that no other attempt has: whoever is late in dying must not write into this one.
    token = [uuid.uuid4().hex[:8]]
    dist.broadcast_object_list(token, group=group, group_src=0)
    final = run / "checkpoints" / checkpoint_name(step)
    temporary = final.with_name(f".{final.name}.{token[0]}.partial")
    # A weight's state has a shape; AdamW's count of its steps has none.
    layout_of = {key: layouts.get(key.partition(".")[2]) for key, tensor in tensors.items() if tensor.ndim}
    whole = {key: layout.spread(t) if (layout := layout_of.get(key)) else t for key, t in tensors.items()}
    try:
        # In safetensors: torch's own form of a checkpoint is a pickle.
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(whole, storage_writer=writer, process_group=group)
    except dcp.CheckpointException as failure:  # which all are told of
        rank, (error, _) = min(failure.failures.items())
        if isinstance(error, (OSError, SafetensorError)):
            raise cannot_write(final, error, f"process {rank}: ") from None
        raise RuntimeError(f"{final.name} was not written: process {rank}: {error}") from None
    failed: list[str | None] = [None]
    if first:
        try:
            write_state(temporary, state)
            publish(temporary, final)
        except OSError as error:
            failed = [str(cannot_write(final, error))]
    dist.broadcast_object_list(failed, group=group, group_src=0)
    if failed[0]:
        raise CheckpointError(failed[0])


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
