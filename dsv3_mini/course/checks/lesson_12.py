"""Checks of lesson 12: a block of real parts, the whole forward pass, the count of its numbers, FP8 weights, stacked experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.checks.framework import Case, Exercise, Mistake
from dsv3_mini.course.divergences import wake
from dsv3_mini.ledger import count_parameters
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.rope import rotations

Inputs = Callable[[torch.Generator], tuple[Any, ...]]

# ---- models to check with ----------------------------------------------------------------------------------------------
# Made once: a case's inputs must be the same objects each time they are made, and modules are compared by identity.


def _config(mtp: int) -> ModelConfig:
    return ModelConfig.preset("nano", vocab_size=96, num_nextn_predict_layers=mtp, initializer_range=0.1)


@functools.cache
def _model(mtp: int) -> DeepSeekV3:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        return wake(DeepSeekV3(_config(mtp)))


@functools.cache
def _model_parts(mtp: int) -> nn.ModuleDict:
    return nn.ModuleDict(dict(_model(mtp).named_children()))


@functools.cache
def _block_parts(layer: int) -> nn.ModuleDict:
    return nn.ModuleDict(dict(_model(1).layers[layer].named_children()))


# ---- block -------------------------------------------------------------------------------------------------------------


def _block_inputs(layer: int, rows: int, length: int) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        cfg = _config(1)
        x = 2 * torch.randn(rows, length, cfg.hidden_size, generator=random)
        return _block_parts(layer), x, rotations(cfg, torch.arange(length))

    return inputs


def _reference_block(parts: nn.ModuleDict, x: Tensor, turn: Tensor) -> Tensor:
    middle = torch.add(x, parts["self_attn"](parts["input_layernorm"](x), turn))
    fed = parts["mlp"](parts["post_attention_layernorm"](middle))
    return torch.add(middle, fed[0] if isinstance(fed, tuple) else fed)


def _joined(
    parts: nn.ModuleDict,
    x: Tensor,
    turn: Tensor,
    *,
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
    normed: bool = True,
    added: tuple[bool, bool] = (True, True),
    in_turn: bool = True,
    on_the_stream: bool = False,
    take: Callable[[Any], Tensor] = lambda fed: fed[0] if isinstance(fed, tuple) else fed,
) -> Tensor:
    """A block with its mistakes as switches."""

    def read(name: str, stream: Tensor) -> Tensor:
        return parts[name](stream) if normed else stream

    x = read(norms[0], x) if on_the_stream else x
    seen = parts["self_attn"](x if on_the_stream else read(norms[0], x), turn)
    middle = x + seen if added[0] else seen
    middle = read(norms[1], middle) if on_the_stream else middle
    source = middle if in_turn else x
    fed = take(parts["mlp"](source if on_the_stream else read(norms[1], source)))
    return middle + fed if added[1] else fed


def _block_with(**wrong: Any) -> Callable[..., Tensor]:
    return lambda parts, x, turn: _joined(parts, x, turn, **wrong)


block = Exercise(
    name="block",
    reference=_reference_block,
    cases=[
        Case("a dense layer, 1 row of 3 tokens", _block_inputs(0, 1, 3)),
        Case("a dense layer, 2 rows of 5", _block_inputs(0, 2, 5)),
        Case("a sparse layer, 2 rows of 5", _block_inputs(2, 2, 5)),
    ],
    mistakes=[
        Mistake(
            _block_with(take=lambda fed: fed[0]),
            "fed[0] takes MoE's output out of its pair, but SwiGLU returns a plain tensor, and there [0] is the first row of "
            "the batch, added to every row. Ask which of the two you have: isinstance(fed, tuple)",
        ),
        Mistake(
            _block_with(norms=("post_attention_layernorm", "input_layernorm")),
            "the two norms are exchanged: input_layernorm stands before attention, post_attention_layernorm before mlp",
        ),
        Mistake(
            _block_with(norms=("input_layernorm", "input_layernorm")),
            "mlp reads through input_layernorm: it has a norm of its own, post_attention_layernorm",
        ),
        Mistake(
            _block_with(normed=False),
            "the norms are missing: each part reads the stream through its norm",
        ),
        Mistake(
            _block_with(added=(False, False)),
            "nothing is added: each part replaces the stream by its output. It is x + part(norm(x)), twice",
        ),
        Mistake(
            _block_with(added=(True, False)),
            "what mlp returns replaces the stream: add it to x",
        ),
        Mistake(
            _block_with(added=(False, True)),
            "what attention returns replaces the stream: add it to x",
        ),
        Mistake(
            _block_with(in_turn=False),
            "mlp reads the stream as it came in: it is to read what attention has added already",
        ),
        Mistake(
            _block_with(on_the_stream=True),
            "the norms overwrite the stream: give the normed copy to the part only, and add what comes back to x as it was",
        ),
        Mistake(
            lambda parts, x, turn: _joined(parts, x, torch.ones_like(turn)),
            "attention gets no positions: hand it turn as it came in",
        ),
    ],
)


# ---- forward -----------------------------------------------------------------------------------------------------------


def _forward_inputs(mtp: int, rows: int, length: int) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        tokens = torch.randint(0, 96, (rows, length), generator=random)
        return _config(mtp), _model_parts(mtp), tokens

    return inputs


def _reference_forward(cfg: ModelConfig, parts: nn.ModuleDict, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The package's model with these weights."""
    model = DeepSeekV3(cfg)
    model.load_state_dict(parts.state_dict())
    out = model(tokens)
    return out.logits, out.mtp_logits


def _run(
    cfg: ModelConfig,
    parts: nn.ModuleDict,
    tokens: Tensor,
    *,
    turned: bool = True,
    stacked: bool = True,
    normed: bool = True,
    raw_to_mtp: bool = False,
    chained: bool = True,
    shift: str = "depth",
    front: bool = True,
    swapped: bool = False,
    norm_again: bool = False,
    from_input: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The whole forward pass with its mistakes as switches."""
    embedding, length, head = parts["embed_tokens"](tokens), tokens.shape[1], parts["lm_head"]
    turn = rotations(cfg, torch.arange(length))
    turn = turn if turned else torch.ones_like(turn)
    x = embedding
    for layer in parts["layers"]:
        x = layer(x if stacked else embedding, turn)[0]
    main = parts["norm"](x) if normed else x
    first = x if raw_to_mtp else main
    hidden, mtp_logits = first, []
    for depth, module in enumerate(parts["mtp"], start=1):
        kept = length - depth
        if kept < 1:
            break
        ahead = {"depth": embedding[:, depth:], "none": embedding[:, :kept], "one": embedding[:, 1 : 1 + kept]}[shift]
        before = hidden if chained else first
        before = before[:, :kept] if front else before[:, -kept:]
        hidden = module(*((before, ahead) if swapped else (ahead, before)), turn[:kept])[0]
        read = before if from_input else hidden
        mtp_logits.append(head(parts["norm"](read) if norm_again else read))
    return head(main), mtp_logits


def _forward_with(**wrong: Any) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    return lambda cfg, parts, tokens: _run(cfg, parts, tokens, **wrong)


forward = Exercise(
    name="forward",
    reference=_reference_forward,
    cases=[
        Case("no MTP, 1 row of 4 tokens", _forward_inputs(0, 1, 4)),
        Case("one MTP module, 2 rows of 6", _forward_inputs(1, 2, 6)),
        Case("two MTP modules, 2 rows of 7", _forward_inputs(2, 2, 7)),
        Case("two MTP modules, but only 2 tokens", _forward_inputs(2, 1, 2)),
    ],
    mistakes=[
        Mistake(
            _forward_with(normed=False),
            "the last norm is missing: the head reads parts['norm'] of what the layers leave",
        ),
        Mistake(
            _forward_with(stacked=False),
            "every layer reads the embedding: each is to read what the layer before it returned",
        ),
        Mistake(
            _forward_with(turned=False),
            "the positions are missing: turn is rotations(cfg, torch.arange(s)), and every layer wants it",
        ),
        Mistake(
            _forward_with(raw_to_mtp=True),
            "MTP gets the state before the last norm: hand it the normed state, the one that the head reads",
        ),
        Mistake(
            _forward_with(shift="none"),
            "the embedding for MTP is not shifted: depth j reads beside the state at i the token at i + j, embedding[:, j:]",
        ),
        Mistake(
            _forward_with(shift="one"),
            "every depth reads one token further, and depth j wants j: embedding[:, depth:] keeps s - depth of them",
        ),
        Mistake(
            _forward_with(front=False),
            "the states lose their first positions: it is the tokens that lose their first (embedding[:, depth:]), the states "
            "lose their last (hidden[:, : s - depth])",
        ),
        Mistake(
            _forward_with(chained=False),
            "every MTP module starts from the main model's state: they are a chain, each reads what the one before it returned",
        ),
        Mistake(
            _forward_with(swapped=True),
            "the MTP module gets the state where it wants the embedding: embedding first, as the released weights have it (the "
            "report writes the state first)",
        ),
        Mistake(
            _forward_with(norm_again=True),
            "MTP's output is normed twice: the module has its own last norm inside, its output goes straight to the head",
        ),
        Mistake(
            _forward_with(from_input=True),
            "MTP's logits come from what goes into the module: the head is to read what comes out of it",
        ),
    ],
)


# ---- count -------------------------------------------------------------------------------------------------------------

_MICRO = ModelConfig(
    vocab_size=37, hidden_size=10, num_hidden_layers=5, first_k_dense_replace=2, intermediate_size=23,
    moe_intermediate_size=7, n_routed_experts=6, n_shared_experts=2, num_experts_per_tok=2, n_group=3, topk_group=2,
    num_attention_heads=3, q_lora_rank=9, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=8,
    max_position_embeddings=64, rope_scaling=None,
)  # fmt: skip


def _reference_count(cfg: ModelConfig) -> dict[str, int]:
    """From the ledger's list of tensors."""
    own = count_parameters(cfg)
    return {
        "attention": own.attention.total,
        "dense FFN": own.dense_ffn.total,
        "expert": own.expert.total,
        "gate": own.gate.total,
        "dense layer": own.dense_layer.total,
        "sparse layer": own.moe_layer.total,
        "main": own.main,
    }


def _by_hand(
    cfg: ModelConfig,
    *,
    query_compressed: bool = True,
    latent_norms: bool = True,
    rope_key: str = "shared",
    keys_share_width: bool = False,
    matrices: int = 3,
    shared: int | None = None,
    bias: bool = True,
    layer_norms: int = 2,
    final_norm: bool = True,
    head: bool = True,
    dense: int | None = None,
    mtp: int = 0,
) -> dict[str, int]:
    """The count with its mistakes as switches."""
    d, heads, rank, latent = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank
    nope, rope, value = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    queries = heads * (nope + rope)
    if rank is None or not query_compressed:
        query = d * queries
    else:
        query = rank * (d + queries) + (rank if latent_norms else 0)
    rope_width = {"shared": rope, "each head": heads * rope, "none": 0}[rope_key]
    up = heads * ((nope + rope if keys_share_width else nope) + value)
    attention = query + d * (latent + rope_width) + (latent if latent_norms else 0) + latent * up + heads * value * d
    dense_ffn, expert = matrices * d * cfg.intermediate_size, matrices * d * cfg.moe_intermediate_size
    gate = cfg.n_routed_experts * (d + (1 if bias else 0))
    experts = cfg.n_routed_experts + (cfg.n_shared_experts if shared is None else shared)
    dense_layer = attention + layer_norms * d + dense_ffn
    sparse_layer = attention + layer_norms * d + gate + experts * expert
    first = cfg.first_k_dense_replace if dense is None else dense
    layers = first * dense_layer + (cfg.num_hidden_layers + mtp - first) * sparse_layer
    return {
        "attention": attention,
        "dense FFN": dense_ffn,
        "expert": expert,
        "gate": gate,
        "dense layer": dense_layer,
        "sparse layer": sparse_layer,
        "main": (2 if head else 1) * cfg.vocab_size * d + layers + (d if final_norm else 0),
    }


def _count_with(**wrong: Any) -> Callable[[ModelConfig], dict[str, int]]:
    return lambda cfg: _by_hand(cfg, **wrong)


count = Exercise(
    name="count",
    reference=_reference_count,
    cases=[
        Case("a config of small numbers", lambda random: (_MICRO,)),
        Case("queries that are not compressed (q_lora_rank None)", lambda random: (_MICRO.replace(q_lora_rank=None),)),
        Case("the preset tiny", lambda random: (ModelConfig.preset("tiny"),)),
        Case("the preset 671b", lambda random: (ModelConfig.preset("671b"),)),
    ],
    mistakes=[
        Mistake(
            _count_with(latent_norms=False),
            "attention has two norms inside, one behind each compression: q_lora_rank and kv_lora_rank numbers",
        ),
        Mistake(
            _count_with(query_compressed=False),
            "you count one matrix for the queries: they are compressed too, d to q_lora_rank and from there to the heads, with "
            "a norm in between (only where q_lora_rank is None it is one matrix)",
        ),
        Mistake(
            _count_with(rope_key="each head"),
            "you give every head a turned key of its own: all heads share one, qk_rope_head_dim wide",
        ),
        Mistake(
            _count_with(rope_key="none"),
            "the turned key is missing: the down-projection gives kv_lora_rank + qk_rope_head_dim numbers",
        ),
        Mistake(
            _count_with(keys_share_width=True),
            "the latent is projected up to the part of the key without position only (qk_nope_head_dim) and the value: the "
            "turned part of the key does not come from the latent",
        ),
        Mistake(
            _count_with(matrices=2),
            "a SwiGLU has three matrices: gate, up and down",
        ),
        Mistake(
            _count_with(shared=0),
            "the shared experts are missing from the sparse layer: n_shared_experts more, as wide as a routed one",
        ),
        Mistake(
            _count_with(shared=1),
            "you count one shared expert: it is n_shared_experts of them",
        ),
        Mistake(
            _count_with(bias=False),
            "the gate's biases are missing: one number for each routed expert. They are not trained, but they are stored, and "
            "671,026,419,200 counts them",
        ),
        Mistake(
            _count_with(layer_norms=0),
            "the two norms of a layer are missing: d numbers before attention, d before the feed-forward",
        ),
        Mistake(
            _count_with(layer_norms=1),
            "a layer has two norms: one before attention, one before the feed-forward",
        ),
        Mistake(
            _count_with(final_norm=False),
            "the last norm, between the layers and the head, is missing: d numbers",
        ),
        Mistake(
            _count_with(head=False),
            "embedding and output head are two matrices here: nothing is tied",
        ),
        Mistake(
            _count_with(dense=0),
            "every layer is counted as a sparse one: the first first_k_dense_replace are dense",
        ),
        Mistake(
            _count_with(mtp=1),
            "this counts the MTP module as one more layer: 'main' is the main model alone",
        ),
    ],
    tolerance=0,
)


# ---- dequantise --------------------------------------------------------------------------------------------------------


def _fp8_inputs(rows: int, columns: int) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        q = (60 * torch.randn(rows, columns, generator=random)).to(torch.float8_e4m3fn)
        grid = -(-rows // 128), -(-columns // 128)
        return q, 0.001 + torch.rand(*grid, generator=random)

    return inputs


def _reference_dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """Block by block."""
    weight = q.to(torch.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j].item()
    return weight


def _spread(scale: Tensor, shape: torch.Size, down: int = 128, across: int = 128) -> Tensor:
    wide = repeat(scale, "a b -> (a p) (b q)", p=down, q=across)[: shape[0], : shape[1]]
    if wide.shape != shape:
        raise ValueError("this mistake does not fit these shapes")
    return wide


def _stretched(q: Tensor, scale: Tensor) -> Tensor:
    """As if all blocks were of one size, ragged edge or not."""
    down, across = (side // blocks for side, blocks in zip(q.shape, scale.shape, strict=True))
    return q.float() * _spread(scale, q.shape, down, across)


dequantise = Exercise(
    name="dequantise",
    reference=_reference_dequantise,
    cases=[
        Case("one block", _fp8_inputs(128, 128)),
        Case("2 x 2 blocks", _fp8_inputs(256, 256)),
        Case("3 x 2 blocks, ragged at both edges", _fp8_inputs(300, 200)),
        Case("narrower than a block", _fp8_inputs(192, 96)),
    ],
    mistakes=[
        Mistake(
            lambda q, scale: q.float() / _spread(scale, q.shape),
            "you divide by the scale. The file calls it weight_scale_inv because it is the inverse of what the weight was "
            "multiplied with: to get back, multiply",
        ),
        Mistake(
            lambda q, scale: q.float(),
            "the scales are not used: q is the weight divided by its block's scale",
        ),
        Mistake(
            lambda q, scale: q.float() * scale.repeat(128, 128)[: q.shape[0], : q.shape[1]],
            "repeat lays the whole grid of scales out again and again, so neighbours get different scales. Each scale is to "
            'cover 128 neighbours: repeat_interleave, or the pattern "a b -> (a p) (b q)"',
        ),
        Mistake(
            lambda q, scale: q.float() * _spread(scale.T, q.shape),
            "the grid of scales is turned: its first axis runs down the rows of q, its second along the columns",
        ),
        Mistake(
            _stretched,
            "you make all blocks equally large; a block is 128 x 128 wherever it stands, and only the last ones are cut off "
            "by the edge: spread the scales first, then cut",
        ),
        Mistake(
            lambda q, scale: q.float() * _spread(scale[:, :1].expand_as(scale), q.shape),
            "every block of a row of blocks gets the first one's scale: there is one for each block along the columns, too",
        ),
        Mistake(
            lambda q, scale: q.float() * _spread(scale[:1].expand_as(scale), q.shape),
            "every row of blocks gets the first row's scales: there is one for each block down the rows, too",
        ),
        Mistake(
            lambda q, scale: (q.bfloat16() * _spread(scale, q.shape).bfloat16()).float(),
            "this is computed in BF16, which keeps 8 bits of each scale: multiply in FP32 (q.float()), and round at the end "
            "if at all",
        ),
        Mistake(
            lambda q, scale: q.float() * _spread(scale, q.shape) / 448,
            "you divide by 448 as well: the scale has that in it already (it is the block's largest number over 448)",
        ),
    ],
)


# ---- stack_experts (find the bug) --------------------------------------------------------------------------------------


def _stack_inputs(experts: int, layer: int, others: tuple[int, ...] = ()) -> Inputs:
    """A checkpoint's dictionary: some layers, their experts and the shared one, in no order."""

    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        names = [
            f"model.layers.{number}.mlp.{stem}.{part}.weight"
            for number in (layer, *others)
            for stem in (*(f"experts.{e}" for e in range(experts)), "shared_experts")
            for part in ("down_proj", "up_proj")
        ]
        order = torch.randperm(len(names), generator=random).tolist()
        return {names[i]: torch.randn(2, 3, generator=random) for i in order}, layer, "down_proj"

    return inputs


def _reference_stack(tensors: dict[str, Tensor], layer: int, part: str) -> Tensor:
    """Asked for by number, from 0 on, as long as there is one."""
    found: list[Tensor] = []
    while (name := f"model.layers.{layer}.mlp.experts.{len(found)}.{part}.weight") in tensors:
        found.append(tensors[name])
    return torch.stack(found)


def _own(tensors: dict[str, Tensor], layer: int, part: str) -> list[str]:
    stem = f"model.layers.{layer}.mlp.experts."
    return [name for name in tensors if name.startswith(stem) and name.endswith(f".{part}.weight")]


def _number(name: str) -> int:
    return int(name.split(".")[5])


def _stacked(names: list[str], tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([tensors[name] for name in names])


def _with_all_layers(tensors: dict[str, Tensor], layer: int, part: str) -> Tensor:
    names = [n for n in tensors if n.startswith(f"model.layers.{layer}") and ".mlp.experts." in n and part in n]
    return _stacked(sorted(names, key=_number), tensors)


def _with_the_shared(tensors: dict[str, Tensor], layer: int, part: str) -> Tensor:
    shared = [f"model.layers.{layer}.mlp.shared_experts.{part}.weight"]
    return _stacked(sorted(_own(tensors, layer, part), key=_number) + shared, tensors)


def _all_parts(tensors: dict[str, Tensor], layer: int, part: str) -> Tensor:
    stem = f"model.layers.{layer}.mlp.experts."
    return _stacked(sorted((n for n in tensors if n.startswith(stem)), key=_number), tensors)


stack_experts = Exercise(
    name="stack_experts",
    reference=_reference_stack,
    cases=[
        Case("8 experts", _stack_inputs(8, 3)),
        Case("12 experts", _stack_inputs(12, 3)),
        Case("16 experts in layer 1, beside layers 10 and 11", _stack_inputs(16, 1, (10, 11))),
    ],
    mistakes=[
        Mistake(
            lambda tensors, layer, part: _stacked(sorted(_own(tensors, layer, part)), tensors),
            "this is still the bug: names are sorted as text, and as text experts.10 stands before experts.2. Sort by the "
            "number in the name, int(...)",
        ),
        Mistake(
            lambda tensors, layer, part: _stacked(_own(tensors, layer, part), tensors),
            "the experts come in the dictionary's order, which is whatever order the files had: sort them by their number",
        ),
        Mistake(
            lambda tensors, layer, part: _stacked(sorted(_own(tensors, layer, part), key=_number)[::-1], tensors),
            "the experts come in falling order: row e of the router belongs to expert e, so number 0 comes first",
        ),
        Mistake(
            _with_all_layers,
            'experts of other layers are among them: "layers.1" is the beginning of "layers.10", too. Ask for the dot '
            "behind the number",
        ),
        Mistake(
            _all_parts,
            "all three matrices of each expert are among them: take those whose name ends with the part asked for",
        ),
        Mistake(
            _with_the_shared,
            'the shared expert is among them: it is no routed one. Its name holds ".mlp.shared_experts.", theirs '
            '".mlp.experts."',
        ),
        Mistake(
            lambda tensors, layer, part: torch.cat(
                [tensors[n] for n in sorted(_own(tensors, layer, part), key=_number)]
            ),
            "cat lays the matrices end to end, [e*o i]: stack gives them an axis of their own, [e o i]",
        ),
        Mistake(
            lambda tensors, layer, part: rearrange(
                _stacked(sorted(_own(tensors, layer, part), key=_number), tensors), "e o i -> o i e"
            ),
            "the experts are on the last axis: they belong on the first, [e o i]",
        ),
    ],
)
