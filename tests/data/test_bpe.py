"""The trainer against a brute force and against Hugging Face's; the reference encoder against replayed merges."""

from __future__ import annotations

import os
import pydoc_data.topics
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.data.bpe import PATTERN, encode_with_ranks, pre_tokenize, train_bpe
from dsv3_mini.errors import DataError

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads wait for one another, and the texts are small

PROSE = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:150_000]

# Few letters and long runs of one: where merges overlap and counts tie.
crowded = st.lists(st.text(alphabet="aab .\n1é", max_size=40), max_size=6)


def brute_force(texts: list[str], pattern: str = PATTERN) -> list[bytes]:
    """All merges until no pair occurs twice: every word kept, everything counted afresh for every merge."""
    words = [[bytes([b]) for b in word.encode()] for text in texts for word in pre_tokenize(text, pattern)]
    vocab = [bytes([b]) for b in range(256)]
    while True:
        counts = Counter((word[i], word[i + 1]) for word in words for i in range(len(word) - 1))
        if not counts or max(counts.values()) < 2:
            return vocab
        left, right = min(counts, key=lambda pair: (-counts[pair], vocab.index(pair[0]), vocab.index(pair[1])))
        vocab.append(left + right)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1


@given(crowded)
@settings(max_examples=150, deadline=None)
def test_training_equals_brute_force_up_to_the_last_merge(texts: list[str]) -> None:
    expected = brute_force(texts)
    assert train_bpe(texts, len(expected)) == expected
    assert len(set(expected)) == len(expected)  # no token is ever learned twice
    with pytest.raises(DataError, match=f"ask for at most {len(expected)}"):
        train_bpe(texts, len(expected) + 1)


def test_training_equals_the_tokenizers_library_ties_included() -> None:
    """Both break ties by smaller ids. Their ids order bytes by spelling, which for visible ASCII is ours."""
    text = PROSE.encode("ascii", "ignore").decode()
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s+"), "removed")
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator([text], trainer)
    by_id = sorted(theirs.get_vocab().items(), key=lambda item: item[1])
    assert [token.encode() for token, _ in by_id[256:]] == train_bpe([text], 1500, r"\S+")[256:]


@pytest.fixture(scope="module")
def vocab() -> list[bytes]:
    return train_bpe([PROSE], 1200)


# Runs of one sign, odd and even: there the rule "leftmost first" decides.
runs = st.builds(lambda sign, n: sign * n, st.sampled_from(" -=.*"), st.integers(2, 9))
letters = st.sampled_from("etaoin shrdlu.\n(th") | st.characters(exclude_categories=("Cs",))


@given(st.lists(letters | runs, max_size=20).map("".join))
@settings(max_examples=100, deadline=None)
def test_encoding_equals_replaying_the_merges_in_order(vocab: list[bytes], text: str) -> None:
    """Another definition of encoding: run training's merges, one after the other, over the word."""
    ranks = {token: rank for rank, token in enumerate(vocab)}
    word = text.encode()
    parts = [bytes([b]) for b in word]
    for token in vocab[256:]:
        i = 0
        while token in word and i + 1 < len(parts):
            if parts[i] + parts[i + 1] == token:
                parts[i : i + 2] = [token]
            i += 1
    assert encode_with_ranks(word, ranks) == parts


def test_result_depends_on_counts_alone() -> None:
    lines = PROSE[:40_000].splitlines(keepends=True)  # as a text file is read
    expected = train_bpe(lines, 500)
    assert train_bpe(reversed(lines), 500) == expected
    assert train_bpe(sorted(lines), 500) == expected
    program = "import sys; from dsv3_mini.data.bpe import train_bpe; print(train_bpe(sys.stdin, 500))"
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        input="".join(lines),
        env={**os.environ, "PYTHONHASHSEED": "4096", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert elsewhere.stdout == f"{expected}\n"


@pytest.mark.parametrize("size", [255, 0, -1])
def test_a_vocabulary_starts_with_all_bytes(size: int) -> None:
    with pytest.raises(DataError, match=rf"vocab_size = {size} must be at least 256"):
        train_bpe(["text"], size)


def test_256_tokens_are_the_bytes() -> None:
    assert train_bpe([], 256) == [bytes([b]) for b in range(256)]


# ---- pre-tokenisation ------------------------------------------------------------------------------------------------


def test_every_code_point_falls_into_a_piece() -> None:
    everything = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    assert "".join(pre_tokenize(everything)) == everything
    assert all(pre_tokenize(c) == [c] for c in everything[::97])


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("Ann has 12 apples.\n", ["Ann", " has", " ", "1", "2", " apples", ".\n"]),
        ("it's (not) so.\n\n\tEnd", ["it", "'s", " (", "not", ")", " so", ".\n\n", "\tEnd"]),
        ("    return x_1", ["   ", " return", " x", "_", "1"]),
        ("a  \n  b", ["a", "  \n", " ", " b"]),
        ("end   ", ["end", "   "]),
        ("π=3¾", ["π", "=", "3", "¾"]),
        ("x\x00\x01y", ["x", "\x00\x01", "y"]),
    ],
)
def test_pieces(text: str, pieces: list[str]) -> None:
    assert pre_tokenize(text) == pieces


# Code points that have a meaning in every Unicode version at hand.
known_text = st.text(
    alphabet=st.characters(exclude_categories=("Cs", "Cn")) | st.sampled_from(" \n\t\ra1.'_é中"), max_size=40
)


@given(known_text)
@settings(max_examples=150, deadline=None)
def test_cuts_equal_another_regex_engine(text: str) -> None:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    assert pre_tokenize(text) == [piece for piece, _ in split.pre_tokenize_str(text)]


@given(known_text)
@settings(max_examples=100, deadline=None)
def test_what_may_share_a_piece(text: str) -> None:
    for piece in pre_tokenize(text):
        kinds = [unicodedata.category(c)[0] for c in piece]
        assert "N" not in kinds or len(piece) == 1  # a digit is alone
        if "L" in kinds:  # once letters start, nothing but letters and marks follows
            assert set(kinds[1:]) <= {"L", "M"}
        if "\n" in piece.rstrip("\r\n"):  # line breaks end a piece, but for the blanks before them
            assert piece.isspace()


def test_a_run_of_blanks_is_cut_the_same_way_up_to_its_limit() -> None:
    for length in (1, 2, 999, 1000, 1001, 2000, 2500):
        pieces = pre_tokenize(" " * length + "x")
        assert pieces[-1] == " x" and "".join(pieces) == " " * length + "x"
        assert max(map(len, pieces)) <= 1000 and len(pieces) == -(-(length - 1) // 1000) + 1
