"""TokenStream: rows of tokens for training, without end, from a mixture of domains; a resumed stream goes on exactly.

The stream is made in blocks of some hundred rows. Block number n is a function of nothing but (settings, n, how far every
domain was read): documents are drawn from the domain that lags furthest behind its share of tokens, encoded, joined
tokens split at random, some turned into fill-in-the-middle (`fim.py`), packed whole (`packing.py`), rows shuffled. So a
checkpoint needs only the block's number, the row reached in it and each domain's position when it began; resuming makes
that one block again, whatever batch sizes were asked for before.

The next block is prepared on a thread of its own while this one is handed out. It changes when a block is made, never
what is in it: the state counts rows handed out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.data import corpora
from dsv3_mini.data.fim import REPORT_RATE, apply_fim
from dsv3_mini.data.packing import pack
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError

MIXTURE = {"stories": 0.6, "sums": 0.2, "code": 0.1, "prose": 0.1}  # shares of the tokens
SPLIT_RATE = 0.1  # of the tokens that join punctuation and line breaks; the report does not say its share
STATE_FORMAT = 1

# How far a source was read: documents for what can be opened at any place, [epoch, documents] for what is streamed.
Cursor = Any


class Source(Protocol):
    """Documents in a fixed order, readable from any cursor on."""

    identity: str  # changes when the documents do

    def start(self) -> Cursor: ...
    def read(self, cursor: Cursor) -> tuple[str, Cursor]: ...
    def epoch(self, cursor: Cursor) -> float: ...


@dataclass(frozen=True)
class Progress:
    """How far a domain was read: how many tokens it gave, and how many times (2.5: two and a half) it was gone through.

    The epoch stays 0 for generated domains, which have no end; for a streamed one it is a whole number.
    """

    tokens: int
    epoch: float


@dataclass(frozen=True)
class Position:
    """Where a domain stands between two blocks."""

    cursor: Cursor
    tokens: int = 0


@dataclass(frozen=True)
class Block:
    number: int
    start: dict[str, Position]
    end: dict[str, Position]
    rows: Int[Tensor, "rows s1"]


@dataclass(frozen=True)
class HeldOut:
    """Validation rows of one domain, and how many bytes of text their targets spell.

    Bits per byte is the summed loss of all targets (in nats) / ln 2 / n_bytes. Ends of documents are predicted too, and
    paid for, but are no bytes of text.
    """

    tokens: Int[Tensor, "rows s1"]
    n_bytes: int


class TokenStream:
    """An endless, deterministic, resumable stream of token rows.

    Args:
        tokenizer: text to ids.
        seq_len: length of inputs and targets; rows hold one token more.
        mixture: corpus (see `corpora.load_corpus`) to its share of the tokens; shares are scaled to sum to 1.
        seed: of the order of documents, of FIM, splitting and the order of rows.
        fim_rate: the share of documents with prefix, suffix, middle; stories and sums have none, as nobody edits them
            and a small model that met `<|fim_hole|>` inside stories would write it there.
        split_rate: the share of joined tokens that are split.
        block_rows: rows a block has, about.
        text_column, allow_network: see `corpora.load_corpus`.

    Raises:
        DataError: a corpus cannot be used, a share is not above 0, a rate is no probability.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        mixture: Mapping[str, float] = MIXTURE,
        *,
        seed: int = 0,
        fim_rate: float = REPORT_RATE,
        split_rate: float = SPLIT_RATE,
        block_rows: int = 256,
        text_column: str = "text",
        allow_network: bool = False,
    ) -> None:
        _check(seq_len, mixture, fim_rate, split_rate, block_rows)
        self.tokenizer, self.seq_len, self.seed = tokenizer, seq_len, seed
        self.mixture = {name: share / sum(mixture.values()) for name, share in sorted(mixture.items())}
        self.fim_rate, self.split_rate, self.block_rows = fim_rate, split_rate, block_rows
        self._sources = {name: _open(name, f"{seed}/{name}", text_column, allow_network) for name in mixture}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="token-stream")
        start = {name: Position(source.start()) for name, source in self._sources.items()}
        self._row = 0
        self._block: Future[Block] = self._worker.submit(self._build, 0, start)
        self._next: Future[Block] | None = None

    # ---- reading ---------------------------------------------------------------------------------------------------

    def next_batch(self, batch_size: int) -> Int[Tensor, "b s1"]:
        """The next rows (int64, seq_len + 1 tokens each); `packing.inputs_and_targets` makes inputs and targets of them."""
        if batch_size < 1:
            raise DataError(f"batch_size = {batch_size} must be at least 1")
        parts: list[Tensor] = []
        missing = batch_size
        while missing:
            block = self._block.result()
            if self._next is None:
                self._next = self._worker.submit(self._build, block.number + 1, block.end)
            part = block.rows[self._row : self._row + missing]
            parts.append(part)
            missing -= len(part)
            self._row += len(part)
            if self._row == len(block.rows):
                self._block, self._next, self._row = self._next, None, 0
        return torch.cat(parts)

    def progress(self) -> dict[str, Progress]:
        """How far each domain was read when the block that is handed out now began."""
        start = self._block.result().start
        return {name: Progress(p.tokens, self._sources[name].epoch(p.cursor)) for name, p in start.items()}

    def close(self) -> None:
        """Stop preparing. Not needed at a program's end."""
        self._worker.shutdown(cancel_futures=True)

    # ---- resuming --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON: what a stream of the same settings needs to go on."""
        block = self._block.result()
        return {
            "format": STATE_FORMAT,
            "settings": self._settings(),
            "block": block.number,
            "row": self._row,
            "domains": {name: {"cursor": p.cursor, "tokens": p.tokens} for name, p in block.start.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: the rows from here on are the rows that were to come there.

        Raises:
            DataError: the state is of other settings, or the documents are others by now; the stream stays as it was.
        """
        if state.get("format") != STATE_FORMAT:
            raise DataError(
                f"stream state: format {state.get('format')!r} is not {STATE_FORMAT}: it is not of this version"
            )
        try:
            settings, number, row = dict(state["settings"]), int(state["block"]), int(state["row"])
            start = {
                name: Position(state["domains"][name]["cursor"], int(state["domains"][name]["tokens"]))
                for name in self.mixture
            }
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"stream state is damaged ({error!r}): go back to an earlier checkpoint") from None
        now = self._settings()
        for name, then in settings.items():
            if then != now.get(name):
                raise DataError(
                    f"stream state: {name} was {then!r} and is {now.get(name)!r} now: go on with what it began with"
                )
        block = self._worker.submit(self._build, number, start)
        if not 0 <= row < len(block.result().rows):
            raise DataError(f"stream state: row {row} is not in its block of {len(block.result().rows)} rows")
        self._block, self._next, self._row = block, None, row

    def follow(self, other: TokenStream) -> None:
        """Begin after the block that `other` hands out, with settings of our own: no document of it is read again.

        For a change of seq_len in the middle of a training (report section 4.3). Both must mix the same corpora.
        """
        if self.mixture.keys() != other.mixture.keys():
            raise DataError(
                f"mixture {sorted(self.mixture)} cannot follow {sorted(other.mixture)}: mix the same corpora"
            )
        before = other._block.result()
        self._block, self._next, self._row = self._worker.submit(self._build, before.number + 1, before.end), None, 0

    def _settings(self) -> dict[str, Any]:
        vocabulary = hashlib.sha256(b"".join(self.tokenizer.ranks)).hexdigest()[:16]
        return {
            "seed": self.seed, "seq_len": self.seq_len, "block_rows": self.block_rows, "fim_rate": self.fim_rate,
            "split_rate": self.split_rate, "mixture": self.mixture, "vocabulary": vocabulary,
            **{f"documents of {name}": source.identity for name, source in self._sources.items()},
        }  # fmt: skip

    # ---- making a block --------------------------------------------------------------------------------------------

    def _build(self, number: int, start: Mapping[str, Position]) -> Block:
        rng = Random(f"{self.seed}/block {number}")
        position = dict(start)
        total = before = sum(p.tokens for p in start.values())
        documents: list[list[int]] = []
        while total - before < self.block_rows * self.seq_len:
            name = max(self.mixture, key=lambda name: self.mixture[name] * total - position[name].tokens)
            text, cursor = self._sources[name].read(position[name].cursor)
            ids = self.tokenizer.split_joined(self.tokenizer.encode(text), self.split_rate, rng)
            document = apply_fim(ids, self.tokenizer, 0 if corpora.is_generated(name) else self.fim_rate, rng)
            documents.append(document)
            position[name] = Position(cursor, position[name].tokens + len(document))
            total += len(document)
        rows = pack(documents, self.seq_len, self.tokenizer.eos_id, self.tokenizer.pad_id).tokens
        order = rng.sample(range(len(rows)), len(rows))
        return Block(number, dict(start), position, rows[order])


def held_out_rows(
    domain: str,
    tokenizer: Tokenizer,
    seq_len: int,
    rows: int,
    *,
    text_column: str = "text",
    allow_network: bool = False,
) -> HeldOut:
    """The first held-out documents of a corpus, in at most `rows` full rows: neither FIM nor splitting, always the same.

    Fewer rows come back if the corpus holds out less. Arguments and errors are those of `corpora.load_corpus`.
    """
    if rows < 1:
        raise DataError(f"rows = {rows} must be at least 1")
    documents: list[list[int]] = []
    total = 0
    for text in _held_out_texts(domain, text_column, allow_network):
        document = [*tokenizer.encode(text), tokenizer.eos_id]
        if total + len(document) > rows * seq_len:
            document = document[: rows * seq_len - total]
        documents.append(document)
        total += len(document)
        if total >= rows * seq_len:
            break
    if not documents:
        raise DataError(f"corpus {domain!r} holds out nothing: there is no text to measure on")
    tokens = pack(documents, seq_len, tokenizer.eos_id, tokenizer.pad_id).tokens[:rows]
    special = {tokenizer.eos_id, tokenizer.pad_id}
    return HeldOut(
        tokens, sum(len(tokenizer.token_bytes(i)) for i in tokens[:, 1:].flatten().tolist() if i not in special)
    )


# ---- sources -------------------------------------------------------------------------------------------------------


class _Generated:
    """A grammar's documents by number: no end, no repetition."""

    def __init__(self, domain: str) -> None:
        self.domain = domain
        self.identity = _digest(self.read(i)[0] for i in range(3))

    def start(self) -> Cursor:
        return 0

    def read(self, cursor: Cursor) -> tuple[str, Cursor]:
        return corpora.generated_text(self.domain, "train", cursor), cursor + 1

    def epoch(self, cursor: Cursor) -> float:
        return 0.0


class _Indexed:
    """A dataset that can be read at any place, in another order each epoch."""

    def __init__(self, dataset: Any, seed: str) -> None:
        self.texts, self.seed, self.length = dataset["text"], seed, len(dataset)
        sample = [0, self.length // 2, self.length - 1]
        self.identity = f"{self.length} documents {_digest(self.texts[i] for i in sample)}"
        self.order: tuple[int, list[int]] = (-1, [])

    def start(self) -> Cursor:
        return 0

    def read(self, cursor: Cursor) -> tuple[str, Cursor]:
        epoch, i = divmod(cursor, self.length)
        if self.order[0] != epoch:
            self.order = (epoch, Random(f"{self.seed}/epoch {epoch}").sample(range(self.length), self.length))
        return self.texts[self.order[1][i]], cursor + 1

    def epoch(self, cursor: Cursor) -> float:
        return cursor / self.length


class _Streamed:
    """A dataset that is only read from its beginning, as one of the hub: going back to a place skips up to it."""

    def __init__(self, dataset: Any, source: str) -> None:
        self.dataset, self.identity = dataset, source
        self.open: tuple[Cursor, Iterator[dict[str, str]]] | None = None

    def start(self) -> Cursor:
        return [0, 0]

    def read(self, cursor: Cursor) -> tuple[str, Cursor]:
        epoch, i = cursor
        if self.open is None or self.open[0] != [epoch, i]:
            self.open = ([epoch, i], iter(self.dataset.skip(i)))
        row = next(self.open[1], None)
        if row is None and i == 0:
            raise DataError(f"corpus {self.identity!r} is empty: there is nothing to learn from")
        if row is None:
            return self.read([epoch + 1, 0])
        self.open = ([epoch, i + 1], self.open[1])
        return row["text"], [epoch, i + 1]

    def epoch(self, cursor: Cursor) -> float:
        return float(cursor[0])


def _open(source: str, seed: str, text_column: str, allow_network: bool) -> Source:
    if corpora.is_generated(source):
        return _Generated(source)
    dataset = corpora.load_corpus(source, "train", text_column=text_column, allow_network=allow_network)
    return _Streamed(dataset, source) if source.startswith("hub:") else _Indexed(dataset, seed)


def _held_out_texts(domain: str, text_column: str, allow_network: bool) -> Iterator[str]:
    if corpora.is_generated(domain):
        size = corpora.held_out_size(domain)
        return (corpora.generated_text(domain, "held_out", i) for i in range(size))
    dataset = corpora.load_corpus(domain, "held_out", text_column=text_column, allow_network=allow_network)
    return (row["text"] for row in dataset)


def _digest(texts: Any) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _check(seq_len: int, mixture: Mapping[str, float], fim_rate: float, split_rate: float, block_rows: int) -> None:
    for name, value in (("seq_len", seq_len), ("block_rows", block_rows)):
        if value < 1:
            raise DataError(f"{name} = {value} must be at least 1")
    for name, value in (("fim_rate", fim_rate), ("split_rate", split_rate)):
        if not 0 <= value <= 1:
            raise DataError(f"{name} = {value} must be a probability, from 0 to 1")
    if not mixture:
        raise DataError("mixture is empty: give at least one corpus and its share of the tokens")
    for name, share in mixture.items():
        if not 0 < share < float("inf"):
            raise DataError(f"mixture: the share of {name!r} is {share}: it must be above 0, or leave the corpus out")
