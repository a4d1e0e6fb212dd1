"""Byte-level BPE, from text to tokens, small enough to read in one sitting (report section 4.1).

A tokenizer is a list of byte strings. It starts with the 256 single bytes, so that any text at all can be
written, and grows by one rule: *glue the pair of neighbours that occurs most often*. Training does this to
counted words; encoding repeats the same merges, oldest first, on a new word. Three ideas make up the file:

1. `pre_tokenize`: a regex cuts the text into words. No token ever crosses a cut.
2. `train_bpe`: count each distinct word once, then merge the best pair, again and again.
3. `encode_with_ranks`: apply the merges to a word. A token's place in the list, its *rank*, is its age.

Where we simplify: DeepSeek-V3 has 128,000 tokens and takes digits three at a time; we have some 4,000 and take
them one by one, so that a tiny model can see the digits it adds. `tokenizer.py` runs the result through
tiktoken, which does what `encode_with_ranks` does, only faster.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import regex

from dsv3_mini.errors import DataError

PATTERN = "|".join(
    (
        r"\p{N}",  # one digit
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",  # one ASCII sign and letters: 's  .join  _name
        r"[^\r\n\p{L}\p{N}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word, with the space (or tab, ...) before it
        r" ?[\p{P}\p{S}]+[\r\n]*",  # signs, with the line breaks that they join: ).  .\n  }\n\n
        r"\s*[\r\n]+",  # line breaks, with the blanks before them
        r"\s{1,1000}(?!\S)",  # blanks, all but the last: that one belongs to the word after it
        r"\s",  # a last blank that the thing after it did not take, such as the one before a digit
        r"[^\s\p{L}\p{M}\p{N}\p{P}\p{S}]+",  # what is left: control characters and code points without a name
    )
)
"""DeepSeek-V3's way to cut text, in one regex, with digits one by one. Every character falls into some piece.

The 1,000 is for safety: an endless run of blanks would overflow the stack of tiktoken's regex engine.
"""

Pair = tuple[int, int]  # two neighbouring tokens, by id


def pre_tokenize(text: str, pattern: str = PATTERN) -> list[str]:
    """Cut `text` into words; joined again they are the text."""
    return regex.findall(pattern, text)


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = PATTERN) -> list[bytes]:
    """Learn `vocab_size` tokens: the 256 bytes, then one token per merge, in the order in which they were learned.

    The pair with the highest count wins; of equal counts, the one with the older left token, then the one with
    the older right token. Nothing depends on the order of the texts or on hashing: equal counts, equal tokens.

    Raises:
        DataError: `vocab_size` is below 256, or the texts run out of pairs that occur twice before it is reached.
    """
    if vocab_size < 256:
        raise DataError(
            f"vocab_size = {vocab_size} must be at least 256: a byte-level vocabulary starts with all the bytes"
        )
    word_counts: Counter[str] = Counter()
    for text in texts:
        word_counts.update(pre_tokenize(text, pattern))

    vocab = [bytes([byte]) for byte in range(256)]
    words = [list(word.encode("utf-8", "replace")) for word in word_counts]  # each distinct word once, as token ids
    counts = list(word_counts.values())

    pair_counts: Counter[Pair] = Counter()
    homes: defaultdict[Pair, set[int]] = defaultdict(set)  # the words in which a pair occurs (or once did)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            pair_counts[pair] += counts[index]
            homes[pair].add(index)

    # A heap hands out the best pair at once: highest count first, then the smaller ids. An entry whose count has
    # since changed is stale; whenever a count changes, a fresh entry goes in, so stale ones are simply dropped.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    while len(vocab) < vocab_size:
        best, count = _pop_best(heap, pair_counts)
        if count < 2:
            raise DataError(
                f"vocab_size = {vocab_size} is more than the texts give: after {len(vocab)} tokens no pair occurs "
                f"twice; give more text or ask for at most {len(vocab)}"
            )
        token = len(vocab)
        vocab.append(vocab[best[0]] + vocab[best[1]])
        changed: set[Pair] = set()
        for index in homes.pop(best):
            old = words[index]
            new = _merge(old, best, token)
            if len(new) == len(old):
                continue  # the pair was here once; an earlier merge has taken one of its halves
            for pair in zip(old, old[1:], strict=False):
                pair_counts[pair] -= counts[index]
                changed.add(pair)
            for pair in zip(new, new[1:], strict=False):
                pair_counts[pair] += counts[index]
                homes[pair].add(index)
                changed.add(pair)
            words[index] = new
        del pair_counts[best]
        for pair in changed - {best}:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    return vocab


def encode_with_ranks(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Encode one word the slow way: glue the neighbours whose union is the oldest token, until none is a token.

    `ranks` maps each token to its place in the list of `train_bpe`. Of equal pairs the leftmost goes first.
    """
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        unions = [ranks.get(left + right, math.inf) for left, right in zip(parts, parts[1:], strict=False)]
        oldest = min(unions)
        if oldest == math.inf:
            break
        i = unions.index(oldest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _merge(word: list[int], pair: Pair, token: int) -> list[int]:
    """`word` with every occurrence of `pair`, from left to right, replaced by `token`."""
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(token)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def _pop_best(heap: list[tuple[int, Pair]], pair_counts: Counter[Pair]) -> tuple[Pair, int]:
    """The pair with the highest count, and the count; (any pair, 0) when there is none left."""
    while heap:
        negative, pair = heapq.heappop(heap)
        if pair_counts[pair] == -negative:
            return pair, -negative
    return (0, 0), 0
