"""Tokenizer: text to ids and back, on a `tiktoken.Encoding` that is built offline from a file of ranks.

The file is tiktoken's own text format: one token a line, its bytes in base64, a space, its rank. The special
tokens are not in it: by convention they follow the ranks in the order of `SPECIAL_TOKENS`.

Text is only ever text: a document that spells `<|eos_token|>` gets ordinary tokens for it. Special tokens enter
by id (`eos_id`, `special`, `chat`), so no document can end a sequence or speak for the user.
"""

from __future__ import annotations

import base64
import binascii
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import regex
import tiktoken

from dsv3_mini.data.bpe import PATTERN
from dsv3_mini.data.shipped import shipped
from dsv3_mini.errors import DataError

SPECIAL_TOKENS = (
    "<|eos_token|>",
    "<|pad_token|>",
    "<|fim_begin|>",
    "<|fim_hole|>",
    "<|fim_end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
CHAT_ROLES = ("system", "user", "assistant")
SHIPPED_FILE = "tokenizer.tiktoken"
ENCODING_NAME = "dsv3_mini"


class UniformSource(Protocol):
    """Anything that draws uniform numbers in [0, 1): `random.Random` and `numpy.random.Generator` both do."""

    def random(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back. Encoding loses nothing: `decode(encode(text)) == text` for any text.

    `names` maps the short names that `special` takes to tokens, for an encoding that calls them something else.
    """

    encoding: tiktoken.Encoding
    names: Mapping[str, str] = field(default_factory=lambda: {name[2:-2]: name for name in SPECIAL_TOKENS})

    # ---- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def from_ranks(cls, ranks: Sequence[bytes]) -> Tokenizer:
        """A tokenizer from the tokens of `train_bpe`, oldest first; the special tokens come after them.

        Raises:
            DataError: a token occurs twice, or one of the 256 bytes is missing.
        """
        mergeable = {token: rank for rank, token in enumerate(ranks)}
        if len(mergeable) < len(ranks):
            twice = next(token for rank, token in enumerate(ranks) if mergeable[token] != rank)
            raise DataError(f"token {twice!r} occurs twice in the ranks: every token has one rank")
        missing = [byte for byte in range(256) if bytes([byte]) not in mergeable]
        if missing:
            raise DataError(
                f"byte 0x{missing[0]:02x} is missing ({len(missing)} of 256 are): every byte must be a token"
            )
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        return cls(tiktoken.Encoding(ENCODING_NAME, pat_str=PATTERN, mergeable_ranks=mergeable, special_tokens=special))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a rank file (tiktoken's text format).

        Raises:
            DataError: the file is missing or not a complete list of ranks; the message names the line.
        """
        try:
            text = Path(path).read_text(encoding="ascii")
        except FileNotFoundError:
            raise DataError(f"{path} does not exist: give a tokenizer's rank file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as a tokenizer's rank file: {error}") from None
        try:
            return cls.from_ranks(_parse_ranks(text))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    @classmethod
    def shipped(cls) -> Tokenizer:
        """The tokenizer that comes with the course: 4,096 tokens, special tokens included."""
        return cls.load(shipped(SHIPPED_FILE))

    def save(self, path: str | Path) -> None:
        """Write the rank file, whole or not at all."""
        if self.encoding.name != ENCODING_NAME:
            raise DataError(
                f"encoding {self.encoding.name!r} cannot be saved as a rank file: only our own tokenizers can"
            )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(self.ranks)]
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        unfinished.write_text("".join(lines), encoding="ascii", newline="\n")
        os.replace(unfinished, path)

    # ---- text and ids ----------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens spelled in it stay text. A lone surrogate, which is no text, becomes U+FFFD."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on several threads."""
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: what is valid UTF-8 as `encode` would, every other byte as its own token."""
        ids: list[int] = []
        # "surrogateescape" turns a byte that is not UTF-8 into one lone surrogate, U+DC80 to U+DCFF.
        for good, bad in regex.findall(
            r"([^\uDC80-\uDCFF]+)|([\uDC80-\uDCFF])", data.decode("utf-8", "surrogateescape")
        ):
            ids += self.encode(good) if good else [self.encoding.encode_single_token(bytes([ord(bad) - 0xDC00]))]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id is out of range.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`."""
        ids = [operator.index(id_) for id_ in ids]
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            return b"".join(self.token_bytes(id_) for id_ in ids)  # finds the id and names it

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of one token."""
        try:
            return self.encoding.decode_single_token_bytes(id_)
        except (KeyError, OverflowError):
            raise DataError(f"token id {id_} is not in the vocabulary: ids run from 0 to {self.n_vocab - 1}") from None

    # ---- the vocabulary --------------------------------------------------------------------------------------------

    @property
    def n_vocab(self) -> int:
        """How many ids there are, special tokens included."""
        return self.encoding.n_vocab

    @cached_property
    def ranks(self) -> list[bytes]:
        """The byte-pair tokens, oldest first, without the special tokens."""
        return sorted(self.encoding.token_byte_values(), key=self.encoding.encode_single_token)

    def special(self, name: str) -> int:
        """The id of a special token, by its full name `<|fim_hole|>` or the short one, `fim_hole`."""
        token = self.names.get(name, name)
        if token not in self.encoding.special_tokens_set:
            known = ", ".join(self.names) or "none has a short name"
            raise DataError(f"special token {name!r} is not in this tokenizer: choose one of {known}")
        return self.encoding.encode_single_token(token)

    @cached_property
    def eos_id(self) -> int:
        return self.special("eos_token")

    @cached_property
    def pad_id(self) -> int:
        return self.special("pad_token")

    @cached_property
    def fim_begin_id(self) -> int:
        return self.special("fim_begin")

    @cached_property
    def fim_hole_id(self) -> int:
        return self.special("fim_hole")

    @cached_property
    def fim_end_id(self) -> int:
        return self.special("fim_end")

    # ---- conversations ---------------------------------------------------------------------------------------------

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation: each message is its role's token and its text; the assistant's end with eos.

        `messages` are dicts with `role` (system, user or assistant) and `content`. Unless the assistant has the last
        word, the ids end with its token, so that a model goes on with the answer.
        """
        ids: list[int] = []
        role = ""
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise DataError(f"messages[{i}] = {message!r} must be a dict with role and content")
            role, content = message.get("role", ""), message.get("content")
            if role not in CHAT_ROLES:
                raise DataError(f"messages[{i}].role = {role!r} must be one of {', '.join(CHAT_ROLES)}")
            if not isinstance(content, str):
                raise DataError(f"messages[{i}].content = {content!r} must be text")
            ids += [self.special(role), *self.encode(content)]
            if role == "assistant":
                ids.append(self.eos_id)
        return ids if role == "assistant" else [*ids, self.special("assistant")]

    # ---- random splitting (report section 4.1) ---------------------------------------------------------------------

    @cached_property
    def joined(self) -> dict[int, list[int]]:
        """Every token that joins punctuation and line breaks, with the ids of its two parts: `.` and the break."""
        parts = {}
        for token in self.ranks:
            match = regex.fullmatch(rb"([^\r\n]+)([\r\n]+)", token)
            if match and regex.search(r"[\p{P}\p{S}]", match[1].decode("utf-8", "ignore")):
                signs, breaks = match.groups()
                parts[self.encoding.encode_single_token(token)] = self.encode_bytes(signs) + self.encode_bytes(breaks)
        return parts

    def split_joined(self, ids: Iterable[int], rate: float, rng: UniformSource) -> list[int]:
        """Replace each token of `joined`, with probability `rate`, by its parts. The text stays the same.

        A prompt often ends at a line's end without the break. A model that has only seen `.` and the break as one
        token is then on unknown ground (the token boundary bias); splitting some of them at random shows it both.
        """
        if not 0 <= rate <= 1:
            raise DataError(f"rate = {rate} must be a probability, from 0 to 1")
        split: list[int] = []
        for id_ in ids:
            if id_ in self.joined and rng.random() < rate:
                split += self.joined[id_]
            else:
                split.append(id_)
        return split


def _parse_ranks(text: str) -> list[bytes]:
    """The tokens of a rank file in the order of their ranks, which must run from 0 without a gap."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = regex.fullmatch(r"(\S+) (\d{1,9})", line.strip())
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if not token:
            raise DataError(f"line {number}: {line[:60]!r} must be a token in base64, a space and its rank")
        rank = int(match[2])
        if rank in tokens:
            raise DataError(f"line {number}: rank {rank} occurs twice")
        tokens[rank] = token
    missing = next((rank for rank in range(len(tokens)) if rank not in tokens), None)
    if missing is not None:
        raise DataError(f"rank {missing} is missing: ranks run from 0 without a gap")
    return [tokens[rank] for rank in range(len(tokens))]
