"""The ledger: exact parameters, FLOPs, cache bytes, training memory, GPU hours and dollars of any config.

All of it is arithmetic on a `ModelConfig`; no model is built. `ledger(cfg)` gathers the figures, `render` makes a
table of them and `to_dict` plain numbers for JSON.
"""

from __future__ import annotations

from dsv3_mini.ledger.books import Ledger, ledger, report_flops_per_second
from dsv3_mini.ledger.cost import (
    H800_PEAK,
    REPORT_RUN,
    Run,
    TrainingCost,
    hours_per_trillion,
    sustained_flops,
    training_cost,
)
from dsv3_mini.ledger.flops import (
    DecodeFlops,
    Flops,
    decode_flops_per_token,
    flops_per_token,
    matmul_flops_per_token,
    mtp_flops_per_token,
)
from dsv3_mini.ledger.memory import (
    Cache,
    TrainingState,
    cache_per_token,
    checkpoint_bytes,
    default_groups,
    training_state,
)
from dsv3_mini.ledger.parameters import Block, Parameters, Tensor, activated, count_parameters
from dsv3_mini.ledger.table import ledger_text, render, to_dict

__all__ = [
    "H800_PEAK", "REPORT_RUN", "Block", "Cache", "DecodeFlops", "Flops", "Ledger", "Parameters", "Run", "Tensor",
    "TrainingCost", "TrainingState", "activated", "cache_per_token", "checkpoint_bytes", "count_parameters",
    "decode_flops_per_token", "default_groups", "flops_per_token", "hours_per_trillion", "ledger", "ledger_text",
    "matmul_flops_per_token", "mtp_flops_per_token", "render", "report_flops_per_second", "sustained_flops", "to_dict", "training_cost",
    "training_state",
]  # fmt: skip
