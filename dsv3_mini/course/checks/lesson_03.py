"""Checks of lesson 03, data: packing, inputs and targets, the document mask, fill in the middle, and a loss with a bug."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake
from dsv3_mini.data.fim import apply_fim
from dsv3_mini.data.packing import IGNORED, pack

# ---- exercise 1: best fit --------------------------------------------------------------------------------------------


def packed_rows(lengths: list[int], capacity: int) -> list[list[int]]:
    """Which documents the package lays into which row. Each document is made of its own number, so rows tell."""
    tokens = pack([[i] * n for i, n in enumerate(lengths)], capacity, eos_id=-1, pad_id=-1).tokens.tolist()
    return [sorted(set(row) - {-1}) for row in tokens]


def _greedy(
    lengths: list[int],
    capacity: int,
    order: Callable[[list[int]], list[int]],
    choose: Callable[[list[int], list[int]], int],
    fits: Callable[[int, int], bool] = lambda room, length: room >= length,
) -> list[list[int]]:
    """Rows in the order they were opened, filled by rules that may be wrong."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order(lengths):
        open_rows = [r for r in range(len(rows)) if fits(room[r], lengths[i])]
        if open_rows:
            row = choose(open_rows, room)
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def _longest_first(lengths: list[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _fullest(rows: list[int], room: list[int]) -> int:
    return min(rows, key=lambda r: room[r])


def _in_order(rows: list[list[int]]) -> list[list[int]]:
    return sorted(sorted(row) for row in rows)


def _as_given(lengths: list[int], capacity: int) -> list[list[int]]:
    return _in_order(_greedy(lengths, capacity, lambda lengths: list(range(len(lengths))), _fullest))


def _first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    return _in_order(_greedy(lengths, capacity, _longest_first, lambda rows, room: rows[0]))


def _emptiest(lengths: list[int], capacity: int) -> list[list[int]]:
    return _in_order(_greedy(lengths, capacity, _longest_first, lambda rows, room: max(rows, key=lambda r: room[r])))


def _never_full(lengths: list[int], capacity: int) -> list[list[int]]:
    return _in_order(_greedy(lengths, capacity, _longest_first, _fullest, lambda room, length: room > length))


def _last_row_only(lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    left = 0
    for i in _longest_first(lengths):
        if not rows or lengths[i] > left:
            rows.append([])
            left = capacity
        rows[-1].append(i)
        left -= lengths[i]
    return _in_order(rows)


def _as_opened(lengths: list[int], capacity: int) -> list[list[int]]:
    return _greedy(lengths, capacity, _longest_first, _fullest)


def _rows_as_opened(lengths: list[int], capacity: int) -> list[list[int]]:
    return [sorted(row) for row in _as_opened(lengths, capacity)]


def _members_as_packed(lengths: list[int], capacity: int) -> list[list[int]]:
    return sorted(_as_opened(lengths, capacity), key=min)


def _lengths_as_packed(lengths: list[int], capacity: int) -> list[list[int]]:
    return [[lengths[i] for i in row] for row in _as_opened(lengths, capacity)]


def _lengths_in_order(lengths: list[int], capacity: int) -> list[list[int]]:
    return _in_order(_lengths_as_packed(lengths, capacity))


def _room_never_shrinks(lengths: list[int], capacity: int) -> list[list[int]]:
    return [list(range(len(lengths)))]


def _ties_backwards(lengths: list[int], capacity: int) -> list[list[int]]:
    def order(lengths: list[int]) -> list[int]:
        return sorted(range(len(lengths)), key=lambda i: lengths[i])[::-1]

    return _in_order(_greedy(lengths, capacity, order, _fullest))


def _lengths(numbers: list[int], capacity: int) -> Callable[[Generator], tuple[Any, ...]]:
    return lambda generator: (list(numbers), capacity)


def _many_lengths(generator: Generator) -> tuple[Any, ...]:
    return torch.randint(1, 65, (80,), generator=generator).tolist(), 64


_NOT_SORTED = (
    "the right documents are in each row, but not in order. Sort the numbers within each row, and the rows by their first "
    "number: the shuffle comes later, and is the stream's"
)
_NOT_NUMBERS = "your rows hold lengths. Return the documents' numbers (their place in the list): two documents may have the same length"

best_fit = Exercise(
    name="best_fit",
    reference=packed_rows,
    cases=[
        Case("lengths 2, 5, 4, 7 in rows of 10", _lengths([2, 5, 4, 7], 10)),
        Case("two documents that fill a row exactly", _lengths([5, 5], 10)),
        Case("a short document that fits into any of three rows", _lengths([22, 20, 16, 11, 3], 30)),
        Case("documents of the same length", _lengths([4, 6, 6, 6, 4], 10)),
        Case("80 documents in rows of 64", _many_lengths),
    ],
    mistakes=[
        Mistake(
            _room_never_shrinks,
            "everything ends in one row: the room of a row must shrink by the length of each document put there",
        ),
        Mistake(
            _as_given,
            "you take the documents as they come. Take the longest first: a long one finds no room once short ones have "
            "nibbled at every row, and a short one still fits in at the end",
        ),
        Mistake(
            _last_row_only,
            "you look only into the row opened last. Every row that has room is open: look through all of them",
        ),
        Mistake(
            _first_fit,
            "you take the first row that has room (first fit). Best fit takes the row with the *least* room left, and keeps "
            "the large gaps for documents that need them",
        ),
        Mistake(
            _emptiest,
            "you take the row with the most room. That levels all rows and fills none: take the one with the least room "
            "that is still enough",
        ),
        Mistake(
            _never_full,
            "a document that is exactly as long as the room left does fit: compare with >=, or every full row stays unfilled",
        ),
        Mistake(_as_opened, _NOT_SORTED),
        Mistake(_rows_as_opened, _NOT_SORTED),
        Mistake(_members_as_packed, _NOT_SORTED),
        Mistake(_lengths_as_packed, _NOT_NUMBERS),
        Mistake(_lengths_in_order, _NOT_NUMBERS),
        Mistake(
            _ties_backwards,
            "of two documents of the same length you take the later first. A sorted list turned round turns ties round as "
            "well: sort by minus the length instead",
        ),
    ],
)

# ---- exercise 2: inputs and targets ----------------------------------------------------------------------------------


def _next_tokens(rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    inputs = [row[:-1] for row in rows.tolist()]
    targets = [[IGNORED if token == pad_id else token for token in row[1:]] for row in rows.tolist()]
    return torch.tensor(inputs), torch.tensor(targets)


def _ignore(targets: Tensor, where: Tensor, value: int = IGNORED) -> Tensor:
    return torch.where(where, torch.full_like(targets, value), targets)


def _swapped(rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    return _next_tokens(rows, pad_id)[1], _next_tokens(rows, pad_id)[0]


def _backwards(rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    targets = rows[:, :-1]
    return rows[:, 1:], _ignore(targets, targets == pad_id)


def _copy(rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    inputs = rows[:, :-1]
    return inputs, _ignore(inputs, inputs == pad_id)


def _padding_counts(rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    return rows[:, :-1], rows[:, 1:]


def _ignored_by_input(rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    return rows[:, :-1], _ignore(rows[:, 1:], rows[:, :-1] == pad_id)


def _inputs_ignored_too(rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    rows = _ignore(rows, rows == pad_id)
    return rows[:, :-1], rows[:, 1:]


def _ignored_as(value: int) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    return lambda rows, pad_id: (rows[:, :-1], _ignore(rows[:, 1:], rows[:, 1:] == pad_id, value))


def _rolled(rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    targets = rows.roll(-1, dims=1)
    return rows, _ignore(targets, targets == pad_id)


def _rolled_bare(rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    return rows, rows.roll(-1, dims=1)


def _rows(count: int, length: int, pad_id: int) -> Callable[[Generator], tuple[Any, ...]]:
    """Rows of ids from 10 on; the first is full, each later one has one more place of padding than the one before."""

    def make(generator: Generator) -> tuple[Any, ...]:
        rows = torch.randint(10, 99, (count, length), generator=generator)
        for r in range(1, count):
            rows[r, length - r :] = pad_id
        return rows, pad_id

    return make


_USE_IGNORED = (
    "the padding is marked, but with another number than -100: that is the one which cross_entropy leaves out "
    "(`ignore_index`)"
)
_ROLLED = (
    "your inputs are as long as the row. The last token has no next one, and a roll hands it the first token of its own row: "
    "leave the last token out of the inputs, and the first out of the targets"
)

inputs_and_targets = Exercise(
    name="inputs_and_targets",
    reference=_next_tokens,
    cases=[
        Case("three rows, two with padding", _rows(3, 7, 1)),
        Case("four rows, and another padding id", _rows(4, 9, 5)),
    ],
    mistakes=[
        Mistake(_swapped, "inputs and targets are the wrong way round: return the inputs first"),
        Mistake(
            _backwards,
            "your target is the token *before*: the model would learn to write backwards. Inputs are all but the last token, "
            "targets all but the first",
        ),
        Mistake(
            _copy,
            "your target is the input itself. A token sees itself, so the model only has to copy, and its loss falls to zero "
            "with nothing learned: shift by one",
        ),
        Mistake(_rolled, _ROLLED),
        Mistake(_rolled_bare, _ROLLED),
        Mistake(
            _padding_counts,
            "padding still counts: where the target is padding it must be -100, or the model spends its effort on predicting "
            "nothing after nothing",
        ),
        Mistake(
            _ignored_by_input,
            "you ignore places whose *input* is padding. The last real token of a row has padding for its target, and you "
            "still ask for it: look at the target",
        ),
        Mistake(
            _inputs_ignored_too,
            "your inputs hold -100 as well. An embedding has no row of that number: padding stays in the inputs, only targets "
            "are ignored",
        ),
        Mistake(_ignored_as(-1), _USE_IGNORED),
        Mistake(_ignored_as(0), _USE_IGNORED),
    ],
)

# ---- exercise 3: the document mask -----------------------------------------------------------------------------------


def _who_sees_whom(document_ids: Tensor) -> Tensor:
    length = document_ids.shape[1]
    return torch.tensor(
        [[[t <= s and row[s] == row[t] for t in range(length)] for s in range(length)] for row in document_ids.tolist()]
    )


def _equal(document_ids: Tensor) -> Tensor:
    return document_ids[:, :, None] == document_ids[:, None, :]


def _causal(document_ids: Tensor) -> Tensor:
    return torch.ones_like(_equal(document_ids)).tril()


def _without_padding(document_ids: Tensor) -> Tensor:
    return _equal(document_ids).tril() & (document_ids >= 0)[:, :, None]


def _first_row_for_all(document_ids: Tensor) -> Tensor:
    return _equal(document_ids[:1]).tril().expand(len(document_ids), -1, -1).clone()


def _document_ids(*rows: list[int]) -> Callable[[Generator], tuple[Any, ...]]:
    return lambda generator: (torch.tensor(rows),)


document_mask = Exercise(
    name="document_mask",
    reference=_who_sees_whom,
    cases=[
        Case("a row of two documents", _document_ids([0, 0, 0, 1, 1])),
        Case("a row that ends in padding", _document_ids([0, 0, 1, 1, 1, -1, -1])),
        Case("three rows at once", _document_ids([0, 0, 1, 1, 1, 2], [0, 0, 0, 0, -1, -1], [0, 1, 1, 1, 2, 2])),
    ],
    mistakes=[
        Mistake(
            _causal,
            "this is the causal mask alone: a token still sees the documents before its own. That is how V3 pre-trains; "
            "here we want the other way",
        ),
        Mistake(
            _equal,
            "a token sees what comes *later* in its document: the answer stands in plain sight. Keep only keys that are not "
            "later than the query",
        ),
        Mistake(
            lambda document_ids: _equal(document_ids).tril(-1),
            "a token cannot see itself. It may: at each place the *next* token is predicted, and the first token of a "
            "document would see nothing at all",
        ),
        Mistake(
            lambda document_ids: _equal(document_ids).triu(),
            "rows and columns are the wrong way round: the query is the row (b s t, s looks at t), and looks back, not "
            "forward",
        ),
        Mistake(
            lambda document_ids: ~_equal(document_ids).tril(),
            "your mask is the opposite: True where a query may *not* look. torch's attention reads True as 'may look'",
        ),
        Mistake(
            _without_padding,
            "a padding token sees nothing at all. A softmax over nothing is NaN, and NaN spreads: let padding see padding, "
            "its target is ignored anyway",
        ),
        Mistake(
            _first_row_for_all,
            "all rows of the batch have the mask of the first. Each row packs its own documents: keep the batch axis",
        ),
    ],
)

# ---- exercise 4: fill in the middle ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Special:
    """Special tokens, at ids that no text of the cases has."""

    eos_id: int = 900
    fim_begin_id: int = 901
    fim_hole_id: int = 902
    fim_end_id: int = 903


def fim_at(ids: list[int], start: int, end: int, special: Any) -> list[int]:
    """The package's FIM with the cuts of your choice: chance is replaced by one that always says these two."""
    cuts = SimpleNamespace(random=lambda: 0.0, sample=lambda places, count: [start, end])
    return apply_fim(ids, special, 1.0, cast(Any, cuts))


def _laid_out(layout: str) -> Callable[[list[int], int, int, Special], list[int]]:
    """FIM in another order: b h e z are the special tokens, p m s the prefix, middle and suffix."""

    def wrong(ids: list[int], start: int, end: int, special: Special) -> list[int]:
        parts = {
            "b": [special.fim_begin_id], "h": [special.fim_hole_id], "e": [special.fim_end_id], "z": [special.eos_id],
            "p": ids[:start], "m": ids[start:end], "s": ids[end:],
        }  # fmt: skip
        return [token for letter in layout for token in parts[letter]]

    return wrong


def _middle_one_longer(ids: list[int], start: int, end: int, special: Special) -> list[int]:
    return _laid_out("bphsem")(ids, start, end, special) + ids[end : end + 1] + [special.eos_id]


def _suffix_one_shorter(ids: list[int], start: int, end: int, special: Special) -> list[int]:
    head = [special.fim_begin_id, *ids[:start], special.fim_hole_id, *ids[end + 1 :], special.fim_end_id]
    return [*head, *ids[start:end], special.eos_id]


def _document(length: int, start: int, end: int) -> Callable[[Generator], tuple[Any, ...]]:
    return lambda generator: (torch.randperm(800, generator=generator)[:length].tolist(), start, end, Special())


_OFF_BY_ONE = "the cut at `end` is off by one: the middle is ids[start:end], the suffix begins with ids[end]; every token occurs once"

psm = Exercise(
    name="psm",
    reference=fim_at,
    cases=[
        Case("ten tokens, cut at 3 and 7", _document(10, 3, 7)),
        Case("nothing before the middle", _document(6, 0, 2)),
        Case("nothing after it", _document(7, 4, 7)),
        Case("a middle that is the whole document", _document(5, 0, 5)),
    ],
    mistakes=[
        Mistake(
            _laid_out("bphmesz"),
            "your parts still stand in reading order, with marks between them. The middle goes to the *end*: a model writes "
            "from left to right, so what it is to fill in must come after both of its neighbours",
        ),
        Mistake(
            _laid_out("bshpemz"),
            "this is suffix, prefix, middle (SPM). V3 uses PSM: the prefix first, then the suffix, then the middle",
        ),
        Mistake(
            _laid_out("bphsem"),
            "the eos is missing: the middle has to end somewhere, and this is where the model learns to stop filling",
        ),
        Mistake(
            _laid_out("bphszem"),
            "the eos stands after the suffix. It closes the whole document, so it comes last, after the middle",
        ),
        Mistake(
            _laid_out("bpeshmz"),
            "hole and end are swapped: `fim_hole` marks the gap between prefix and suffix, `fim_end` where the middle begins",
        ),
        Mistake(
            _laid_out("bphsmz"),
            "`fim_end` is missing: without it nothing tells where the suffix ends and the middle begins",
        ),
        Mistake(
            _laid_out("phsemz"),
            "`fim_begin` is missing: it tells the model from the first token on that this document has a hole",
        ),
        Mistake(_middle_one_longer, _OFF_BY_ONE),
        Mistake(_suffix_one_shorter, _OFF_BY_ONE),
    ],
)

# ---- find the bug: a loss that shifts once too often ------------------------------------------------------------------


def _mean_loss(logits: Tensor, rows: Tensor, pad_id: int) -> Tensor:
    """The loss by its formula, one target after the other."""
    losses = [
        -logits[r, i].double().log_softmax(-1)[row[i + 1]]
        for r, row in enumerate(rows.tolist())
        for i in range(len(row) - 1)
        if row[i + 1] != pad_id
    ]
    return torch.stack(losses).mean()


def _loss(logits: Tensor, targets: Tensor, **how: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **how)


def _shifted_twice(logits: Tensor, rows: Tensor, pad_id: int) -> Tensor:
    return _loss(logits[:, :-1], _next_tokens(rows, pad_id)[1][:, 1:])


def _shifted_back(logits: Tensor, rows: Tensor, pad_id: int) -> Tensor:
    return _loss(logits[:, 1:], _next_tokens(rows, pad_id)[1][:, :-1])


def _last_left_out(logits: Tensor, rows: Tensor, pad_id: int) -> Tensor:
    return _loss(logits[:, :-1], _next_tokens(rows, pad_id)[1][:, :-1])


def _copied(logits: Tensor, rows: Tensor, pad_id: int) -> Tensor:
    return _loss(logits, _copy(rows, pad_id)[1])


def _with_padding(logits: Tensor, rows: Tensor, pad_id: int) -> Tensor:
    return _loss(logits, rows[:, 1:])


def _divided_by_all(logits: Tensor, rows: Tensor, pad_id: int) -> Tensor:
    return _loss(logits, _next_tokens(rows, pad_id)[1], reduction="none").mean()


def _summed(logits: Tensor, rows: Tensor, pad_id: int) -> Tensor:
    return _loss(logits, _next_tokens(rows, pad_id)[1], reduction="sum")


def _mean_of_means(logits: Tensor, rows: Tensor, pad_id: int) -> Tensor:
    targets = _next_tokens(rows, pad_id)[1]
    return torch.stack([F.cross_entropy(row, target) for row, target in zip(logits, targets, strict=True)]).mean()


def _logits_and_rows(count: int, length: int, vocabulary: int) -> Callable[[Generator], tuple[Any, ...]]:
    """Logits for the inputs of rows with 0, 2, 4 ... places of padding at their ends."""

    def make(generator: Generator) -> tuple[Any, ...]:
        rows = torch.randint(2, vocabulary, (count, length), generator=generator)
        for r in range(1, count):
            rows[r, length - 2 * r :] = 1
        return 2 * torch.randn(count, length - 1, vocabulary, generator=generator), rows, 1

    return make


next_token_loss = Exercise(
    name="next_token_loss",
    reference=_mean_loss,
    cases=[
        Case("one full row", _logits_and_rows(1, 7, 11)),
        Case("three rows, two with padding", _logits_and_rows(3, 9, 13)),
    ],
    mistakes=[
        Mistake(
            _shifted_twice,
            "it still shifts twice: `inputs_and_targets` has moved the targets by one already, so the second shift asks for the "
            "token after the next. Such a model's loss falls, and its text skips every second token",
        ),
        Mistake(
            _shifted_back,
            "now the second shift goes the other way and undoes the first: the target is the token that the model has just "
            "read. Take the line out instead",
        ),
        Mistake(
            _last_left_out,
            "the last place of each row is left out on both sides. Rows have one token more than inputs, so that the last "
            "place has a target too",
        ),
        Mistake(
            _copied,
            "the target is the input itself: a model that copies gets a loss of zero. The shift is to happen once, not never",
        ),
        Mistake(
            _with_padding,
            "padding counts in your loss: use the targets of `inputs_and_targets`, where padding is -100",
        ),
        Mistake(
            _divided_by_all,
            "you divide by all places, padding included: a row with more padding seems easier than it is. Divide by the number "
            "of targets that count",
        ),
        Mistake(_summed, "this is the sum: a mean keeps the size of a step apart from the size of a batch"),
        Mistake(
            _mean_of_means,
            "you take the mean of each row, then the mean of those: a token in a row with much padding weighs more than others. "
            "Take one mean over all targets",
        ),
    ],
)
