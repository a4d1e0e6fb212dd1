"""Lesson 12's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.checks import lesson_12 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.hub import Fp8Weight
from dsv3_mini.ledger import count_parameters
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.block import Block
from dsv3_mini.model.moe import MoE
from dsv3_mini.model.rope import rotations

Logits = tuple[Tensor, list[Tensor]]

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def block_in_a_loop(parts: nn.ModuleDict, x: Tensor, turn: Tensor) -> Tensor:
    stream = x.clone()
    for norm, part, more in (("input_layernorm", "self_attn", (turn,)), ("post_attention_layernorm", "mlp", ())):
        found = parts[part](parts[norm](stream), *more)
        stream += found[0] if type(found) is tuple else found
    return stream


def block_of_the_package(parts: nn.ModuleDict, x: Tensor, turn: Tensor) -> Tensor:
    own = Block(ModelConfig.preset("nano"), 2 if isinstance(parts["mlp"], MoE) else 0)
    own.load_state_dict(parts.state_dict())
    return own(x, turn)[0]


def forward_by_recursion(cfg: ModelConfig, parts: nn.ModuleDict, tokens: Tensor) -> Logits:
    """MTP at the positions of the tokens that it reads: RoPE sees distances only."""
    turn = rotations(cfg, torch.arange(tokens.shape[1]))

    def through(x: Tensor, layers: list[nn.Module]) -> Tensor:
        return through(layers[0](x, turn)[0], layers[1:]) if layers else x

    def deeper(hidden: Tensor, later: Tensor, modules: list[nn.Module], at: Tensor) -> list[Tensor]:
        if not modules or later.shape[1] == 0:
            return []
        hidden = modules[0](parts["embed_tokens"](later), hidden[:, :-1], at)[0]
        return [parts["lm_head"](hidden), *deeper(hidden, later[:, 1:], modules[1:], at[1:])]

    main = parts["norm"](through(parts["embed_tokens"](tokens), list(parts["layers"])))
    return parts["lm_head"](main), deeper(main, tokens[:, 1:], list(parts["mtp"]), turn[1:])


def forward_row_by_row(cfg: ModelConfig, parts: nn.ModuleDict, tokens: Tensor) -> Logits:
    model = DeepSeekV3(cfg)
    model.load_state_dict(parts.state_dict())
    outs = [model(row[None]) for row in tokens]
    return torch.cat([out.logits for out in outs]), [
        torch.cat(d) for d in zip(*(o.mtp_logits for o in outs), strict=True)
    ]


def count_of_a_built_model(cfg: ModelConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = DeepSeekV3(cfg.replace(num_nextn_predict_layers=0))
    dense, sparse = model.layers[0], model.layers[-1]
    return {
        "attention": held(dense.self_attn),
        "dense FFN": held(dense.mlp),
        "expert": held(sparse.mlp.experts) // cfg.n_routed_experts,
        "gate": held(sparse.mlp.gate),
        "dense layer": held(dense),
        "sparse layer": held(sparse),
        "main": held(model),
    }


def held(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def count_by_steps(cfg: ModelConfig) -> dict[str, int]:
    """Written as sums over lists of shapes."""
    d, head = cfg.hidden_size, cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
    shapes = [(cfg.kv_lora_rank + cfg.qk_rope_head_dim, d), (1, cfg.kv_lora_rank)]
    shapes += [(cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.kv_lora_rank)]
    shapes += [(d, cfg.num_attention_heads * cfg.v_head_dim)]
    if cfg.q_lora_rank:
        shapes += [(cfg.q_lora_rank, d), (1, cfg.q_lora_rank), (cfg.num_attention_heads * head, cfg.q_lora_rank)]
    else:
        shapes += [(cfg.num_attention_heads * head, d)]
    out = {"attention": sum(a * b for a, b in shapes), "dense FFN": 3 * d * cfg.intermediate_size}
    out |= {"expert": 3 * d * cfg.moe_intermediate_size, "gate": cfg.n_routed_experts * d + cfg.n_routed_experts}
    out["dense layer"] = out["attention"] + out["dense FFN"] + d + d
    out["sparse layer"] = out["attention"] + out["gate"] + d + d
    out["sparse layer"] += sum(out["expert"] for _ in range(cfg.n_routed_experts + cfg.n_shared_experts))
    layers = ["sparse layer" if cfg.is_moe_layer(i) else "dense layer" for i in range(cfg.num_hidden_layers)]
    out["main"] = sum(out[kind] for kind in layers) + d + 2 * d * cfg.vocab_size
    return out


def dequantise_by_kron(q: Tensor, scale: Tensor) -> Tensor:
    return torch.kron(scale, torch.ones(128, 128))[: q.shape[0], : q.shape[1]] * q.to(torch.float32)


def dequantise_by_index(q: Tensor, scale: Tensor) -> Tensor:
    rows, columns = (torch.arange(side) // 128 for side in q.shape)
    return q.float() * scale[rows][:, columns]


def dequantise_of_the_package(q: Tensor, scale: Tensor) -> Tensor:
    return Fp8Weight(q, scale).dequantise()


def own_names(tensors: dict[str, Tensor], layer: int, part: str) -> list[str]:
    return [n for n in tensors if re.fullmatch(rf"model\.layers\.{layer}\.mlp\.experts\.\d+\.{part}\.weight", n)]


def stack_by_length_and_name(tensors: dict[str, Tensor], layer: int, part: str) -> Tensor:
    return torch.stack([tensors[n] for n in sorted(own_names(tensors, layer, part), key=lambda n: (len(n), n))])


def stack_into_place(tensors: dict[str, Tensor], layer: int, part: str) -> Tensor:
    names = own_names(tensors, layer, part)
    out = torch.empty(len(names), *tensors[names[0]].shape)
    for name in names:
        out[int(name.split(".experts.")[1].split(".")[0])] = tensors[name]
    return out


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.block, block_in_a_loop),
    (check.block, block_of_the_package),
    (check.forward, forward_by_recursion),
    (check.forward, forward_row_by_row),
    (check.count, count_of_a_built_model),
    (check.count, count_by_steps),
    (check.dequantise, dequantise_by_kron),
    (check.dequantise, dequantise_by_index),
    (check.dequantise, dequantise_of_the_package),
    (check.stack_experts, stack_by_length_and_name),
    (check.stack_experts, stack_into_place),
]


@pytest.fixture(scope="module", autouse=True)
def meta_is_loaded() -> None:
    """Torch's first tensor on meta imports sympy: on a busy machine that alone takes longer than a check allows."""
    with torch.device("meta"):
        DeepSeekV3(ModelConfig.preset("nano"))


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def attend(parts: nn.ModuleDict, x: Tensor, turn: Tensor) -> Tensor:
    return parts["self_attn"](x, turn)


def feed(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    fed = parts["mlp"](x)
    return fed[0] if isinstance(fed, tuple) else fed


def n1(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    return parts["input_layernorm"](x)


def n2(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    return parts["post_attention_layernorm"](x)


def first_row(parts: nn.ModuleDict, x: Tensor, turn: Tensor) -> Tensor:
    x = x + attend(parts, n1(parts, x), turn)
    return x + parts["mlp"](n2(parts, x))[0]


def forward_with(
    step: Callable[..., Tensor] = lambda module, ahead, hidden, turn, **_: module(ahead, hidden, turn)[0],
    layers: Callable[..., Tensor] | None = None,
    last: Callable[[nn.ModuleDict, Tensor], Tensor] = lambda parts, x: parts["norm"](x),
    handed: Callable[[nn.ModuleDict, Tensor], Tensor] | None = None,
    ahead: Callable[[Tensor, int], Tensor] = lambda e, j: e[:, j:],
    before: Callable[[Tensor, int], Tensor] = lambda h, kept: h[:, :kept],
    read: Callable[..., Tensor] = lambda parts, joined, hidden: hidden,
    positions: bool = True,
) -> Callable[..., Logits]:
    """The forward pass with one piece exchanged."""

    def answer(cfg: ModelConfig, parts: nn.ModuleDict, tokens: Tensor) -> Logits:
        e = x = parts["embed_tokens"](tokens)
        turn = rotations(cfg, torch.arange(tokens.shape[1]) * int(positions))
        for layer in parts["layers"]:
            x = layer(e if layers else x, turn)[0]
        main = last(parts, x)
        start = hidden = handed(parts, x) if handed else main
        out = []
        for j, module in enumerate(parts["mtp"], start=1):
            kept = tokens.shape[1] - j
            if kept > 0:
                joined = before(hidden, kept)
                hidden = step(module, ahead(e, j)[:, :kept], joined, turn[:kept], start=before(start, kept))
                out.append(parts["lm_head"](read(parts, joined, hidden)))
        return parts["lm_head"](main), out

    return answer


def assembled(cfg: ModelConfig, **changed: int) -> dict[str, int]:
    """From the ledger's parts, some of them changed."""
    own = count_parameters(cfg)
    v = dict(attention=own.attention.total, ffn=own.dense_ffn.total, expert=own.expert.total, gate=own.gate.total)
    v |= dict(shared=cfg.n_shared_experts, norms=2, final=cfg.hidden_size, tables=2, dense=cfg.first_k_dense_replace)
    v |= {"sparse": cfg.num_hidden_layers - changed.get("dense", cfg.first_k_dense_replace), **changed}
    dense = v["attention"] + v["ffn"] + v["norms"] * cfg.hidden_size
    sparse = v["attention"] + v["gate"] + v["norms"] * cfg.hidden_size
    sparse += (cfg.n_routed_experts + v["shared"]) * v["expert"]
    main = v["tables"] * own.embedding.total + v["dense"] * dense + v["sparse"] * sparse + v["final"]
    names = ("attention", "dense FFN", "expert", "gate", "dense layer", "sparse layer", "main")
    return dict(zip(names, (v["attention"], v["ffn"], v["expert"], v["gate"], dense, sparse, main), strict=True))


def attention_off_by(difference: Callable[[ModelConfig], int]) -> Callable[[ModelConfig], dict[str, int]]:
    return lambda cfg: assembled(cfg, attention=count_parameters(cfg).attention.total + difference(cfg))


def one_query_matrix(cfg: ModelConfig) -> int:
    own = count_parameters(cfg).attention
    return cfg.hidden_size * cfg.num_attention_heads * cfg.qk_head_dim - own["q_a"] - own["q_norm"] - own["q_b"]


def two_matrices(cfg: ModelConfig) -> dict[str, int]:
    own = count_parameters(cfg)
    return assembled(cfg, ffn=own.dense_ffn.total * 2 // 3, expert=own.expert.total * 2 // 3)


def spread(scale: Tensor, q: Tensor) -> Tensor:
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: q.shape[0], : q.shape[1]]


def equal_blocks(q: Tensor, scale: Tensor) -> Tensor:
    rows, columns = q.shape[0] // scale.shape[0], q.shape[1] // scale.shape[1]
    return q.float() * scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def in_order(tensors: dict[str, Tensor], layer: int, part: str) -> list[Tensor]:
    return list(stack_into_place(tensors, layer, part))


def prefix_without_the_dot(tensors: dict[str, Tensor], layer: int, part: str) -> Tensor:
    found = [n for n in tensors if f"layers.{layer}" in n and ".experts." in n and n.endswith(f"{part}.weight")]
    return torch.stack([tensors[n] for n in sorted(found, key=lambda n: int(n.split(".")[5]))])


def every_part(tensors: dict[str, Tensor], layer: int, part: str) -> Tensor:
    found = [n for n in tensors if n.startswith(f"model.layers.{layer}.mlp.experts.")]
    return torch.stack([tensors[n] for n in sorted(found, key=lambda n: int(n.split(".")[5]))])


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.block, first_row, "first row of the batch"),
    (check.block, lambda p, x, t: (y := x + attend(p, n2(p, x), t)) + feed(p, n1(p, y)), "norms are exchanged"),
    (check.block, lambda p, x, t: (y := x + attend(p, n1(p, x), t)) + feed(p, n1(p, y)), "a norm of its own"),
    (check.block, lambda p, x, t: (y := x + attend(p, x, t)) + feed(p, y), "the norms are missing"),
    (check.block, lambda p, x, t: feed(p, n2(p, attend(p, n1(p, x), t))), "nothing is added"),
    (check.block, lambda p, x, t: feed(p, n2(p, x + attend(p, n1(p, x), t))), "what mlp returns"),
    (check.block, lambda p, x, t: (y := attend(p, n1(p, x), t)) + feed(p, n2(p, y)), "what attention returns"),
    (check.block, lambda p, x, t: x + attend(p, n1(p, x), t) + feed(p, n2(p, x)), "as it came in: it is"),
    (check.block, lambda p, x, t: (z := n2(p, (y := n1(p, x)) + attend(p, y, t))) + feed(p, z), "overwrite the stream"),
    (check.block, lambda p, x, t: block_in_a_loop(p, x, t**0), "no positions"),
    (check.forward, forward_with(last=lambda parts, x: x), "the last norm is missing"),
    (check.forward, forward_with(layers=lambda: None), "every layer reads the embedding"),
    (check.forward, forward_with(positions=False), "the positions are missing"),
    (check.forward, forward_with(handed=lambda parts, x: x), "before the last norm"),
    (check.forward, forward_with(ahead=lambda e, j: e), "is not shifted"),
    (check.forward, forward_with(ahead=lambda e, j: e[:, 1:]), "one token further"),
    (check.forward, forward_with(before=lambda h, kept: h[:, h.shape[1] - kept :]), "lose their first positions"),
    (check.forward, forward_with(lambda module, ahead, hidden, turn, start: module(ahead, start, turn)[0]), "a chain"),
    (check.forward, forward_with(lambda module, ahead, hidden, turn, **_: module(hidden, ahead, turn)[0]), "embedding first"),
    (check.forward, forward_with(read=lambda parts, joined, hidden: parts["norm"](hidden)), "normed twice"),
    (check.forward, forward_with(read=lambda parts, joined, hidden: joined), "what goes into the module"),
    (check.count, attention_off_by(lambda cfg: -cfg.q_lora_rank - cfg.kv_lora_rank), "two norms inside"),
    (check.count, attention_off_by(one_query_matrix), "one matrix for the queries"),
    (check.count, attention_off_by(lambda cfg: cfg.hidden_size * cfg.qk_rope_head_dim * (cfg.num_attention_heads - 1)),
     "every head a turned key"),
    (check.count, attention_off_by(lambda cfg: -cfg.hidden_size * cfg.qk_rope_head_dim), "turned key is missing"),
    (check.count, attention_off_by(lambda cfg: cfg.kv_lora_rank * cfg.num_attention_heads * cfg.qk_rope_head_dim),
     "does not come from the latent"),
    (check.count, two_matrices, "three matrices"),
    (check.count, lambda cfg: assembled(cfg, shared=0), "shared experts are missing"),
    (check.count, lambda cfg: assembled(cfg, shared=1), "one shared expert"),
    (check.count, lambda cfg: assembled(cfg, gate=cfg.n_routed_experts * cfg.hidden_size), "biases are missing"),
    (check.count, lambda cfg: assembled(cfg, norms=0), "two norms of a layer are missing"),
    (check.count, lambda cfg: assembled(cfg, norms=1), "a layer has two norms"),
    (check.count, lambda cfg: assembled(cfg, final=0), "the last norm"),
    (check.count, lambda cfg: assembled(cfg, tables=1), "nothing is tied"),
    (check.count, lambda cfg: assembled(cfg, dense=0), "counted as a sparse one"),
    (check.count, lambda cfg: assembled(cfg, sparse=cfg.num_hidden_layers - cfg.first_k_dense_replace + 1), "MTP module"),
    (check.dequantise, lambda q, s: q.float() / spread(s, q), "you divide by the scale"),
    (check.dequantise, lambda q, s: q.float(), "are not used"),
    (check.dequantise, lambda q, s: q.float() * s.tile(128, 128)[: q.shape[0], : q.shape[1]], "again and again"),
    (check.dequantise, lambda q, s: q.float() * spread(s.mT, q), "is turned"),
    (check.dequantise, equal_blocks, "equally large"),
    (check.dequantise, lambda q, s: q.float() * spread(s[:, :1], q).expand(q.shape), "along the columns"),
    (check.dequantise, lambda q, s: q.float() * spread(s[:1], q)[:1].expand(q.shape), "down the rows"),
    (check.dequantise, lambda q, s: q.bfloat16() * spread(s, q).bfloat16(), "computed in BF16"),
    (check.dequantise, lambda q, s: q.float() * spread(s, q) / 448.0, "divide by 448"),
    (check.stack_experts, lambda w, layer, part: torch.stack([w[n] for n in sorted(own_names(w, layer, part))]),
     "this is still the bug"),
    (check.stack_experts, lambda w, layer, part: torch.stack([w[n] for n in own_names(w, layer, part)]), "dictionary's order"),
    (check.stack_experts, lambda w, layer, part: stack_into_place(w, layer, part).flip(0), "falling order"),
    (check.stack_experts, prefix_without_the_dot, "experts of other layers"),
    (check.stack_experts, every_part, "all three matrices"),
    (check.stack_experts, lambda w, layer, part: torch.stack(
        [*in_order(w, layer, part), w[f"model.layers.{layer}.mlp.shared_experts.{part}.weight"]]), "shared expert is among"),
    (check.stack_experts, lambda w, layer, part: torch.vstack(in_order(w, layer, part)), "end to end"),
    (check.stack_experts, lambda w, layer, part: torch.stack(in_order(w, layer, part), dim=-1), "on the last axis"),
]  # fmt: skip


def test_every_known_mistake_is_made_above() -> None:
    for exercise in exercises_of(check).values():
        tried = [hint for own, _, hint in WRONG if own is exercise]
        for mistake in exercise.mistakes:
            assert any(hint in mistake.hint for hint in tried), mistake.hint


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["block", "forward", "count", "dequantise", "stack_experts"]


def test_a_pair_taken_for_a_tensor_is_told_with_the_readers_line() -> None:
    def forgot_the_pair(parts: nn.ModuleDict, x: Tensor, turn: Tensor) -> Tensor:
        x = x + parts["self_attn"](parts["input_layernorm"](x), turn)
        return x + parts["mlp"](parts["post_attention_layernorm"](x))

    lines = "\n".join(check.block.run(forgot_the_pair).lines)
    assert "TypeError" in lines and 'x + parts["mlp"]' in lines


def test_a_count_that_is_off_by_the_biases_of_671b_is_wrong() -> None:
    """14,848 of 671 billion: no tolerance forgives them."""

    def nearly(cfg: ModelConfig) -> dict[str, int]:
        right = count_by_steps(cfg)
        return {**right, "main": right["main"] - (14_848 if cfg.hidden_size == 7168 else 0)}

    assert check.count.run(nearly).state == "wrong"


def test_the_671b_case_is_the_published_number() -> None:
    assert check.count.reference(ModelConfig.preset("671b"))["main"] == 671_026_419_200
