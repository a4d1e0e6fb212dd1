"""What a model is made of: every tensor of a config, by arithmetic alone.

Nothing here looks at the model code. A config becomes a list of tensor shapes, and every count in the ledger is a
sum over that list; that a built model holds the same number is then a test of both.

A *block* is a run of tensors (one attention, one expert, one layer). Each tensor has a kind:

    linear   a matrix that the FP8 recipe keeps in E4M3: attention, dense FFN, experts (report section 3.3)
    matrix   a matrix that stays in BF16: gate, output head, the MTP module's eh_proj
    lookup   the input embedding: a row is read, nothing is multiplied
    norm     the weight of an RMSNorm
    bias     the gate's correction bias: an FP32 buffer that training moves but no gradient reaches
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

from dsv3_mini.config import ModelConfig

Kind = Literal["linear", "matrix", "lookup", "norm", "bias"]

FP8_BLOCK = 128  # one FP32 scale for each 128 x 128 block of an FP8 weight


@dataclass(frozen=True)
class Tensor:
    """`copies` tensors of one shape ([out, in] for a matrix), of which a token meets `active`."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    copies: int = 1
    active: int = 1

    @property
    def total(self) -> int:
        return self.copies * prod(self.shape)

    @property
    def activated(self) -> int:
        return self.active * prod(self.shape)

    @property
    def fp8_scales(self) -> int:
        """FP32 scales that the FP8 form carries; a block at the edge may be ragged and has its scale all the same."""
        return self.copies * prod(ceil(size / FP8_BLOCK) for size in self.shape) if self.kind == "linear" else 0


@dataclass(frozen=True)
class Block:
    """A named run of tensors. `trainable` leaves out the gate biases, `total` counts them."""

    name: str
    tensors: tuple[Tensor, ...]

    def __getitem__(self, name: str) -> int:
        """Parameters in the tensors of that name, all copies together; 0 where the config has none."""
        return sum(tensor.total for tensor in self.tensors if tensor.name == name)

    @property
    def trainable(self) -> int:
        return sum(tensor.total for tensor in self.tensors if tensor.kind != "bias")

    @property
    def total(self) -> int:
        return sum(tensor.total for tensor in self.tensors)

    @property
    def activated(self) -> int:
        """Trainable parameters that take part in one token's forward pass."""
        return sum(tensor.activated for tensor in self.tensors if tensor.kind != "bias")

    @property
    def multiplied(self) -> int:
        """The activated parameters that stand in a matrix product: no lookups, no norms."""
        return sum(tensor.activated for tensor in self.tensors if tensor.kind in ("linear", "matrix"))


@dataclass(frozen=True)
class Parameters:
    """Every part of a model, and how often each stands in it.

    `dense_layer`, `moe_layer` and `mtp_module` are *one* layer or module each, also where the config has none of them.
    The live model shares embedding and head with its MTP modules; a shipped checkpoint repeats both in each module.
    """

    attention: Block
    dense_ffn: Block
    expert: Block
    shared_experts: Block
    gate: Block
    dense_layer: Block
    moe_layer: Block
    mtp_module: Block
    embedding: Block
    head: Block
    final_norm: Block
    dense_layers: int
    moe_layers: int
    mtp_modules: int

    @property
    def main_blocks(self) -> tuple[tuple[Block, int], ...]:
        """The main model (no MTP) as (block, times)."""
        layers = ((self.dense_layer, self.dense_layers), (self.moe_layer, self.moe_layers))
        return ((self.embedding, 1), *layers, (self.final_norm, 1), (self.head, 1))

    @property
    def live_blocks(self) -> tuple[tuple[Block, int], ...]:
        """The model as it trains: main model and MTP modules, embedding and head once."""
        return (*self.main_blocks, (self.mtp_module, self.mtp_modules))

    @property
    def shipped_blocks(self) -> tuple[tuple[Block, int], ...]:
        """The model as the released checkpoint stores it: each MTP module with its own copy of embedding and head."""
        return (*self.live_blocks, (self.embedding, self.mtp_modules), (self.head, self.mtp_modules))

    @property
    def main_trainable(self) -> int:
        return sum(times * block.trainable for block, times in self.main_blocks)

    @property
    def main(self) -> int:
        """The main model with its gate biases."""
        return sum(times * block.total for block, times in self.main_blocks)

    @property
    def mtp_unique(self) -> int:
        """All MTP modules, gate biases included, without the shared embedding and head."""
        return self.mtp_modules * self.mtp_module.total

    @property
    def mtp_shipped(self) -> int:
        return self.mtp_unique + self.mtp_modules * (self.embedding.total + self.head.total)

    @property
    def live_trainable(self) -> int:
        return sum(times * block.trainable for block, times in self.live_blocks)

    @property
    def live(self) -> int:
        """What a built `DeepSeekV3` holds: trainable parameters and gate biases, MTP included."""
        return self.main + self.mtp_unique

    @property
    def shipped(self) -> int:
        return self.main + self.mtp_shipped

    @property
    def gate_biases(self) -> int:
        return self.main - self.main_trainable

    @property
    def activated(self) -> int:
        """Activated per token in the main model, embedding and head counted (the report's 37B)."""
        return sum(times * block.activated for block, times in self.main_blocks)

    @property
    def activated_without_embedding(self) -> int:
        """Activated without the input embedding, whose row is looked up, not multiplied: the N of 6N."""
        return self.activated - self.embedding.activated

    @property
    def activated_mtp(self) -> int:
        """Activated in all MTP modules, each with its pass through the shared head."""
        return self.mtp_modules * (self.mtp_module.activated + self.head.activated)

    @property
    def multiplied(self) -> int:
        """The activated parameters of the main model that stand in a matrix product."""
        return sum(times * block.multiplied for block, times in self.main_blocks)


def count_parameters(cfg: ModelConfig) -> Parameters:
    """Every part of `cfg`, from report section 2.1 (MLA, DeepSeekMoE) and 2.2 (MTP)."""
    d = cfg.hidden_size
    attention = Block("attention", tuple(_attention(cfg)))
    dense_ffn = Block("dense FFN", _swiglu(d, cfg.intermediate_size))
    expert = Block("expert", _swiglu(d, cfg.moe_intermediate_size))
    # S shared experts always run together, so they are one SwiGLU of S times the width.
    shared_width = cfg.n_shared_experts * cfg.moe_intermediate_size
    shared = Block("shared experts", _swiglu(d, shared_width, "shared ") if shared_width else ())
    gate = Block("gate", tuple(_gate(cfg)))
    routed = _swiglu(d, cfg.moe_intermediate_size, "routed ", cfg.n_routed_experts, cfg.num_experts_per_tok)
    norms = (_norm("attention norm", d), _norm("ffn norm", d))
    moe_tensors = (*attention.tensors, *norms, *gate.tensors, *routed, *shared.tensors)
    projection = Tensor("eh_proj", (d, 2 * d), "matrix")  # eq. 21's M
    mtp_norms = (_norm("embedding norm", d), _norm("hidden norm", d), _norm("head norm", d))
    return Parameters(
        attention=attention,
        dense_ffn=dense_ffn,
        expert=expert,
        shared_experts=shared,
        gate=gate,
        dense_layer=Block("dense layer", (*attention.tensors, *norms, *dense_ffn.tensors)),
        moe_layer=Block("MoE layer", moe_tensors),
        mtp_module=Block("MTP module", (*moe_tensors, projection, *mtp_norms)),
        embedding=Block("embedding", (Tensor("embedding", (cfg.vocab_size, d), "lookup"),)),
        head=Block("output head", (Tensor("output head", (cfg.vocab_size, d), "matrix"),)),
        final_norm=Block("final norm", (_norm("final norm", d),)),
        dense_layers=cfg.first_k_dense_replace,
        moe_layers=cfg.num_hidden_layers - cfg.first_k_dense_replace,
        mtp_modules=cfg.num_nextn_predict_layers,
    )


def activated(cfg: ModelConfig, *, embedding: bool = True) -> int:
    """Parameters of the main model that take part in one token, with or without the input embedding."""
    parameters = count_parameters(cfg)
    return parameters.activated if embedding else parameters.activated_without_embedding


def _attention(cfg: ModelConfig) -> Iterator[Tensor]:
    """MLA, eqs 1-11. Keys and values share one down-projection, whose last qk_rope_head_dim rows are the rope key."""
    d, heads, latent = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank
    queries = heads * cfg.qk_head_dim
    if cfg.q_lora_rank is None:
        yield Tensor("q", (queries, d), "linear")
    else:
        yield Tensor("q_a", (cfg.q_lora_rank, d), "linear")
        yield _norm("q_norm", cfg.q_lora_rank)
        yield Tensor("q_b", (queries, cfg.q_lora_rank), "linear")
    yield Tensor("kv_a", (latent + cfg.qk_rope_head_dim, d), "linear")
    yield _norm("kv_norm", latent)
    yield Tensor("kv_b", (heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), latent), "linear")
    yield Tensor("o", (d, heads * cfg.v_head_dim), "linear")


def _gate(cfg: ModelConfig) -> Iterator[Tensor]:
    yield Tensor("gate", (cfg.n_routed_experts, cfg.hidden_size), "matrix")
    if cfg.topk_method == "noaux_tc":
        yield Tensor("gate bias", (cfg.n_routed_experts,), "bias")


def _swiglu(d: int, width: int, prefix: str = "", copies: int = 1, active: int = 1) -> tuple[Tensor, ...]:
    """down(silu(gate(x)) * up(x)): two matrices up, one down. The gate here is SwiGLU's own, not the router."""
    shapes = {"swiglu gate": (width, d), "up": (width, d), "down": (d, width)}
    return tuple(Tensor(prefix + name, shape, "linear", copies, active) for name, shape in shapes.items())


def _norm(name: str, width: int) -> Tensor:
    return Tensor(name, (width,), "norm")
