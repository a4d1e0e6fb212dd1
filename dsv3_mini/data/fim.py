"""Fill in the middle: a document is cut in three and told beginning, end, middle (report section 4.1).

    document:  pre middle suf                                                       <|eos_token|>
    PSM:       <|fim_begin|> pre <|fim_hole|> suf <|fim_end|> middle                <|eos_token|>

The loss is the usual next-token loss, so nothing in the model knows about it: a model that has seen such documents can
write the piece that is missing between two others, as an editor needs. It is done to whole documents *before*
packing, to 10% of them; the rest keep their order, and left-to-right modelling does not suffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol

from dsv3_mini.errors import DataError

REPORT_RATE = 0.1


class FimTokens(Protocol):
    """The special tokens that this file needs; `Tokenizer` has them."""

    @property
    def eos_id(self) -> int: ...
    @property
    def fim_begin_id(self) -> int: ...
    @property
    def fim_hole_id(self) -> int: ...
    @property
    def fim_end_id(self) -> int: ...


def apply_fim(ids: Sequence[int], tokenizer: FimTokens, rate: float, rng: Random) -> list[int]:
    """Close a document with eos and, with probability `rate`, turn it into prefix, suffix, middle.

    Here is where a document gets its eos, changed or not; packing adds none.

    Args:
        ids: the document's tokens, without eos.
        rate: from 0 (never) to 1 (always; only an empty document, which has no middle, stays as it is).
        rng: where chance comes from; the same state gives the same result. The two cuts are any two of the
            len(ids) + 1 places, all pairs equally likely, so the middle is never empty.

    Raises:
        DataError: the rate is no probability.
    """
    if not 0 <= rate <= 1:
        raise DataError(f"fim rate = {rate} must be a probability, from 0 to 1 (the report uses {REPORT_RATE})")
    ids = list(ids)
    if rng.random() >= rate or not ids:
        return [*ids, tokenizer.eos_id]
    start, end = sorted(rng.sample(range(len(ids) + 1), 2))
    return [
        tokenizer.fim_begin_id, *ids[:start], tokenizer.fim_hole_id, *ids[end:], tokenizer.fim_end_id, *ids[start:end],
        tokenizer.eos_id,
    ]  # fmt: skip
