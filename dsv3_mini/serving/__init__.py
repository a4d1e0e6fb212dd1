"""A model that answers many people at once: what a deployment's units can do, and a simulator of their work.

`unit` says what a deployment unit is, `cost` how long its steps take (FLOPs and bytes from `ledger`), `arrivals` what it is
asked for, and `simulator` lets requests pass through a prefill and a decode pool.
"""

from dsv3_mini.serving.arrivals import Lengths, Requests, poisson
from dsv3_mini.serving.cost import UnitCost
from dsv3_mini.serving.served import Served
from dsv3_mini.serving.simulator import simulate
from dsv3_mini.serving.unit import DECODE, H800_CARD, PREFILL, Card, Unit

__all__ = [
    "DECODE", "H800_CARD", "PREFILL", "Card", "Lengths", "Requests", "Served", "Unit", "UnitCost", "poisson", "simulate",
]  # fmt: skip
