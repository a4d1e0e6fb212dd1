"""What serves a model: a card, and a deployment unit of many cards that hold the model once (report section 3.4).

Attention is split over `tp` cards, and the unit has several such groups side by side; every group has its own requests.
Routed experts lie in the unit's `slots`, as many on each card, replicas of busy ones included.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger.decode import H800
from dsv3_mini.parallel.traffic import INSIDE_SPEED, NETWORK_SPEED, OncePer


@dataclass(frozen=True)
class Card:
    """The rates of one GPU: FLOP/s of FP8 and of BF16 products, and bytes/s of its memory, of the network between nodes
    and of the wires inside a node; bytes of memory, of which a share `usable` is for weights and cache.

    Raises:
        ConfigError: a rate is no number above 0, or `usable` is above 1.
    """

    name: str
    fp8: float
    bf16: float
    memory_rate: float
    network: float
    inside: float
    memory: float
    usable: float = 0.9

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            _require_above_0(field.name, getattr(self, field.name))
        if self.usable > 1:
            raise ConfigError(f"usable = {self.usable} must be at most 1: it is a share of the memory")


@dataclass(frozen=True)
class Unit:
    """A deployment unit: `nodes` of `gpus` cards each.

    Args:
        tp: cards that share one attention. slots: places for routed experts on the whole unit, in each layer.
        once_per: a token's vector crosses the network once for each "node" that it needs, or once for each "expert".
        imbalance: the busiest card's share of expert work over the mean, as `Placement.imbalance` measures it.
        micro_batches: 2: one half of a step computes while the other one's vectors travel; 1: nothing overlaps.

    Raises:
        ConfigError: a count is no whole number of at least 1, or `tp` or `slots` do not fit the cards.
    """

    name: str
    nodes: int
    tp: int
    slots: int
    card: Card
    gpus: int = 8
    once_per: OncePer = "node"
    imbalance: float = 1.0
    micro_batches: int = 2

    def __post_init__(self) -> None:
        for name in ("nodes", "tp", "slots", "gpus", "micro_batches"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} = {value!r} must be a whole number of at least 1")
        _require_above_0("imbalance", self.imbalance)
        if self.imbalance < 1:
            raise ConfigError(
                f"imbalance = {self.imbalance} must be at least 1: the busiest card has at least the mean"
            )
        if self.n_gpus % self.tp:
            raise ConfigError(f"tp = {self.tp} must divide the {self.n_gpus} cards of the unit")
        if self.slots % self.n_gpus:
            raise ConfigError(f"slots = {self.slots} must be divisible by the {self.n_gpus} cards: all hold as many")
        if self.micro_batches > 2:
            raise ConfigError(f"micro_batches = {self.micro_batches} must be 1 or 2")
        if self.once_per not in ("node", "expert"):
            raise ConfigError(f"once_per = {self.once_per!r} is not known here: use node or expert")

    @property
    def n_gpus(self) -> int:
        return self.nodes * self.gpus

    @property
    def dp(self) -> int:
        """Groups of cards that each have an attention of their own."""
        return self.n_gpus // self.tp


def _require_above_0(name: str, value: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value < float("inf")
    if not (is_number and value > 0):
        raise ConfigError(f"{name} = {value!r} must be a number above 0")


# The peaks of the data sheet and the report's wires (section 3.2): FP8 products run twice as fast as BF16 ones.
H800_CARD = Card(
    name="H800",
    fp8=2 * H800.flops_per_second,
    bf16=H800.flops_per_second,
    memory_rate=H800.bytes_per_second,
    network=NETWORK_SPEED,
    inside=INSIDE_SPEED,
    memory=80e9,
)

# The report's units. Decoding sends a vector straight to each expert: 320 cards hold one expert each, five to a group.
PREFILL = Unit("prefill", nodes=4, tp=4, slots=256 + 32, card=H800_CARD)
DECODE = Unit("decode", nodes=40, tp=4, slots=320, card=H800_CARD, once_per="expert")
