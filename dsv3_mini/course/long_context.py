"""What lesson 17 measures: needles in a haystack for the tiny model as it was trained, stretched, and trained on, twice.

    python -m dsv3_mini.course.long_context            # measures all, and writes data/long_context/needles.json

The heat maps of all lengths and depths take minutes; the lesson plays them back, and measures a corner of them anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.course.recording import write_recording
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.evaluate.bits_per_byte import losses_by_domain
from dsv3_mini.evaluate.needle import NeedleGrid, Read, needle_grid, needles
from dsv3_mini.hub import from_pretrained
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.rope import rotations
from dsv3_mini.train.extend import with_config

MODELS = ("tiny", "tiny-4x", "tiny-16x")
TRAINED = 208  # tokens a row in tiny's pre-training
FACTOR = 4
LENGTHS = (104, 208, 416, 832)
FURTHER = (832, 1664, 3328)  # of the second phase
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
STORIES = 30
DOMAINS = ("stories", "sums", "code", "prose")
ROWS = 64  # held-out rows of TRAINED tokens a domain
RECORDED = "long_context/needles.json"


def ways(tiny: DeepSeekV3, extended: DeepSeekV3) -> dict[str, tuple[DeepSeekV3, Read | None]]:
    """The four that are compared, each with how it reads: the name says what was done to its positions."""
    unchecked = with_config(
        tiny, tiny.cfg.replace(max_position_embeddings=FACTOR * TRAINED, num_nextn_predict_layers=0)
    )
    return {
        "as trained": (unchecked, None),
        "position interpolation": (unchecked, interpolated(unchecked, FACTOR)),
        "YaRN, not trained": (with_config(tiny, extended.cfg), None),
        "YaRN, trained": (extended, None),
    }


def phases(extended: DeepSeekV3, longest: DeepSeekV3) -> dict[str, tuple[DeepSeekV3, Read | None]]:
    """The first phase's model, which reads on, and the second's."""
    further = longest.cfg.max_position_embeddings
    return {
        "first phase": (with_config(extended, extended.cfg.replace(max_position_embeddings=further)), None),
        "second phase": (longest, None),
    }


def interpolated(model: DeepSeekV3, factor: float) -> Read:
    """The model told that its tokens stand `factor` times closer: no position is beyond those it was trained on."""

    def read(tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        turn = rotations(model.cfg, torch.arange(tokens.shape[1], device=tokens.device) / factor)
        x = model.embed_tokens(tokens)
        for block in model.layers:
            x, _ = block(x, turn)
        return model.norm(x)

    return read


def old_length_losses(model: DeepSeekV3, tokenizer: Tokenizer) -> dict[str, float]:
    """Nats per token on held-out rows as long as those of pre-training, by domain."""
    rows = {domain: held_out_rows(domain, tokenizer, TRAINED, ROWS) for domain in DOMAINS}
    return losses_by_domain(model, rows, tokenizer.pad_id)["validation_loss"]


def record(
    stories: int = STORIES,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    further: Sequence[int] = FURTHER,
) -> dict[str, Any]:
    """All measurements, as plain JSON."""
    tokenizer = Tokenizer.shipped()
    tiny, extended, longest = (from_pretrained(shipped(name), mtp=False).eval() for name in MODELS)
    asked = needles(tiny, tokenizer, stories, longest=min(lengths))

    def grids(compared: dict[str, tuple[DeepSeekV3, Read | None]], lengths: Sequence[int]) -> dict[str, Any]:
        return {
            name: asdict(needle_grid(model, tokenizer, asked, lengths, depths, read))
            for name, (model, read) in compared.items()
        }

    compared, then = ways(tiny, extended), phases(extended, longest)
    measured = {"as trained": (tiny, None), **compared, "second phase": then["second phase"]}
    losses = {name: old_length_losses(model, tokenizer) for name, (model, read) in measured.items() if read is None}
    return {
        "trained": TRAINED,
        "needles": grids(compared, lengths),
        "phases": grids(then, further),
        "old_length_loss": losses,
    }


def recorded() -> dict[str, Any]:
    """What data/long_context holds, its grids as `NeedleGrid`."""
    values = json.loads(shipped(RECORDED).read_text(encoding="utf-8"))
    maps = ("needles", "phases")
    return values | {part: {name: NeedleGrid(**grid) for name, grid in values[part].items()} for part in maps}


if __name__ == "__main__":
    write_recording(RECORDED, record, "Needles in a haystack, measured for lesson 17.")
