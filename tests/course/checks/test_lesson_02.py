"""The checks of lesson 02: right answers of several kinds pass, each known mistake is told by its own hint."""

from __future__ import annotations

import codecs
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest

from dsv3_mini.course.checks import lesson_02 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.data.bpe import encode_with_ranks, train_bpe

Answer = Callable[..., Any]


def refused(exercise: Exercise, answer: Answer, hint: str) -> None:
    """Wrong, and what is said holds `hint` and no other mistake's."""
    result = exercise.run(answer)
    said = " ".join(result.lines)
    assert result.state == "wrong", f"{answer.__name__} was let through"
    assert hint in said, said
    hints = {mistake.hint for mistake in exercise.mistakes} | {each.hint for each in exercise.properties}
    assert sum(one in said for one in hints) == 1, said


def accepted(exercise: Exercise, answer: Answer) -> None:
    result = exercise.run(answer)
    assert result.state == "right", result


def blank(*_: Any) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("exercise", exercises_of(check).values(), ids=lambda exercise: exercise.name)
def test_a_blank_is_unsolved(exercise: Exercise) -> None:
    assert exercise.run(blank).state == "unsolved"


def test_the_exercises() -> None:
    assert list(exercises_of(check)) == ["count_pairs", "merge_pair", "encode_word", "split_joined", "stream_text"]


@pytest.mark.parametrize("exercise", exercises_of(check).values(), ids=lambda exercise: exercise.name)
def test_each_known_mistake_is_told_by_its_own_hint(exercise: Exercise) -> None:
    assert len(exercise.mistakes) >= 3
    for mistake in exercise.mistakes:
        refused(exercise, mistake.wrong, mistake.hint)


@pytest.mark.parametrize("exercise", exercises_of(check).values(), ids=lambda exercise: exercise.name)
def test_nothing_and_a_wrong_kind_of_thing_are_refused(exercise: Exercise) -> None:
    for answer in (lambda *_: None, lambda *_: 3, lambda *_: "text"):
        result = exercise.run(answer)
        assert result.state == "wrong" and len(result.lines) == 1


# ---- count_pairs -------------------------------------------------------------------------------------------------------


def test_count_pairs_accepts() -> None:
    def with_a_counter(words: dict[tuple[int, ...], int]) -> Counter[tuple[int, int]]:
        counts: Counter[tuple[int, int]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                counts[pair] += count
        return counts

    def by_index(words: dict[tuple[int, ...], int]) -> dict[tuple[int, int], int]:
        counts: dict[tuple[int, int], int] = {}
        for word in reversed(words):
            for i in range(1, len(word)):
                counts.setdefault((word[i - 1], word[i]), 0)
                counts[word[i - 1], word[i]] += words[word]
        return counts

    accepted(check.count_pairs, with_a_counter)
    accepted(check.count_pairs, by_index)


def test_count_pairs_refuses() -> None:
    def distinct_words(words: dict[tuple[int, ...], int]) -> Counter[tuple[int, int]]:
        return Counter(pair for word in words for pair in zip(word, word[1:], strict=False))

    def one_long_word(words: dict[tuple[int, ...], int]) -> Counter[tuple[int, int]]:
        ids = [id_ for word, count in words.items() for _ in range(count) for id_ in word]
        return Counter(zip(ids, ids[1:], strict=False))

    def range_too_short(words: dict[tuple[int, ...], int]) -> Counter[tuple[int, int]]:
        counts: Counter[tuple[int, int]] = Counter()
        for word, count in words.items():
            for i in range(len(word) - 2):
                counts[word[i], word[i + 1]] += count
        return counts

    refused(check.count_pairs, distinct_words, "each distinct word once")
    refused(check.count_pairs, one_long_word, "two different words")
    refused(check.count_pairs, range_too_short, "the last pair of each word is missing")


# ---- merge_pair --------------------------------------------------------------------------------------------------------


def test_merge_pair_accepts() -> None:
    def with_an_iterator(word: tuple[int, ...], pair: tuple[int, int], token: int) -> list[int]:
        merged: list[int] = []
        can_merge = False
        for id_ in word:
            if can_merge and (merged[-1], id_) == pair:
                merged[-1] = token
                can_merge = False
            else:
                merged.append(id_)
                can_merge = True
        return merged

    def with_a_regex(word: tuple[int, ...], pair: tuple[int, int], token: int) -> tuple[int, ...]:
        spelled = "".join(f"<{id_}>" for id_ in word)
        spelled = spelled.replace(f"<{pair[0]}><{pair[1]}>", f"<{token}>")
        return tuple(int(id_) for id_ in re.findall(r"\d+", spelled))

    accepted(check.merge_pair, with_an_iterator)
    accepted(check.merge_pair, with_a_regex)


def test_merge_pair_refuses() -> None:
    def a_for_loop(word: tuple[int, ...], pair: tuple[int, int], token: int) -> list[int]:
        merged = []
        for i in range(len(word)):
            merged.append(token if word[i : i + 2] == pair else word[i])
        return merged

    def once(word: tuple[int, ...], pair: tuple[int, int], token: int) -> tuple[int, ...]:
        for i in range(len(word) - 1):
            if word[i : i + 2] == pair:
                return (*word[:i], token, *word[i + 2 :])
        return word

    def from_behind(word: tuple[int, ...], pair: tuple[int, int], token: int) -> list[int]:
        merged, i = list(word), len(word) - 2
        while i >= 0:
            if tuple(merged[i : i + 2]) == pair:
                merged[i : i + 2] = [token]
            i -= 1
        return merged

    refused(check.merge_pair, a_for_loop, "the right half of the pair is still there")
    refused(check.merge_pair, once, "only the first of the pairs")
    refused(check.merge_pair, from_behind, "you merge from the right")


# ---- encode_word -------------------------------------------------------------------------------------------------------


def test_encode_word_accepts() -> None:
    def with_ids(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
        """As training does: for each merge, oldest first, all its occurrences at once."""
        parts = [bytes([byte]) for byte in word]
        for token in sorted(ranks, key=ranks.__getitem__):
            i = 0
            while token in word and i < len(parts) - 1:
                if parts[i] + parts[i + 1] == token:
                    parts[i : i + 2] = [token]
                i += 1
        return parts

    def recursive(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
        def glue(parts: list[bytes]) -> list[bytes]:
            pairs = [(ranks.get(a + b, 10**9), i) for i, (a, b) in enumerate(pairwise(parts))]
            rank, i = min(pairs, default=(10**9, 0))
            return parts if rank == 10**9 else glue([*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]])

        return glue([word[i : i + 1] for i in range(len(word))])

    accepted(check.encode_word, with_ids)
    accepted(check.encode_word, recursive)
    accepted(check.encode_word, encode_with_ranks)


def test_encode_word_refuses() -> None:
    def longest(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
        parts, start = [], 0
        while start < len(word):
            end = len(word)
            while word[start:end] not in ranks:
                end -= 1
            parts.append(word[start:end])
            start = end
        return parts

    def first_that_fits(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
        parts, i = [word[i : i + 1] for i in range(len(word))], 0
        while i < len(parts) - 1:
            if parts[i] + parts[i + 1] in ranks:
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
                i = 0
            else:
                i += 1
        return parts

    def highest_rank(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 1:
            unions = [ranks.get(a + b, -1) for a, b in pairwise(parts)]
            if max(unions) < 0:
                break
            i = unions.index(max(unions))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def last_of_equals(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
        parts = [word[i : i + 1] for i in range(len(word))]
        while unions := {ranks[a + b]: i for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks}:
            i = unions[min(unions)]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    refused(check.encode_word, longest, "you take the longest token")
    refused(check.encode_word, first_that_fits, "the first pair from the left")
    refused(check.encode_word, highest_rank, "the highest rank first")
    refused(check.encode_word, last_of_equals, "of equals the leftmost goes first")


def test_the_reference_of_encode_word_is_what_training_does() -> None:
    """A word of the training text has the tokens that training made of it."""
    vocab = train_bpe(["hidden hid den hidden ridden bidden hidden"], 262)
    ranks = {token: rank for rank, token in enumerate(vocab)}
    assert check.encode_word.reference(b" hidden", ranks) == encode_with_ranks(b" hidden", ranks)
    assert max(map(len, check.encode_word.reference(b" hidden", ranks))) > 3


# ---- split_joined ------------------------------------------------------------------------------------------------------

Joined = dict[int, list[int]]


def test_split_joined_accepts() -> None:
    def a_toss_for_every_token(ids: list[int], joined: Joined, rate: float, rng: random.Random) -> list[int]:
        split: list[int] = []
        for id_ in ids:
            toss = rng.random() < rate
            split.extend(joined.get(id_, [id_]) if toss else [id_])
        return split

    def the_other_end(ids: list[int], joined: Joined, rate: float, rng: random.Random) -> tuple[int, ...]:
        out: tuple[int, ...] = ()
        for id_ in ids:
            out += tuple(joined[id_]) if id_ in joined and rng.random() >= 1 - rate else (id_,)
        return out

    accepted(check.split_joined, a_toss_for_every_token)
    accepted(check.split_joined, the_other_end)


def test_split_joined_refuses() -> None:
    def appended(ids: list[int], joined: Joined, rate: float, rng: random.Random) -> list[Any]:
        split: list[Any] = []
        for id_ in ids:
            split.append(joined[id_] if id_ in joined and rng.random() < rate else id_)
        return split

    def one_toss(ids: list[int], joined: Joined, rate: float, rng: random.Random) -> list[int]:
        toss = rng.random() < rate
        return [part for id_ in ids for part in (joined[id_] if toss and id_ in joined else [id_])]

    def half_the_rate(ids: list[int], joined: Joined, rate: float, rng: random.Random) -> list[int]:
        two = lambda: rng.random() < rate and (rate == 1 or rng.random() < 0.5)  # noqa: E731
        return [part for id_ in ids for part in (joined[id_] if id_ in joined and two() else [id_])]

    def global_chance(ids: list[int], joined: Joined, rate: float, rng: random.Random) -> list[int]:
        return [part for id_ in ids for part in (joined[id_] if id_ in joined and random.random() < rate else [id_])]

    def own_seed(ids: list[int], joined: Joined, rate: float, rng: random.Random) -> list[int]:
        rng = random.Random(0)
        return [part for id_ in ids for part in (joined[id_] if id_ in joined and rng.random() < rate else [id_])]

    def inverted(ids: list[int], joined: Joined, rate: float, rng: random.Random) -> list[int]:
        return [part for id_ in ids for part in (joined[id_] if id_ in joined and rng.random() > rate else [id_])]

    refused(check.split_joined, appended, "a list of their own")
    refused(check.split_joined, one_toss, "One toss decides for the whole text")
    refused(check.split_joined, half_the_rate, "is not the rate")
    refused(check.split_joined, global_chance, "not random.random()")
    refused(check.split_joined, own_seed, "seeded anew in each call")
    refused(check.split_joined, inverted, "you split where the toss says keep")


# ---- stream_text -------------------------------------------------------------------------------------------------------


def test_stream_text_accepts() -> None:
    def incremental(tokens: Sequence[bytes]) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return [decoder.decode(token) for token in tokens]

    def by_hand(tokens: Sequence[bytes]) -> list[str]:
        pieces, held = [], b""
        for token in tokens:
            held += token
            text = ""
            while held:
                try:
                    text += held.decode()
                    held = b""
                except UnicodeDecodeError as error:
                    text += held[: error.start].decode()
                    if error.reason == "unexpected end of data":
                        held = held[error.start :]
                        break
                    text += "\ufffd"
                    held = held[error.end :]
            pieces.append(text)
        return pieces

    accepted(check.stream_text, incremental)
    accepted(check.stream_text, by_hand)


def test_stream_text_refuses() -> None:
    def the_bug(tokens: Sequence[bytes]) -> list[str]:
        return [token.decode("utf-8", errors="replace") for token in tokens]

    def swept_away(tokens: Sequence[bytes]) -> list[str]:
        return [token.decode("utf-8", errors="ignore") for token in tokens]

    def until_it_decodes(tokens: Sequence[bytes]) -> list[str]:
        pieces, held = [], b""
        for token in tokens:
            held += token
            try:
                pieces.append(held.decode())
                held = b""
            except UnicodeDecodeError:
                pieces.append("")
        return pieces

    def a_new_decoder_each_time(tokens: Sequence[bytes]) -> list[str]:
        return [codecs.getincrementaldecoder("utf-8")(errors="replace").decode(token, final=True) for token in tokens]

    def everything_each_time(tokens: Sequence[bytes]) -> list[str]:
        decoder, text, pieces = codecs.getincrementaldecoder("utf-8")(errors="replace"), "", []
        for token in tokens:
            text += decoder.decode(token)
            pieces.append(text)
        return pieces

    refused(check.stream_text, the_bug, "you still decode each token by itself")
    refused(check.stream_text, swept_away, "thrown away")
    refused(check.stream_text, until_it_decodes, "stops your stream for ever")
    refused(check.stream_text, a_new_decoder_each_time, "you still decode each token by itself")
    refused(check.stream_text, everything_each_time, "only what is new")
