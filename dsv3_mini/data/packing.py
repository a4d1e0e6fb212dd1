"""Packing: documents of any length into rows of one length, each document whole (report section 4.1).

A row holds seq_len + 1 tokens, so that inputs (all but the last) and targets (all but the first) are both seq_len long:

    <|eos_token|> document ... <|eos_token|> document ... <|eos_token|> <|pad_token|> <|pad_token|>

A row begins with eos, which is also what ends the document before: "a new text begins here" always looks the same, and
a model that samples from eos alone is on known ground. Rows are not cut out of one endless string: a document that
fits into a row is never torn apart, so that no beginning is missing when its end is read. What is left at the end of a row
is filled with padding, whose targets are -100 and cost nothing.

Pre-training lets attention cross from one document of a row into the next, as the report does; supervised fine-tuning
does not: it hands `document_ids` to the model, which masks by them (`model.transformer.same_document`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.errors import DataError

IGNORED = -100  # the target that cross-entropy leaves out, as torch's `ignore_index`
NO_DOCUMENT = -1


@dataclass(frozen=True)
class PackedBlock:
    """Rows of whole documents.

    tokens: the rows; s is seq_len + 1.
    document_ids: which document of its row a token belongs to, counted from 0; -1 for padding. The eos that begins
        a row belongs to the row's first document.
    """

    tokens: Int[Tensor, "rows s"]
    document_ids: Int[Tensor, "rows s"]

    @property
    def fill(self) -> float:
        """The share of places that hold a token, not padding."""
        return (self.document_ids != NO_DOCUMENT).float().mean().item()


def pack(documents: Sequence[Sequence[int]], seq_len: int, eos_id: int, pad_id: int) -> PackedBlock:
    """Pack documents into as few rows as best-fit decreasing finds: the longest first, each into the fullest row it fits.

    A document longer than a row is cut into pieces of seq_len tokens, the only case in which one is not whole;
    every piece then counts as a document. Within a row documents keep the order they were given in, and rows are
    in the order of their first document. No document is given an eos: they bring their own (`fim.apply_fim`).

    Args:
        documents: token ids of each; empty ones are left out.
        seq_len: length of inputs and targets; rows are one longer.

    Raises:
        DataError: seq_len is below 1, or there is nothing to pack.
    """
    if seq_len < 1:
        raise DataError(f"seq_len = {seq_len} must be at least 1")
    pieces = [list(ids[i : i + seq_len]) for ids in documents for i in range(0, len(ids), seq_len)]
    if not pieces:
        raise DataError("there is nothing to pack: every document is empty")
    rows = _best_fit([len(piece) for piece in pieces], seq_len)
    tokens = torch.full((len(rows), seq_len + 1), pad_id)
    document_ids = torch.full((len(rows), seq_len + 1), NO_DOCUMENT)
    for r, members in enumerate(rows):
        row = [eos_id]
        owners = [0]
        for document, i in enumerate(members):
            row += pieces[i]
            owners += [document] * len(pieces[i])
        tokens[r, : len(row)] = torch.tensor(row)
        document_ids[r, : len(row)] = torch.tensor(owners)
    return PackedBlock(tokens, document_ids)


def inputs_and_targets(rows: Int[Tensor, "b s1"], pad_id: int) -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]:
    """Cut rows of s + 1 tokens into inputs and targets: the target of a place is the next token, -100 for padding.

    Padding stays in the inputs, at the end of rows, where causal attention keeps it from reaching anything that counts.
    """
    targets = rows[:, 1:]
    return rows[:, :-1].contiguous(), targets.masked_fill(targets == pad_id, IGNORED)


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which pieces go into which row, by their index. Ties go to the row opened first, so the result is one."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted: the first that is large enough fits best
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(free, (lengths[i], -1))
        if place == len(free):
            rows.append([])
            left, row = capacity, len(rows) - 1
        else:
            left, row = free.pop(place)
        rows[row].append(i)
        if left > lengths[i]:
            insort(free, (left - lengths[i], row))
    return sorted(sorted(row) for row in rows)
