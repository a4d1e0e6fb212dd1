"""A prefix that is read once gives what reading it each time gives, and is read once."""

from __future__ import annotations

from typing import Any

import pytest
from random_models import nano, random_model, random_tokens
from torch import Tensor

from dsv3_mini.errors import ConfigError, DataError
from dsv3_mini.inference import Prefix, complete
from dsv3_mini.inference.writing import Reader
from dsv3_mini.model import DeepSeekV3

PREFIX = [3, 1, 4, 1, 5, 2, 0, 5, 3]


def few_words(modules: int = 1) -> DeepSeekV3:
    return random_model(nano(vocab_size=6, num_nextn_predict_layers=modules))


def endings(lengths: list[int]) -> list[list[int]]:
    cfg = nano(vocab_size=6)
    return [PREFIX + random_tokens(cfg, 1, n, seed=i)[0].tolist() if n else PREFIX for i, n in enumerate(lengths)]


@pytest.mark.parametrize("more", [{}, dict(use_mtp=True), dict(use_mtp=True, drafts=1), dict(use_mtp=True, drafts=4)])
@pytest.mark.parametrize("modules", [1, 3])
def test_prompts_go_on_from_it_as_if_they_were_read_whole(modules: int, more: dict[str, Any]) -> None:
    model = few_words(modules)
    prefix = Prefix(model, PREFIX, use_mtp=bool(more))
    for lengths in ([0, 5, 2], [7], [0, 0], [1, 12, 3, 3]):  # again and again: a fork leaves it as it was
        prompts = endings(lengths)
        assert complete(model, prompts, 15, prefix=prefix, **more) == complete(model, prompts, 15)


@pytest.mark.parametrize("modules", [1, 3])
def test_drafts_behind_a_prefix_hold_as_often(modules: int) -> None:
    from dsv3_mini.inference.settings import Settings
    from dsv3_mini.inference.writing import Writing

    model, prompts = few_words(modules), endings([0, 5, 2])
    settings = [
        Settings(use_mtp=True, max_new_tokens=30, prefix=p) for p in (None, Prefix(model, PREFIX, use_mtp=True))
    ]
    without, with_prefix = (Writing(model, prompts, each).finish().counts for each in settings)
    assert with_prefix == without and with_prefix.held[0] > 0


def test_it_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = few_words(), []
    original = Reader.read

    def watched(self: Reader, tokens: Tensor) -> Tensor:
        read.append(tuple(tokens.shape))
        return original(self, tokens)

    monkeypatch.setattr(Reader, "read", watched)
    prefix = Prefix(model, PREFIX)
    complete(model, endings([4, 4]), 3, prefix=prefix)
    complete(model, endings([0]), 1, prefix=prefix)
    assert read == [(1, 8), (2, 5), (2, 1), (2, 1), (1, 1)]


def test_mistakes_are_one_line() -> None:
    model = few_words()
    prefix = Prefix(model, PREFIX)
    for prompts, more, kind, words in (
        ([PREFIX, [3, 1, 4]], {}, DataError, "prompt 1 does not begin with the prefix of 9 tokens"),
        ([PREFIX], dict(use_mtp=True), ConfigError, "Prefix(..., use_mtp=True)"),
    ):
        with pytest.raises(kind) as caught:
            complete(model, prompts, 3, prefix=prefix, **more)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="another model"):
        complete(few_words(), [PREFIX], 3, prefix=prefix)
    for tokens, words in (([1], "at least two"), ([], "empty"), ([1, 6], "token id 6"), ([1, 2.0], "2.0")):
        with pytest.raises(DataError, match=words):
            Prefix(model, tokens)
    assert prefix._reader.lengths == [8]


@pytest.mark.parametrize("modules", [1, 3])
@pytest.mark.parametrize("more", [{}, dict(use_mtp=True)], ids=["plain", "drafting"])
def test_it_grows_turn_by_turn_and_reads_only_what_is_new(
    modules: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grown in four steps, one of them nothing: the same text and as many drafts that hold as if it was read at once."""
    model, text = few_words(modules), endings([14])[0]
    grown, steps = Prefix(model, text[:4], use_mtp=bool(more)), []
    for end in (7, 7, 8, len(text)):
        before = grown
        grown = before.extended(text[len(before.tokens) : end])
        assert before.read == len(before.tokens) - 1 and grown.tokens == text[:end] and grown.read == end - 1
        steps.append(grown)
    whole = Prefix(model, text, use_mtp=bool(more))
    for prefix in (steps[1], steps[-1], whole):  # an early one still is what it was
        assert complete(model, [text + [2]], 20, prefix=prefix, **more) == complete(model, [text + [2]], 20)

    from dsv3_mini.inference.watching import watch

    passes = [list(watch(model, text, max_new_tokens=20, prefix=p, **more)) for p in (None, whole, steps[-1])]
    assert passes[0] == passes[1] == passes[2]

    read: list[int] = []
    original = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, tokens: read.append(tokens.shape[1]) or original(self, tokens))
    steps[0].extended([1, 2, 3])
    assert read == [3]


def test_it_grows_no_further_than_the_context() -> None:
    model = few_words()
    prefix = Prefix(model, [1] * 250)
    with pytest.raises(DataError, match="max_position_embeddings = 256"):
        prefix.extended([1] * 6)
    with pytest.raises(DataError, match="token id 6 is not in the vocabulary"):
        prefix.extended([6])
