"""The dense baseline against models that others wrote, its loop against steps taken by hand, its ears against loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dsv3_mini.course.baseline import (
    Baseline,
    BaselineBlock,
    BaselineShape,
    NoResidualBlock,
    PostNormBlock,
    held_out_loss,
    signal_by_layer,
    story_batches,
    train_steps,
    write,
)
from dsv3_mini.data.packing import IGNORED, inputs_and_targets
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import ConfigError

SMALL = BaselineShape(vocab_size=61, width=24, layers=3, heads=3, ffn_width=40, context=19, eps=1e-3)


def random_weights(model: nn.Module) -> None:
    """Norms off one, so that a norm left out or taken twice shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand_like(parameter))


# ---- the model ---------------------------------------------------------------------------------------------------------


def torchs_attention(block: BaselineBlock, x: Tensor) -> Tensor:
    width, length = x.shape[-1], x.shape[1]
    torchs = nn.MultiheadAttention(width, block.attention.heads, bias=False, batch_first=True)
    torchs.load_state_dict(
        {"in_proj_weight": block.attention.qkv_proj.weight, "out_proj.weight": block.attention.o_proj.weight}
    )
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torchs(x, x, x, attn_mask=later, need_weights=False)[0]


def plain_feed_forward(block: BaselineBlock, x: Tensor) -> Tensor:
    gate, up = block.feed_forward.gate_up_proj.weight.chunk(2)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), block.feed_forward.down_proj.weight)


def plain_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, 1e-3)


def plain_model(model: Baseline, tokens: Tensor) -> Tensor:
    """Logits by torch's own modules, for each of the three arrangements."""
    x = F.embedding(tokens, model.embed_tokens.weight)
    x = x + torch.stack([model.embed_positions.weight[i] for i in range(tokens.shape[1])])
    for block in model.layers:
        parts = ((block.attention_norm, torchs_attention), (block.ffn_norm, plain_feed_forward))
        for norm, part in parts:
            if isinstance(block, PostNormBlock):
                x = plain_norm(norm, x + part(block, x))
            elif isinstance(block, NoResidualBlock):
                x = part(block, plain_norm(norm, x))
            else:
                x = x + part(block, plain_norm(norm, x))
    return plain_norm(model.norm, x) @ model.lm_head.weight.T


@pytest.mark.parametrize("block", [BaselineBlock, PostNormBlock, NoResidualBlock])
@pytest.mark.parametrize("length", [1, 7, 19])
def test_logits_are_those_of_torchs_modules(block: type[BaselineBlock], length: int) -> None:
    model = Baseline(SMALL, block)
    random_weights(model)
    tokens = torch.randint(0, 61, (2, length))
    torch.testing.assert_close(model(tokens), plain_model(model, tokens), rtol=1e-4, atol=1e-5)


def test_with_rope_it_is_a_llama() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = BaselineShape(vocab_size=61, width=24, layers=2, heads=3, ffn_width=40, context=19, rope_theta=500.0)
    ours = Baseline(shape)
    random_weights(ours)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="eager",
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    weights = {"model.embed_tokens": ours.embed_tokens, "model.norm": ours.norm, "lm_head": ours.lm_head}
    state = {f"{name}.weight": module.weight for name, module in weights.items()}
    for i, block in enumerate(ours.layers):
        query, key, value = block.attention.qkv_proj.weight.chunk(3)
        # Llama turns dimension j with j + q/2, the baseline (as DeepSeek-V3) neighbours.
        query, key = (rearrange(w, "(h pairs two) d -> (h two pairs) d", h=3, two=2) for w in (query, key))
        gate, up = block.feed_forward.gate_up_proj.weight.chunk(2)
        layer = {
            "self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": value,
            "self_attn.o_proj": block.attention.o_proj.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
            "mlp.down_proj": block.feed_forward.down_proj.weight, "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.ffn_norm.weight,
        }  # fmt: skip
        state |= {f"model.layers.{i}.{name}.weight": weight for name, weight in layer.items()}
    llama.load_state_dict(state)
    tokens = torch.randint(0, 61, (2, 17))
    torch.testing.assert_close(ours(tokens), llama(tokens).logits, rtol=1e-4, atol=1e-4)


def test_loss_is_torchs_and_leaves_padding_out() -> None:
    model = Baseline(SMALL)
    tokens, targets = torch.randint(0, 61, (2, 9)), torch.randint(0, 61, (2, 9))
    targets[1, 4:] = IGNORED
    torch.testing.assert_close(
        model.loss(tokens, targets), F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    )


def test_first_weights_are_one_over_the_root_of_the_width() -> None:
    model = Baseline(BaselineShape(width=64, layers=2))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(1 / 8, rel=0.05), name
        else:
            assert torch.equal(parameter, torch.ones(64)), name


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(width=96, heads=5), "heads = 5 must divide width (96)"),
        (dict(width=15, heads=3, rope_theta=1e4), "turns pairs"),
    ],
)
def test_shapes_that_cannot_be(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match="^heads = ") as error:
        BaselineShape(**fields)
    assert said in str(error.value)


# ---- training ----------------------------------------------------------------------------------------------------------


def test_each_step_is_adamw_with_warmup_and_clipping() -> None:
    batches = [(torch.randint(0, 61, (2, 9)), torch.randint(0, 61, (2, 9))) for _ in range(4)]
    torch.manual_seed(1)
    ours = Baseline(SMALL)
    taken = list(train_steps(ours, batches, learning_rate=0.1, warmup=3))

    torch.manual_seed(1)
    by_hand = Baseline(SMALL)
    first = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    for t, (tokens, targets) in enumerate(batches, start=1):
        by_hand.zero_grad()
        loss = F.cross_entropy(by_hand(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        assert (taken[t - 1].number, taken[t - 1].tokens) == (t, 18 * t)
        assert taken[t - 1].loss == pytest.approx(loss.item(), abs=1e-3)
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in by_hand.parameters()))
        assert norm > 1, "clipping is to be seen"
        rate = 0.1 * min(1, t / 3)
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                grad = p.grad / norm
                first[name] = 0.9 * first[name] + 0.1 * grad
                second[name] = 0.95 * second[name] + 0.05 * grad**2
                step = first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
                p.copy_(p - rate * 0.1 * p - rate * step)
    for (name, ours_now), theirs in zip(ours.named_parameters(), by_hand.parameters(), strict=True):
        # Where a gradient is near 0 its sign is rounding's, and Adam makes a whole step of it: compare on the whole.
        off = (ours_now - theirs).norm() / theirs.norm()
        assert off < 0.01, name


def test_a_step_is_taken_when_it_is_asked_for() -> None:
    model = Baseline(SMALL)
    before = model.lm_head.weight.clone()
    steps = train_steps(model, itertools.repeat((torch.randint(0, 61, (2, 9)), torch.randint(0, 61, (2, 9)))))
    assert torch.equal(model.lm_head.weight, before)
    next(steps)
    assert not torch.equal(model.lm_head.weight, before)


def test_story_batches_are_the_same_every_time_and_hold_stories_only() -> None:
    tokenizer = Tokenizer.shipped()
    once, again, other = (story_batches(tokenizer, rows=2, seq_len=64, seed=seed) for seed in (0, 0, 1))
    for _ in range(20):  # more than one block of the stream
        (tokens, targets), (same_tokens, same_targets) = next(once), next(again)
        assert torch.equal(tokens, same_tokens) and torch.equal(targets, same_targets)
        assert not torch.equal(tokens, next(other)[0])
        kept = targets[:, :-1] != IGNORED
        assert torch.equal(tokens[:, 1:][kept], targets[:, :-1][kept])
        assert (targets[tokens == tokenizer.pad_id] == IGNORED).all()
    text = tokenizer.decode(i for i in tokens[0].tolist() if i not in (tokenizer.pad_id, tokenizer.eos_id))
    assert "Question:" in text and "fim" not in text
    for stream in (once, again, other):
        stream.close()


def test_held_out_loss_is_a_mean_over_all_tokens() -> None:
    tokenizer = Tokenizer.shipped()
    model = Baseline(BaselineShape(width=24, layers=1, heads=2, ffn_width=32, context=64))
    tokens, targets = inputs_and_targets(held_out_rows("stories", tokenizer, 64, 3).tokens, tokenizer.pad_id)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert held_out_loss(model, tokenizer, rows=3) == pytest.approx(expected.item(), rel=1e-5)


class Parrot(nn.Module):
    """Gives the likeliest next token from a table, and notes how long its inputs were."""

    def __init__(self, follows: dict[int, int], shape: BaselineShape) -> None:
        super().__init__()
        self.follows, self.shape, self.lengths = follows, shape, []

    def forward(self, tokens: Tensor) -> Tensor:
        self.lengths.append(tokens.shape[1])
        return F.one_hot(torch.tensor([[self.follows[i] for i in tokens[0].tolist()]]), 4096).float()


def test_write_takes_the_likeliest_until_the_text_or_the_context_ends() -> None:
    tokenizer = Tokenizer.shipped()
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    shape = BaselineShape(context=6)
    ends = Parrot({tokenizer.eos_id: a, a: b, b: tokenizer.eos_id}, shape)
    assert write(ends, tokenizer, "a") == "ab"
    assert ends.lengths == [2, 3]
    goes_on = Parrot({tokenizer.eos_id: a, a: b, b: a}, shape)
    assert write(goes_on, tokenizer, "a") == "ababa", "eos and five more fill the context"
    assert write(goes_on, tokenizer, "a", new_tokens=2) == "aba"


# ---- looking inside ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [BaselineBlock, PostNormBlock, NoResidualBlock])
def test_signal_is_what_loops_measure(block: type[BaselineBlock]) -> None:
    model = Baseline(SMALL, block)
    tokens, targets = torch.randint(0, 61, (2, 9)), torch.randint(0, 61, (2, 9))
    signal = signal_by_layer(model, tokens, targets)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks for layer in model.layers)

    for depth in range(SMALL.layers + 1):
        x = model.embed_tokens(tokens) + model.embed_positions.weight[:9]
        for layer in model.layers[:depth]:
            x = layer(x)
        state = x.detach().requires_grad_()
        x = state
        for layer in model.layers[depth:]:
            x = layer(x)
        F.cross_entropy(model.lm_head(model.norm(x)).flatten(0, 1), targets.flatten()).backward()
        assert signal.size[depth] == pytest.approx(state.square().mean().sqrt().item(), rel=1e-4)
        assert signal.gradient[depth] == pytest.approx(state.grad.square().mean().sqrt().item(), rel=1e-3)
        cosines = [
            F.cosine_similarity(row[i], row[j], dim=0).item()
            for row in state.detach()
            for i, j in itertools.combinations(range(9), 2)
        ]
        assert signal.likeness[depth] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
