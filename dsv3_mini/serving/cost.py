"""How long a unit's steps take: FLOPs and bytes from the ledger, divided by the rates of its cards.

A task takes as long as its products or its bytes, whichever is longer (the roofline of `ledger.decode`). Linear layers run in
FP8, one byte a weight; attention's core runs in BF16, as does the cache. Where we simplify:

- rates are peaks: no kernel reaches them, so a real unit is slower than this one
- work is spread evenly over the cards, but for the experts' (`imbalance`); every layer costs the mean of all layers
- the wires of attention's `tp` cards are not overlapped with anything; norms, softmax and routing are free
- head, shared experts and dense layers are split over `tp` cards like attention
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger import cache_per_token, count_parameters, flops_per_token
from dsv3_mini.ledger.decode import Machine, Work, decode_step, distinct_experts
from dsv3_mini.ledger.memory import BYTES
from dsv3_mini.serving.overlap import Layer, overlapped
from dsv3_mini.serving.unit import Unit

FP8_OF_BF16 = BYTES["fp8"] / BYTES["bf16"]  # the ledger's decode steps count BF16 bytes


class UnitCost:
    """Seconds and bytes of one unit that serves a model.

    Raises:
        ConfigError: the model's experts do not fit the slots, or its weights do not fit the memory.
    """

    def __init__(self, cfg: ModelConfig, unit: Unit) -> None:
        if unit.slots < cfg.n_routed_experts:
            raise ConfigError(f"slots = {unit.slots} must be at least the {cfg.n_routed_experts} experts of the model")
        self.cfg, self.unit = cfg, unit
        card = unit.card
        self._fp8, self._bf16 = (Machine(card.name, rate, card.memory_rate) for rate in (card.fp8, card.bf16))
        self._work = {work.name: work for work in decode_step(cfg, batch=1, context=1)}
        if self.cache_tokens < 1:
            raise ConfigError(
                f"memory = {card.memory:.3g} bytes hold no cache beside {self.weights_per_gpu:.3g} bytes of weights: "
                "use more cards in a unit"
            )

    # ---- memory ----

    @cached_property
    def weights_per_gpu(self) -> float:
        """Bytes of weights on one card, one byte a number: its share of everything but routed experts, and its experts."""
        parameters = count_parameters(self.cfg)
        expert = parameters.moe_layers * parameters.expert.total
        others = parameters.main - self.cfg.n_routed_experts * expert
        return BYTES["fp8"] * (others / self.unit.tp + self.unit.slots / self.unit.n_gpus * expert)

    @cached_property
    def cache_bytes_per_token(self) -> int:
        """Bytes that a token leaves on each of the `tp` cards of its group: all heads share the latent."""
        return cache_per_token(self.cfg).bytes("mla")

    @cached_property
    def cache_tokens(self) -> int:
        """Tokens whose latents fit in the unit, all groups together."""
        card = self.unit.card
        return self.unit.dp * int((card.usable * card.memory - self.weights_per_gpu) / self.cache_bytes_per_token)

    # ---- time ----

    def prefill(self, lengths: Sequence[int]) -> float:
        """Seconds for prompts of these lengths, read together."""
        core = sum(n * n for n in lengths) * self._core_flops
        return self._step(sum(lengths), Work("core", core / self.unit.n_gpus, 0.0))

    def decode(self, rows: int, context: int, new: int = 1) -> float:
        """Seconds for one step of `rows` requests.

        Args:
            context: tokens in the caches of all rows together, the new ones included.
            new: tokens that each row reads: 2 to try a drafted one as well.
        """
        over_cache, unit = self._work["attention over the cache"], self.unit
        # Each card reads its group's latents, whole, for its own share of the heads.
        core = Work("core", new * context * over_cache.flops / unit.n_gpus, context * over_cache.bytes / unit.dp)
        return self._step(rows * new, core)

    def layer(self, tokens: float, core: Work) -> Layer:
        """The mean layer of a step: `tokens` on the whole unit, and attention's core on each card."""
        unit, layers, tp = self.unit, self.cfg.num_hidden_layers, self.unit.tp
        attention = core.seconds(self._bf16)
        for name in ("attention's weights", "other weights"):
            whole = self._work[name]
            share = Work(name, tokens * whole.flops / unit.n_gpus, FP8_OF_BF16 * whole.bytes / tp)
            attention += share.seconds(self._fp8)
        attention += tokens / unit.dp * self.tensor_parallel_bytes / unit.card.inside
        sparse = self._sparse_layers
        vectors = tokens / unit.n_gpus * self.cfg.hidden_size * sparse
        wires = max(self.copies_between_nodes / unit.card.network, self.copies_inside / unit.card.inside)
        return Layer(
            attention=attention / layers,
            dispatch=BYTES["fp8"] * vectors * wires / layers,
            experts=self._experts(tokens) / layers,
            combine=BYTES["bf16"] * vectors * wires / layers,
        )

    def _step(self, tokens: float, core: Work) -> float:
        if self.unit.micro_batches == 1:
            return self.cfg.num_hidden_layers * self.layer(tokens, core).alone
        half = self.layer(tokens / 2, Work(core.name, core.flops / 2, core.bytes / 2))
        return overlapped(half, self.cfg.num_hidden_layers)

    def _experts(self, tokens: float) -> float:
        if "routed experts" not in self._work:
            return 0.0
        unit, whole = self.unit, self._work["routed experts"]
        visited = distinct_experts(self.cfg, tokens) / self.cfg.n_routed_experts
        held = unit.slots / unit.n_gpus
        flops = unit.imbalance * tokens * whole.flops / unit.n_gpus
        return Work(whole.name, flops, BYTES["fp8"] * held * visited * self._one_of_each_layer).seconds(self._fp8)

    # ---- wires ----

    @cached_property
    def copies_between_nodes(self) -> float:
        """Copies of a token's vector that leave its node in one layer, on average, experts chosen evenly."""
        away = 1 - 1 / self.unit.nodes
        if self.unit.once_per == "expert":
            return self.cfg.num_experts_per_tok * away
        return nodes_visited(self.cfg, self.unit.nodes) * away

    @cached_property
    def copies_inside(self) -> float:
        """Copies that are handed on between the cards of a node; sent straight to each expert, those that stay at home."""
        elsewhere = 1 - 1 / self.unit.gpus
        share = 1.0 if self.unit.once_per == "node" else 1 / self.unit.nodes
        return self.cfg.num_experts_per_tok * share * elsewhere

    @cached_property
    def tensor_parallel_bytes(self) -> float:
        """Bytes that each card of a group receives for a token, all layers: vectors gathered before attention, sums after."""
        each = BYTES["bf16"] * self.cfg.hidden_size * (self.unit.tp - 1) / self.unit.tp
        return 2 * each * self.cfg.num_hidden_layers

    @cached_property
    def _sparse_layers(self) -> int:
        return count_parameters(self.cfg).moe_layers

    @cached_property
    def _core_flops(self) -> float:
        """FLOPs of causal attention's core for each token and each token of its prompt."""
        return flops_per_token(self.cfg, 2).attention / 2

    @cached_property
    def _one_of_each_layer(self) -> int:
        """Numbers in one expert of every sparse layer."""
        return self._sparse_layers * count_parameters(self.cfg).expert.multiplied


def nodes_visited(cfg: ModelConfig, nodes: int) -> float:
    """Nodes that hold a token's experts, on average, when it takes each set of experts in its open groups equally often.

    Where groups do not fill the nodes evenly the limit to groups is no limit to nodes, and any experts are taken.
    """
    groups, size, k = cfg.n_group, cfg.n_routed_experts // cfg.n_group, cfg.num_experts_per_tok
    if groups % nodes:
        on_node = cfg.n_routed_experts / nodes
        missed = math.prod(1 - on_node / (cfg.n_routed_experts - i) for i in range(k))
        return nodes * (1 - max(0.0, missed))
    own, kept = groups // nodes, cfg.topk_group
    missed = 0.0
    for here in range(min(own, kept) + 1):  # open groups on the node
        chance = math.comb(own, here) * math.comb(groups - own, kept - here) / math.comb(groups, kept)
        missed += chance * math.comb((kept - here) * size, k) / math.comb(kept * size, k)
    return nodes * (1 - missed)
