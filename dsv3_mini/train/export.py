"""The model out of a checkpoint, whichever processes wrote it: what a run has learnt so far, without the run.

Of the checkpoint's files only the weights are read, one at a time: no optimizer state, no process group, no GPU.

Simplification: the model lies whole in the CPU's memory, in the precision asked for.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import CheckpointError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.train.balance import routers
from dsv3_mini.train.checkpoint import checkpoint_name, checkpoints, open_checkpoint


def find_checkpoint(source: Path, step: int | None = None) -> Path:
    """The folder of a run's checkpoint: its last one, or that of a step; a checkpoint's own folder is itself.

    Raises:
        CheckpointError: there is none.
    """
    if re.fullmatch(r"step-\d{8}", source.name):
        return source
    found = checkpoints(source)
    if not found:
        raise CheckpointError(f"{source} holds no checkpoint: give the folder of a run, or of one of its checkpoints")
    if step is None:
        return found[-1]
    if source / "checkpoints" / checkpoint_name(step) not in found:
        kept = ", ".join(str(int(folder.name.removeprefix("step-"))) for folder in found)
        raise CheckpointError(f"{source} holds no checkpoint of step {step}: it has those of steps {kept}")
    return source / "checkpoints" / checkpoint_name(step)


def trained_model(checkpoint: Path, averaged: bool = False, dtype: torch.dtype = torch.float32) -> DeepSeekV3:
    """The model of RUN/checkpoints/step-N, on the CPU, ready to be evaluated.

    Args:
        averaged: with the moving average of the weights instead of the weights themselves.
        dtype: of the parameters; gate biases are FP32 whatever it is.

    Raises:
        CheckpointError: a file is missing or damaged, is of another model, or no moving average was kept.
    """
    stored = open_checkpoint(checkpoint)
    if averaged and not any(name.startswith("ema.") for name in stored.tensors):
        raise CheckpointError(f"{checkpoint} has no moving average of the weights: take the weights themselves")
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig.from_hf(checkpoint.parent.parent)).to(dtype)
    model = model.to_empty(device="cpu")
    prefix = "ema" if averaged else "master"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.tensor(f"{prefix}.{name}", parameter.shape))
        for router in routers(model):
            bias = router.e_score_correction_bias
            if bias is not None:
                bias.copy_(stored.tensor(f"gate_bias.{router.layer}", bias.shape))
    return model.eval()
