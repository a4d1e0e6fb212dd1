"""The tokenizer against the slow encoder, against tiktoken's own file reader, and against what it promises."""

from __future__ import annotations

import base64
import copy
import pydoc_data.topics
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken.load
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.data.bpe import encode_with_ranks, pre_tokenize, train_bpe
from dsv3_mini.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from dsv3_mini.errors import DataError

PROSE = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:150_000]
VOCAB = train_bpe([PROSE, "“Was it you?”\n“No…”\n\n" * 200, "2 +\n2 |\n" * 200], 1200)
TOKENIZER = Tokenizer.from_ranks(VOCAB)
RANKS = {token: rank for rank, token in enumerate(VOCAB)}

words = st.sampled_from([*SPECIAL_TOKENS, ".\n", "):\n\n", " the", "tion", "  ", "\n", "?”\n", "12", "é", "中", "\x00"])
texts = st.lists(words | st.text(max_size=8), max_size=12).map("".join)


@given(texts)
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(id_ < len(VOCAB) for id_ in ids)  # also where it spells a special token


@given(
    st.binary(max_size=60)
    | texts.map(str.encode)
    | st.lists(st.sampled_from([b"\xe4", b"\xb8\xad", b" a", b"\xed\xb2\x80"])).map(b"".join)
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_come_back(data: bytes) -> None:
    assert TOKENIZER.decode_bytes(TOKENIZER.encode_bytes(data)) == data


@given(texts)
@settings(max_examples=100, deadline=None)
def test_encoding_equals_the_slow_reference(text: str) -> None:
    slow = [RANKS[part] for piece in pre_tokenize(text) for part in encode_with_ranks(piece.encode(), RANKS)]
    assert TOKENIZER.encode(text) == slow
    assert TOKENIZER.encode_bytes(text.encode()) == slow
    assert TOKENIZER.encode_batch([text, PROSE[:50], text]) == [slow, TOKENIZER.encode(PROSE[:50]), slow]


def test_real_text_equals_the_slow_reference_and_shrinks() -> None:
    ids = TOKENIZER.encode(PROSE)
    assert ids == [RANKS[part] for piece in pre_tokenize(PROSE) for part in encode_with_ranks(piece.encode(), RANKS)]
    assert len(ids) < len(PROSE) / 2.5


def test_endless_runs_do_not_overflow() -> None:
    """A million blanks are more than the stack of tiktoken's regex engine takes, if the pattern lets it try."""
    for text in (" " * 1_000_001, "a" * 200_000, "\x00" * 200_000):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_lone_surrogate_is_no_text() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a\ufffdb"


# ---- ids -----------------------------------------------------------------------------------------------------------------


def test_special_tokens_follow_the_ranks() -> None:
    assert TOKENIZER.n_vocab == len(VOCAB) + 8
    assert [TOKENIZER.special(name) for name in SPECIAL_TOKENS] == list(range(len(VOCAB), len(VOCAB) + 8))
    by_name = [TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.fim_begin_id, TOKENIZER.fim_hole_id, TOKENIZER.fim_end_id]
    roles = [TOKENIZER.special(role) for role in ("system", "user", "assistant")]
    assert TOKENIZER.decode([*by_name, *roles]) == "".join(SPECIAL_TOKENS)
    with pytest.raises(
        DataError, match="'fim' is not in this tokenizer: choose one of eos_token, pad_token, fim_begin"
    ):
        TOKENIZER.special("fim")


def test_every_token_has_its_bytes() -> None:
    assert [TOKENIZER.token_bytes(id_) for id_ in range(TOKENIZER.n_vocab)] == [
        *VOCAB,
        *map(str.encode, SPECIAL_TOKENS),
    ]


@pytest.mark.parametrize("bad", [-1, 1208, 10**12])
def test_an_id_out_of_range_is_named_with_the_range(bad: int) -> None:
    for call in (TOKENIZER.decode, TOKENIZER.decode_bytes, lambda ids: TOKENIZER.token_bytes(ids[-1])):
        with pytest.raises(DataError, match=rf"token id {bad} is not in the vocabulary: ids run from 0 to 1207"):
            call([5, bad])


def test_ids_may_come_from_numpy_and_torch() -> None:
    ids = TOKENIZER.encode("some text")
    assert TOKENIZER.decode(np.array(ids)) == TOKENIZER.decode(torch.tensor(ids)) == "some text"
    with pytest.raises(TypeError):
        TOKENIZER.decode([1.5])


def test_part_of_a_character_decodes_to_the_replacement_character() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode_bytes("中".encode()[:2])) == "\ufffd"


def test_a_copy_encodes_alike() -> None:
    assert copy.deepcopy(TOKENIZER).encode(PROSE[:500]) == TOKENIZER.encode(PROSE[:500])


# ---- conversations -------------------------------------------------------------------------------------------------------


def test_chat() -> None:
    system, user, assistant = (TOKENIZER.special(role) for role in ("system", "user", "assistant"))
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "2+2? <|eos_token|><|assistant|>"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": ""},
    ]
    text = TOKENIZER.encode
    first = [system, *text("Be kind."), user, *text("2+2? <|eos_token|><|assistant|>"), assistant]
    assert TOKENIZER.chat(talk[:2]) == first  # it is the assistant's turn
    assert TOKENIZER.chat(talk[:3]) == [*first, *text("4"), TOKENIZER.eos_id]
    assert TOKENIZER.chat(talk) == [*first, *text("4"), TOKENIZER.eos_id, user, assistant]


@pytest.mark.parametrize(
    "message, words",
    [
        ({"role": "tool", "content": "x"}, r"messages\[1\].role = 'tool' must be one of system, user, assistant"),
        ({"content": "x"}, r"messages\[1\].role = '' must be one of"),
        ({"role": "user"}, r"messages\[1\].content = None must be text"),
        ({"role": "user", "content": 4}, r"messages\[1\].content = 4 must be text"),
        ("hello", r"messages\[1\] = 'hello' must be a dict with role and content"),
    ],
)
def test_chat_refuses(message: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        TOKENIZER.chat([{"role": "user", "content": "x"}, message])


# ---- random splitting ----------------------------------------------------------------------------------------------------


def joins(token: bytes) -> bool:
    """By hand: signs first, line breaks last, nothing of one among the other."""
    text = token.decode("utf-8", "ignore")
    head = text.rstrip("\r\n")
    return head != text and "\n" not in head and any(unicodedata.category(c)[0] in "PS" for c in head)


def test_joined_tokens_and_their_parts() -> None:
    assert {VOCAB[id_] for id_ in TOKENIZER.joined} == {token for token in VOCAB if joins(token)}
    assert {b".\n", b")\n\n", b" +\n", b" |\n", "?”\n".encode()} <= {VOCAB[id_] for id_ in TOKENIZER.joined}
    for id_, parts in TOKENIZER.joined.items():
        head = VOCAB[id_].rstrip(b"\n")
        assert parts == TOKENIZER.encode_bytes(head) + TOKENIZER.encode_bytes(VOCAB[id_][len(head) :])
        assert not any(joins(VOCAB[part]) for part in parts)


@given(texts, st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_splitting_keeps_the_text(text: str, rate: float, seed: int) -> None:
    ids = [*TOKENIZER.encode(text), TOKENIZER.eos_id]
    split = TOKENIZER.split_joined(ids, rate, random.Random(seed))
    assert TOKENIZER.decode_bytes(split) == TOKENIZER.decode_bytes(ids)
    assert TOKENIZER.split_joined(ids, 0, random.Random(seed)) == ids
    assert not set(TOKENIZER.split_joined(ids, 1, random.Random(seed))) & set(TOKENIZER.joined)


@pytest.mark.parametrize("rng", [random.Random(3), np.random.default_rng(3)])
def test_the_rate_is_a_share_of_the_joined_tokens(rng: random.Random | np.random.Generator) -> None:
    ids = TOKENIZER.encode("It was late. The end.\n") * 4000
    split = TOKENIZER.split_joined(ids, 0.3, rng)
    share = 1 - sum(id_ in TOKENIZER.joined for id_ in split) / 4000
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5  # four standard deviations


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_is_a_probability(rate: float) -> None:
    with pytest.raises(DataError, match=r"rate = \S+ must be a probability"):
        TOKENIZER.split_joined([1], rate, random.Random(0))


# ---- files ---------------------------------------------------------------------------------------------------------------


def test_the_file_is_tiktokens_format_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "ranks.tiktoken"
    TOKENIZER.save(path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no cache: read the file itself
    assert tiktoken.load.load_tiktoken_bpe(str(path)) == RANKS
    assert [p.name for p in path.parent.iterdir()] == ["ranks.tiktoken"]
    again = Tokenizer.load(path)
    assert again.ranks == VOCAB
    assert again.encode(PROSE) == TOKENIZER.encode(PROSE)


def line(token: bytes, rank: int | str) -> str:
    return f"{base64.b64encode(token).decode()} {rank}"


BYTES = [line(bytes([b]), b) for b in range(256)]


@pytest.mark.parametrize(
    "lines, words",
    [
        ([], r"byte 0x00 is missing \(256 of 256 are\)"),
        ([*BYTES, "!!! 256"], r"line 257: '!!! 256' must be a token in base64, a space and its rank"),
        ([*BYTES, "YW!I= 256"], r"line 257: 'YW!I= 256' must be"),
        ([*BYTES, "YWI= two"], r"line 257: 'YWI= two' must be"),
        ([*BYTES, "YWI="], r"line 257: 'YWI=' must be"),
        ([*BYTES, "YWI= 256 1"], r"line 257: 'YWI= 256 1' must be"),
        ([*BYTES, "YWI= -1"], r"line 257: 'YWI= -1' must be"),
        ([*BYTES, line(b"ab", 255)], r"line 257: rank 255 occurs twice"),
        ([*BYTES, line(b"ab", 257)], r"rank 256 is missing: ranks run from 0 without a gap"),
        ([*BYTES, line(b"ab", 256), line(b"ab", 257)], r"token b'ab' occurs twice"),
        ([line(b"ab", 0), *BYTES[1:]], r"byte 0x00 is missing \(1 of 256 are\)"),
        (["\x00\x01 binary \xff"], r"cannot be read as a tokenizer's rank file"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, lines: list[str], words: str) -> None:
    path = tmp_path / "bad.tiktoken"
    path.write_text("\n".join(lines), encoding="latin-1")
    with pytest.raises(DataError, match=words) as error:
        Tokenizer.load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_missing_file_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none.tiktoken does not exist"):
        Tokenizer.load(tmp_path / "none.tiktoken")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_ranks_in_any_order_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "turned.tiktoken"
    path.write_text("\n".join([line(b"ab", 256), "", *reversed(BYTES)]) + "\n")
    assert Tokenizer.load(path).encode("abc") == [256, ord("c")]
