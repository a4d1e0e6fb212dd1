"""Lesson 02, the tokenizer: pairs counted and merged, a word encoded, joined tokens split, a stream of tokens read."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import tiktoken
import torch

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property
from dsv3_mini.data.tokenizer import Tokenizer

Word = tuple[int, ...]
Pair = tuple[int, int]


def given(*inputs: Any) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """A case whose inputs are always the same; dicts and lists are made anew for each call."""
    return lambda _: tuple(type(each)(each) if isinstance(each, (dict, list)) else each for each in inputs)


# ---- count_pairs -----------------------------------------------------------------------------------------------------


def _count_pairs(words: Mapping[Word, int]) -> dict[Pair, int]:
    """Every word written out as often as it occurs, and its pairs counted one by one."""
    pairs = [(word[i], word[i + 1]) for word, n in words.items() for _ in range(n) for i in range(len(word) - 1)]
    return {pair: pairs.count(pair) for pair in set(pairs)}


def _without_the_words_counts(words: Mapping[Word, int]) -> dict[Pair, int]:
    return _count_pairs({word: 1 for word in words})


def _across_words(words: Mapping[Word, int]) -> dict[Pair, int]:
    return _count_pairs({tuple(token for word, n in words.items() for token in word * n): 1})


def _without_the_last(words: Mapping[Word, int]) -> dict[Pair, int]:
    return _summed(words, lambda word: list(pairwise(word))[:-1])


def _in_steps_of_two(words: Mapping[Word, int]) -> dict[Pair, int]:
    return _summed(words, lambda word: list(pairwise(word))[::2])


def _once_a_word(words: Mapping[Word, int]) -> dict[Pair, int]:
    return _summed(words, lambda word: sorted(set(pairwise(word))))


def _without_overlap(words: Mapping[Word, int]) -> dict[Pair, int]:
    def pairs(word: Word) -> list[Pair]:
        text = "".join(map(chr, word))
        return [pair for pair in set(pairwise(word)) for _ in range(text.count(chr(pair[0]) + chr(pair[1])))]

    return _summed(words, pairs)


def _sorted_pairs(words: Mapping[Word, int]) -> dict[Pair, int]:
    return _summed(words, lambda word: [(min(pair), max(pair)) for pair in pairwise(word)])


def _summed(words: Mapping[Word, int], pairs_of: Callable[[Word], Sequence[Pair]]) -> dict[Pair, int]:
    counts: Counter[Pair] = Counter()
    for word, n in words.items():
        for pair in pairs_of(word):
            counts[pair] += n
    return dict(counts)


def _random_words(generator: torch.Generator) -> tuple[dict[Word, int]]:
    lengths = torch.randint(1, 9, (30,), generator=generator).tolist()
    words = [tuple(torch.randint(97, 101, (length,), generator=generator).tolist()) for length in lengths]
    return ({word: 1 + i % 4 for i, word in enumerate(words)},)


count_pairs = Exercise(
    name="count_pairs",
    reference=_count_pairs,
    cases=[
        Case("one word of four tokens", given({(1, 2, 3, 4): 1})),
        Case("a word that occurs 5 times and one that occurs twice", given({(97, 98, 99): 5, (98, 97): 2})),
        Case("a word that holds a pair twice", given({(1, 2, 1, 2, 3): 3})),
        Case("a run of one token", given({(8, 7, 7, 7, 7, 9): 2})),
        Case("a word of one token, which has no pair", given({(5,): 9, (1, 2): 1})),
        Case("thirty random words", _random_words),
    ],
    mistakes=[
        Mistake(
            _without_the_words_counts,
            "you count each distinct word once: a word that occurs 5 times adds 5 to each of its pairs. The whole text is "
            "kept as distinct words with counts, so the count stands for the repetitions.",
        ),
        Mistake(
            _across_words,
            "you count a pair whose halves lie in two different words: the words are cut apart before merging starts, and "
            "no token may cross a cut. Count inside each word only.",
        ),
        Mistake(
            _without_the_last,
            "the last pair of each word is missing: a word of n tokens has n - 1 pairs, so the last left half is at index n - 2.",
        ),
        Mistake(
            _in_steps_of_two,
            "you go through the word in steps of two: neighbours overlap, in (a, b, c) both (a, b) and (b, c) are pairs.",
        ),
        Mistake(
            _once_a_word,
            "you count a pair once a word, however often it stands there: (a, b, a, b) holds (a, b) twice.",
        ),
        Mistake(
            _without_overlap,
            "in a run of equal tokens you skip the pairs that overlap: (a, a, a) holds (a, a) twice, at index 0 and at index 1. "
            "(Only one of the two can be merged, but that is the next step's business.)",
        ),
        Mistake(
            _sorted_pairs,
            "you take (a, b) and (b, a) for the same pair: the order matters, `th` and `ht` become different tokens.",
        ),
    ],
)


# ---- merge_pair ------------------------------------------------------------------------------------------------------


def _merge_pair(word: Word, pair: Pair, token: int) -> Word:
    """Python's own replace, which works from left to right and never overlaps, on a text with a character for each token."""
    text = "".join(map(chr, word)).replace(chr(pair[0]) + chr(pair[1]), chr(token))
    return tuple(map(ord, text))


def _first_only(word: Word, pair: Pair, token: int) -> Word:
    i = list(pairwise(word)).index(pair)
    return (*word[:i], token, *word[i + 2 :])


def _right_half_stays(word: Word, pair: Pair, token: int) -> Word:
    return tuple(token if word[i : i + 2] == pair else word[i] for i in range(len(word)))


def _from_the_right(word: Word, pair: Pair, token: int) -> Word:
    return _merge_pair(word[::-1], pair[::-1], token)[::-1]


def _either_order(word: Word, pair: Pair, token: int) -> Word:
    merged, i = [], 0
    while i < len(word):
        both = word[i : i + 2] in (pair, pair[::-1])
        merged.append(token if both else word[i])
        i += 2 if both else 1
    return tuple(merged)


def _last_is_lost(word: Word, pair: Pair, token: int) -> Word:
    merged, i = [], 0
    while i < len(word) - 1:
        merged.append(token if word[i : i + 2] == pair else word[i])
        i += 2 if word[i : i + 2] == pair else 1
    return tuple(merged)


def _overlapping(word: Word, pair: Pair, token: int) -> Word:
    merged: list[int] = []
    for i in range(len(word)):
        if word[i : i + 2] == pair:
            merged.append(token)
        elif i == 0 or word[i - 1 : i + 1] != pair:
            merged.append(word[i])
    return tuple(merged)


def _random_word(generator: torch.Generator) -> tuple[Word, Pair, int]:
    return tuple(torch.randint(97, 99, (40,), generator=generator).tolist()), (97, 98), 256


def _random_run(generator: torch.Generator) -> tuple[Word, Pair, int]:
    return tuple(torch.randint(97, 99, (40,), generator=generator).tolist()), (98, 98), 300


merge_pair = Exercise(
    name="merge_pair",
    reference=_merge_pair,
    cases=[
        Case("the pair in the middle of a word", given((5, 1, 2, 6), (1, 2), 300)),
        Case("the pair twice, once at the end", given((1, 2, 3, 1, 2), (1, 2), 300)),
        Case("a run of three", given((1, 1, 1), (1, 1), 300)),
        Case("its halves the other way round", given((2, 1, 5), (1, 2), 300)),
        Case("a word without the pair", given((1, 3, 2), (1, 2), 300)),
        Case("a word of one token", given((4,), (4, 4), 300)),
        Case("a random word", _random_word),
        Case("a random word with runs", _random_run),
    ],
    mistakes=[
        Mistake(
            _right_half_stays,
            "the right half of the pair is still there after the new token: the new token stands for both, so go on two places "
            "further, not one.",
        ),
        Mistake(
            _last_is_lost,
            "the word's last token is lost: where no pair begins, keep the token, also at the last place, which has no right neighbour.",
        ),
        Mistake(
            _first_only, "only the first of the pairs is merged: every occurrence in the word becomes the new token."
        ),
        Mistake(
            _from_the_right,
            "you merge from the right: in (a, a, a) the first two become the new token. From left to right is the convention; "
            "training and encoding must agree on it.",
        ),
        Mistake(
            _overlapping,
            "you use one token for two pairs: in (a, a, a) the middle one belongs to the first pair, and is gone when you come to "
            "the second. The merged word must spell the same bytes as before.",
        ),
        Mistake(_either_order, "you merge (b, a) as well: it is another pair and spells other bytes than (a, b)."),
    ],
)


# ---- encode_word -----------------------------------------------------------------------------------------------------


def _encode_word(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What tiktoken makes of the word."""
    encoding = tiktoken.Encoding("lesson", pat_str=r"(?s:.+)", mergeable_ranks=dict(ranks), special_tokens={})
    return [encoding.decode_single_token_bytes(id_) for id_ in encoding.encode_ordinary(word.decode())]


def _longest_first(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    parts = []
    while word:
        length = next(n for n in range(len(word), 0, -1) if word[:n] in ranks)
        parts.append(word[:length])
        word = word[length:]
    return parts


def _merged(
    word: bytes, ranks: Mapping[bytes, int], choose: Callable[[list[tuple[int, int]]], tuple[int, int]]
) -> list[bytes]:
    """Merge until nothing can be, at the place that `choose` takes from all (rank, place)."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while places := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
        i = choose(places)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _leftmost_first(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    return _merged(word, ranks, lambda places: places[0])


def _youngest_first(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    return _merged(word, ranks, lambda places: max(places, key=lambda place: (place[0], -place[1])))


def _rightmost_of_equals(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    return _merged(word, ranks, lambda places: min(places, key=lambda place: (place[0], -place[1])))


def _one_merge(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    parts = [word[i : i + 1] for i in range(len(word))]
    unions = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
    if unions:
        i = min(unions)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _one_sweep(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    parts, i = [], 0
    while i < len(word):
        two = word[i : i + 2]
        parts.append(two if two in ranks else word[i : i + 1])
        i += len(parts[-1])
    return parts


@cache
def _shipped_ranks() -> tuple[bytes, ...]:
    return tuple(Tokenizer.shipped().ranks)


def _with_shipped_ranks(word: bytes) -> Callable[[torch.Generator], tuple[bytes, dict[bytes, int]]]:
    return lambda _: (word, {token: rank for rank, token in enumerate(_shipped_ranks())})


SMALL_RANKS = {bytes([byte]): byte for byte in range(256)} | {b"he": 256, b"the": 257}
_ONCE = (
    "you pass over the word once only: each merge makes a new neighbour, which may go together with the next. "
    "Look again after every merge, until no two neighbours make a token."
)

encode_word = Exercise(
    name="encode_word",
    reference=_encode_word,
    cases=[
        Case("b'the', where he is token 256 and the is 257", given(b"the", SMALL_RANKS)),
        Case("one byte", given(b"x", SMALL_RANKS)),
        Case("b'database' and the shipped ranks", _with_shipped_ranks(b"database")),
        Case("b' selector' and the shipped ranks", _with_shipped_ranks(b" selector")),
        Case("b'===', where two pairs have one rank", _with_shipped_ranks(b"===")),
        Case("letters that take two bytes", _with_shipped_ranks(" naïvetés".encode())),
        Case("b'dataclasses'", _with_shipped_ranks(b"dataclasses")),
        Case("b' determination'", _with_shipped_ranks(b" determination")),
    ],
    mistakes=[
        Mistake(_one_merge, _ONCE),
        Mistake(_one_sweep, _ONCE),
        Mistake(
            _longest_first,
            "you take the longest token that the word begins with: BPE repeats its merges in the order in which they were learned, "
            "and may end with shorter ones. A model must see the tokens that it was trained on.",
        ),
        Mistake(
            _leftmost_first,
            "you merge the first pair from the left that makes a token: of all pairs in the word the one with the lowest rank goes first, "
            "wherever it stands.",
        ),
        Mistake(
            _youngest_first,
            "you merge the pair with the highest rank first: a rank is an age, the lowest was learned first and goes first (min, not max).",
        ),
        Mistake(
            _rightmost_of_equals,
            "where two pairs have the same rank you take the right one: of equals the leftmost goes first, as when training merged them.",
        ),
    ],
)


# ---- split_joined ----------------------------------------------------------------------------------------------------


class Coins(random.Random):
    """Equal to each other: an answer has to draw from them, and must not be told that it changed its input."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coins)

    __hash__ = random.Random.__hash__


Joined = Mapping[int, list[int]]


def _split_joined(ids: Sequence[int], joined: Joined, rate: float, rng: random.Random) -> list[int]:
    """Right for any rate; as a reference it is asked for the rates 0 and 1 alone, where chance has no say."""
    return [part for id_ in ids for part in (joined[id_] if id_ in joined and rng.random() < rate else [id_])]


def _nested(ids: Sequence[int], joined: Joined, rate: float, rng: random.Random) -> list[Any]:
    return [joined[id_] if id_ in joined and rng.random() < rate else id_ for id_ in ids]


def _token_stays(ids: Sequence[int], joined: Joined, rate: float, rng: random.Random) -> list[int]:
    return [part for id_ in ids for part in [id_, *(joined.get(id_, []) if rng.random() < rate else [])]]


def _turned_round(ids: Sequence[int], joined: Joined, rate: float, rng: random.Random) -> list[int]:
    return _split_joined(ids, joined, 1 - rate, rng)


def _one_split_only(ids: Sequence[int], joined: Joined, rate: float, rng: random.Random) -> list[int]:
    first = next(i for i, id_ in enumerate(ids) if id_ in joined)
    return [*ids[:first], *_split_joined(ids[first : first + 1], joined, rate, rng), *ids[first + 1 :]]


def _others_are_lost(ids: Sequence[int], joined: Joined, rate: float, rng: random.Random) -> list[int]:
    return [part for id_ in ids if id_ in joined for part in (joined[id_] if rng.random() < rate else [id_])]


_PARTS = {300: [46, 10], 301: [41, 46, 10]}


def _share(answer: Callable[..., list[int]], rate: float, seed: int, tokens: int = 2000) -> float:
    """The share of joined tokens that the answer has split."""
    split = answer([5, 300] * tokens, dict(_PARTS), rate, Coins(seed))
    return 1 - sum(id_ == 300 for id_ in split) / tokens


def _tosses_for_each(answer: Callable[..., list[int]]) -> bool:
    return all(0.05 < _share(answer, 0.3, seed) < 0.95 for seed in range(4))


def _keeps_the_rate(answer: Callable[..., list[int]]) -> bool:
    # Six standard deviations of 2,000 tosses are 0.06 or less.
    return all(abs(_share(answer, rate, seed) - rate) < 0.06 for seed, rate in enumerate((0.1, 0.3, 0.8)))


def _is_repeatable(answer: Callable[..., list[int]]) -> bool:
    ids = [300] * 200
    return list(answer(ids, dict(_PARTS), 0.5, Coins(7))) == list(answer(ids, dict(_PARTS), 0.5, Coins(7)))


def _listens_to_rng(answer: Callable[..., list[int]]) -> bool:
    ids = [300] * 200
    return list(answer(ids, dict(_PARTS), 0.5, Coins(7))) != list(answer(ids, dict(_PARTS), 0.5, Coins(8)))


split_joined = Exercise(
    name="split_joined",
    reference=_split_joined,
    cases=[
        Case("rate 1, where every joined token is split", lambda _: ([5, 300, 6, 300], dict(_PARTS), 1.0, Coins(0))),
        Case("rate 0, where none is", lambda _: ([5, 300, 6], dict(_PARTS), 0.0, Coins(0))),
        Case("two kinds of joined tokens side by side", lambda _: ([300, 301, 7, 301], dict(_PARTS), 1.0, Coins(1))),
        Case("no joined token", lambda _: ([1, 2, 3], dict(_PARTS), 1.0, Coins(2))),
        Case("no token at all", lambda _: ([], dict(_PARTS), 1.0, Coins(3))),
    ],
    mistakes=[
        Mistake(
            _nested,
            "the parts stand in a list of their own inside the list: the result is one flat list of ids (+= or extend, not append).",
        ),
        Mistake(
            _token_stays, "the joined token is still there, before its parts: the parts replace it, or the text is doubled."
        ),
        Mistake(
            _turned_round,
            "you split where the toss says keep: `rng.random() < rate` is true with probability `rate`, and then the token is split.",
        ),
        Mistake(
            _one_split_only, "you stop after the first joined token: each of them gets its own chance, to the end of the text."
        ),
        Mistake(_others_are_lost, "the tokens that are not joined are gone: they stay as they are."),
    ],
    properties=[
        Property(
            "each token has its own toss",
            _tosses_for_each,
            "At rate 0.3 all of 2,000 joined tokens were split, or none. One toss decides for the whole text (or for all tokens of a "
            "kind): draw a new number for each joined token, inside the loop.",
        ),
        Property(
            "the rate is kept",
            _keeps_the_rate,
            "The share of tokens that is split is not the rate: a joined token is split with probability `rate`, once and by one number "
            "from rng.random(), which is spread evenly from 0 to 1.",
        ),
        Property(
            "the same rng gives the same result",
            _is_repeatable,
            "Two calls with equal rngs gave two results, so chance comes from somewhere else: draw from the `rng` that you are given "
            "(rng.random(), not random.random()), or no run can be repeated.",
        ),
        Property(
            "another rng gives another result",
            _listens_to_rng,
            "Two different rngs gave the same result, so you do not draw from `rng`: a generator seeded anew in each call splits every "
            "document of the corpus at the same places.",
        ),
    ],
)  # fmt: skip


# ---- stream_text: the bug ----------------------------------------------------------------------------------------------


def _stream_text(tokens: Sequence[bytes]) -> list[str]:
    """By the definition: the text of all bytes so far, without a last character that is not complete; then what is new in it."""
    texts = [""]
    for i in range(len(tokens)):
        data = b"".join(tokens[: i + 1])
        unfinished = next((n for n in (3, 2, 1) if _is_a_beginning(data[len(data) - n :], n)), 0)
        texts.append(data[: len(data) - unfinished].decode("utf-8", "replace"))
    return [after[len(before) :] for before, after in pairwise(texts)]


def _is_a_beginning(tail: bytes, length: int) -> bool:
    """Whether these bytes are a character without its end."""
    if len(tail) != length:
        return False
    try:
        tail.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


def _each_alone(tokens: Sequence[bytes]) -> list[str]:
    return [token.decode("utf-8", "replace") for token in tokens]


def _ignoring(tokens: Sequence[bytes]) -> list[str]:
    return [token.decode("utf-8", "ignore") for token in tokens]


def _all_at_the_end(tokens: Sequence[bytes]) -> list[str]:
    return [""] * (len(tokens) - 1) + [b"".join(tokens).decode("utf-8", "replace")]


def _all_so_far(tokens: Sequence[bytes]) -> list[str]:
    pieces = _stream_text(tokens)
    return ["".join(pieces[: i + 1]) for i in range(len(pieces))]


def _joined_to_one(tokens: Sequence[bytes]) -> list[str]:
    return [b"".join(tokens).decode("utf-8", "replace")]


def _byte_by_byte(tokens: Sequence[bytes]) -> list[str]:
    return [token.decode("latin-1") for token in tokens]


def _waits_for_ever(tokens: Sequence[bytes]) -> list[str]:
    pieces, held = [], b""
    for token in tokens:
        held += token
        try:
            pieces.append(held.decode("utf-8"))
            held = b""
        except UnicodeDecodeError:
            pieces.append("")
    return pieces


def _waits_for_whole_tokens(tokens: Sequence[bytes]) -> list[str]:
    """Right about bytes that are no text, but it holds back what is complete when the token ends in half a character."""
    pieces, held = [], b""
    for token in tokens:
        held += token
        whole = not any(_is_a_beginning(held[len(held) - n :], n) for n in (1, 2, 3))
        pieces.append(held.decode("utf-8", "replace") if whole else "")
        held = b"" if whole else held
    return pieces


def _random_stream(generator: torch.Generator) -> tuple[list[bytes]]:
    data = ("naïve 中文 🙂 é" * 3).encode()
    cuts = sorted({0, len(data), *torch.randint(0, len(data), (25,), generator=generator).tolist()})
    return ([data[a:b] for a, b in pairwise(cuts)],)


stream_text = Exercise(
    name="stream_text",
    reference=_stream_text,
    cases=[
        Case("plain English", given([b"The", b" dog", b"."])),
        Case("a letter of two bytes in two tokens", given([b"na", b"\xc3", b"\xaf", b"ve"])),
        Case("an emoji in four tokens", given([b" ", b"\xf0", b"\x9f", b"\x99", b"\x82", b"!"])),
        Case("a byte that no text has", given([b"a", b"\xff", b"b", b" c"])),
        Case("a token that ends in half a character", given([b"caf\xc3", b"\xa9 au", b" lait"])),
        Case("a character that breaks off", given([b"\xe4\xb8", b"a", b"b"])),
        Case("half a character at the end, which is left out", given([b"a", b"\xe4"])),
        Case("three writing systems, cut anywhere", _random_stream),
    ],
    mistakes=[
        Mistake(
            _each_alone,
            "you still decode each token by itself: a token may hold only a part of a character, and a part is not UTF-8. Keep the bytes "
            "that are not complete yet until the rest comes.",
        ),
        Mistake(
            _ignoring,
            "the parts of characters are thrown away (errors='ignore'): no replacement mark is seen, and the character neither. Keep the "
            "bytes until the rest comes.",
        ),
        Mistake(
            _all_at_the_end,
            "you wait for the end of the stream: the text is right, but the reader sees nothing until then. Give each character out as "
            "soon as its last byte is there.",
        ),
        Mistake(
            _joined_to_one,
            "you give one text for the whole stream: give one piece for each token, empty where no character was completed.",
        ),
        Mistake(
            _all_so_far,
            "each piece repeats the text from the beginning: give only what is new, so that the pieces joined are the text.",
        ),
        Mistake(
            _byte_by_byte,
            "you turn every byte into a character (Latin-1): that is right for ASCII alone. The bytes are UTF-8, where a character may take four.",
        ),
        Mistake(
            _waits_for_whole_tokens,
            "you hold back a whole token because it ends in half a character: what is complete before that can be shown now.",
        ),
        Mistake(
            _waits_for_ever,
            "one byte that can never be text stops your stream for ever: waiting helps only where more bytes can complete a character. "
            "Give U+FFFD for bytes that are no beginning of anything, and go on.",
        ),
    ],
)
