"""Generation from the cache against the whole model run anew for every token, and sampling against its distribution."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from chi_square import p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import YARN, assert_routing_is_awake, nano, random_model, random_tokens
from torch import Tensor

from dsv3_mini.errors import ConfigError, DataError, UserError
from dsv3_mini.inference import generate
from dsv3_mini.inference.generate import choose, complete, stream
from dsv3_mini.model import DeepSeekV3


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(nano())


@torch.no_grad()
def greedy_without_cache(model: DeepSeekV3, tokens: Tensor, count: int) -> tuple[Tensor, float]:
    """The likeliest token by running everything again each time, and by how much the closest choice was won."""
    margin = float("inf")
    for _ in range(count):
        best = model(tokens).logits[:, -1].topk(2)
        margin = min(margin, (best.values[:, 0] - best.values[:, 1]).min().item())
        tokens = torch.cat([tokens, best.indices[:, :1]], dim=1)
    return tokens, margin


# ---- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, YARN, {"q_lora_rank": None}], ids=["plain", "yarn", "no q_lora"])
@pytest.mark.parametrize("length", [1, 9])
def test_cached_is_uncached_token_for_token(changes: dict[str, Any], length: int) -> None:
    model = random_model(nano(**changes))
    assert_routing_is_awake(model, random_tokens(model.cfg))
    prompts = random_tokens(model.cfg, rows=4, length=length)
    expected, margin = greedy_without_cache(model, prompts, 20)
    assert margin > 1e-4, "a choice that rounding decides would prove nothing"
    assert len(expected[:, length:].unique()) > 10, "a model that repeats itself would prove little"
    assert torch.equal(generate(model, prompts, 20), expected)


def test_rows_of_a_batch_do_not_meet(model: DeepSeekV3) -> None:
    prompts = random_tokens(model.cfg, rows=4, length=6)
    together = generate(model, prompts, 12)
    for i in range(4):
        assert torch.equal(generate(model, prompts[i : i + 1], 12)[0], together[i])


def test_the_context_can_be_filled_to_its_last_token() -> None:
    model = random_model(nano(max_position_embeddings=16))
    prompt = random_tokens(model.cfg, rows=1, length=5)
    assert torch.equal(generate(model, prompt, 11), greedy_without_cache(model, prompt, 11)[0])


def test_bf16_generates_from_a_bf16_cache() -> None:
    model = random_model(nano()).to(torch.bfloat16)
    out = generate(model, random_tokens(model.cfg, rows=2, length=5), 6)
    assert out.shape == (2, 11) and out.max() < model.cfg.vocab_size


# ---- stopping --------------------------------------------------------------------------------------------------------


def test_a_row_that_stopped_is_filled_up_and_the_others_go_on(model: DeepSeekV3) -> None:
    prompts = random_tokens(model.cfg, rows=4, length=6)
    free = generate(model, prompts, 16)[:, 6:]
    stop = free[1, 4].item()
    first = [row.index(stop) if stop in row else None for row in free.tolist()]
    assert None in first and 4 in first, "this prompt must stop one row and not all"
    stopped = generate(model, prompts, 16, stop_id=stop)[:, 6:]
    for row, was, at in zip(stopped.tolist(), free.tolist(), first, strict=True):
        assert row == (was if at is None else was[: at + 1] + [stop] * (15 - at))


def test_the_stream_ends_as_soon_as_every_row_has(model: DeepSeekV3) -> None:
    prompt = random_tokens(model.cfg, rows=1, length=6)
    free = generate(model, prompt, 16)[0, 6:].tolist()
    stop = free[7]
    expected = free[: free.index(stop) + 1]
    assert [int(token) for token in stream(model, prompt, 16, stop_id=stop)] == expected
    assert generate(model, prompt, 16, stop_id=stop)[0, 6:].tolist() == expected


def test_complete_is_one_prompt_at_a_time(model: DeepSeekV3) -> None:
    lengths = [3, 7, 3, 1, 7, 7, 2]
    prompts = [random_tokens(model.cfg, 1, n, seed=i)[0].tolist() for i, n in enumerate(lengths)]
    stop = generate(model, torch.tensor([prompts[1]]), 9)[0, 7 + 3].item()
    for stop_id in (None, stop):
        expected = []
        for prompt in prompts:
            new = greedy_without_cache(model, torch.tensor([prompt]), 9)[0][0, len(prompt) :].tolist()
            expected.append(new[: new.index(stop_id)] if stop_id in new else new)
        assert complete(model, prompts, 9, stop_id=stop_id) == expected
    assert len(expected[1]) <= 3, "the stop token and what follows it are no part of an answer"
    assert complete(model, [], 9) == []


@settings(max_examples=10)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 1000))
def test_a_ragged_batch_is_one_prompt_at_a_time(model: DeepSeekV3, lengths: list[int], new: int, seed: int) -> None:
    prompts = [random_tokens(model.cfg, 1, n, seed + i)[0].tolist() for i, n in enumerate(lengths)]
    stop = (7, 100, 311)
    assert complete(model, prompts, new, stop_id=stop) == [complete(model, [p], new, stop_id=stop)[0] for p in prompts]


@settings(max_examples=10)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 1000))
def test_with_a_generator_for_each_row_a_drawn_batch_is_too(
    model: DeepSeekV3, lengths: list[int], new: int, seed: int
) -> None:
    prompts = [random_tokens(model.cfg, 1, n, seed + i)[0].tolist() for i, n in enumerate(lengths)]

    def sources(rows: Iterable[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed + row) for row in rows]

    settings = dict(temperature=1.2, top_p=0.9, min_p=0.001, repetition_penalty=1.5)
    together = complete(model, prompts, new, generator=sources(range(len(prompts))), **settings)
    alone = [complete(model, [p], new, generator=sources([i]), **settings)[0] for i, p in enumerate(prompts)]
    assert together == alone


def test_any_of_several_stop_tokens_ends_a_row(model: DeepSeekV3) -> None:
    prompt = random_tokens(model.cfg, rows=1, length=6)
    free = generate(model, prompt, 16)[0, 6:].tolist()
    late, early = free[9], free[4]
    assert generate(model, prompt, 16, stop_id=[late, early])[0, 6:].tolist() == free[: free.index(early) + 1]
    assert complete(model, prompt, 16, stop_id={late, early}) == [free[: free.index(early)]]


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@torch.no_grad()
def test_samples_have_the_models_distribution(temperature: float) -> None:
    model = random_model(nano(vocab_size=12))
    prompt = random_tokens(model.cfg, rows=1, length=5)
    shares = (model(prompt).logits[0, -1].double() / temperature).softmax(-1)
    assert shares.min() * 4000 > 5 and shares.max() > 1.5 * shares.min(), (
        "a test on this distribution must mean something"
    )
    random = torch.Generator().manual_seed(0)
    sampled = generate(model, prompt.expand(4000, 5), 1, temperature, generator=random)[:, -1]
    counts = sampled.bincount(minlength=12)
    assert p_value(counts, shares) > 0.01
    other = (model(prompt).logits[0, -1].double() / (temperature * 1.5)).softmax(-1)
    assert p_value(counts, other) < 1e-4, "and the test tells another temperature"


@torch.no_grad()
def test_the_second_token_is_sampled_given_the_first() -> None:
    model = random_model(nano(vocab_size=6))
    prompt = random_tokens(model.cfg, rows=1, length=4)
    first = model(prompt).logits[0, -1].double().softmax(-1)
    extended = torch.cat([prompt.expand(6, 4), torch.arange(6)[:, None]], dim=1)
    second = model(extended).logits[:, -1].double().softmax(-1)
    joint = (first[:, None] * second).flatten()
    pairs = generate(model, prompt.expand(8000, 4), 2, 1.0, generator=torch.Generator().manual_seed(1))[:, -2:]
    counts = (6 * pairs[:, 0] + pairs[:, 1]).bincount(minlength=36)
    assert p_value(counts, joint) > 0.01
    assert p_value(counts, (first[:, None] * first).flatten()) < 1e-6


def test_a_generator_makes_sampling_repeatable(model: DeepSeekV3) -> None:
    prompts = random_tokens(model.cfg, rows=3, length=4)
    one, two, three = (
        generate(model, prompts, 10, 1.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45])
def test_towards_zero_sampling_becomes_the_likeliest(temperature: float) -> None:
    logits = 100 * torch.randn(50, 9)
    assert torch.equal(choose(logits, temperature, None), choose(logits, 0.0, None))
    assert torch.equal(choose(logits, 0.0, None), logits.argmax(-1))


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, settings, kind, words",
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, DataError, "give at least one token a row"),
        (torch.zeros(0, 3, dtype=torch.long), {}, DataError, "give at least one token a row"),
        (torch.zeros(3, dtype=torch.long), {}, DataError, "shape (3,)"),
        (torch.tensor([[1, -2]]), {}, DataError, "token id -2 is not in the vocabulary of 512"),
        (torch.tensor([[1, 512]]), {}, DataError, "token id 512"),
        (torch.tensor([[1.0, 2.0]]), {}, DataError, "whole numbers"),
        ([[1, 2], [3]], {}, DataError, "tokens is a list: give a tensor [b s]; complete() takes lists"),
        ("Tom", {}, DataError, "tokens is a str"),
        (torch.zeros(1, 250, dtype=torch.long), dict(max_new_tokens=7), DataError, "max_position_embeddings = 256"),
        (torch.tensor([[1]]), dict(max_new_tokens=0), ConfigError, "max_new_tokens = 0"),
        (torch.tensor([[1]]), dict(temperature=-0.1), ConfigError, "temperature = -0.1"),
        (torch.tensor([[1]]), dict(temperature=float("inf")), ConfigError, "temperature = inf"),
        (torch.tensor([[1]]), dict(temperature=float("nan")), ConfigError, "temperature = nan"),
    ],
)
def test_mistakes_are_one_line(tokens: Tensor, settings: dict[str, Any], kind: type[UserError], words: str) -> None:
    with pytest.raises(kind) as caught:
        generate(random_model(nano(vocab_size=512)), tokens, **settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_prompt_among_others_is_refused(model: DeepSeekV3) -> None:
    with pytest.raises(DataError, match="at least one token"):
        complete(model, [[1, 2], []], 4)


@pytest.mark.parametrize(
    "prompts, words",
    [
        (
            [torch.tensor([1, 2]), torch.tensor([1.0])],
            "prompt 1 is of shape (1,) and type torch.float32: give whole numbers",
        ),
        ([torch.tensor([True])], "torch.bool"),
        ([[1, 2], [3, 4.5]], "prompt 1 holds 4.5: give whole numbers"),
        ([[1], [2, "a"]], "prompt 1 holds 'a'"),
        ([torch.tensor([[1, 2]])], "prompt 0 is of shape (1, 2)"),
        ([[1], [2, 512]], "prompt 1: token id 512 is not in the vocabulary of 512"),
        ([[1], [2] * 250], "prompt 1 of 250 and max_new_tokens = 8"),
    ],
)
def test_a_wrong_prompt_of_a_batch_is_named(model: DeepSeekV3, prompts: list[Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        complete(model, prompts, 8)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_of_other_whole_numbers_are_read(model: DeepSeekV3) -> None:
    rows = [torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([4], dtype=torch.uint8), [5, 6]]
    assert complete(model, rows, 6) == complete(model, [[1, 2, 3], [4], [5, 6]], 6)
