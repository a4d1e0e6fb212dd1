"""The books of one config: all its figures, gathered."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_mini.config import ModelConfig
from dsv3_mini.ledger.cost import REPORT_RUN, TrainingCost, hours_per_trillion, sustained_flops, training_cost
from dsv3_mini.ledger.flops import DecodeFlops, Flops, decode_flops_per_token, flops_per_token, mtp_flops_per_token
from dsv3_mini.ledger.memory import Cache, cache_per_token
from dsv3_mini.ledger.parameters import Parameters, count_parameters


@dataclass(frozen=True)
class Ledger:
    """Every figure of one config, at one context length and one price."""

    cfg: ModelConfig
    parameters: Parameters
    flops: tuple[Flops, ...]
    mtp_flops: Flops
    decode: DecodeFlops
    cache: Cache
    cost: TrainingCost


def ledger(
    cfg: ModelConfig,
    context: int = 4096,
    *,
    dollars_per_hour: float = 2.0,
    gpus: int = REPORT_RUN.gpus,
    tokens: int = REPORT_RUN.tokens,
    flops_per_second: float | None = None,
) -> Ledger:
    """Gather the figures of `cfg`.

    FLOPs are given at `context` and, as far as the config reaches, at 8 and 32 times that (the report's 4K, 32K, 128K).

    Args:
        context: tokens in a training sequence, and in the cache when decoding.
        dollars_per_hour: the price of a GPU hour.
        gpus, tokens: the size of the training run.
        flops_per_second: what one GPU sustains; None: what the report's run sustained on an H800.

    Raises:
        ConfigError: a figure is out of range.
    """
    flops = flops_per_token(cfg, context)
    longer = tuple(flops_per_token(cfg, n) for n in (8 * context, 32 * context) if n <= cfg.max_position_embeddings)
    rate = report_flops_per_second() if flops_per_second is None else flops_per_second
    return Ledger(
        cfg=cfg,
        parameters=count_parameters(cfg),
        flops=(flops, *longer),
        mtp_flops=mtp_flops_per_token(cfg, context),
        decode=decode_flops_per_token(cfg, context),
        cache=cache_per_token(cfg),
        cost=training_cost(
            hours_per_trillion(flops.train, rate), tokens=tokens, gpus=gpus, dollars_per_hour=dollars_per_hour
        ),
    )


def report_flops_per_second() -> float:
    """What one H800 sustained in the report's pre-training: 386.5 TFLOP/s by causal counting, MTP not counted."""
    return sustained_flops(flops_per_token(ModelConfig(), 4096).train, REPORT_RUN.hours_per_trillion)
