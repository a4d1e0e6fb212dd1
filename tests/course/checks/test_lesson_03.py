"""Lesson 03's checks: right answers in other words pass, wrong ones are refused with the hint that says why."""

import pytest
import torch
import torch.nn.functional as F

from dsv3_mini.course.checks import lesson_03 as check
from dsv3_mini.course.checks.framework import exercises_of

# ---- exercise 1: best fit --------------------------------------------------------------------------------------------


def best_fit_by_heap(lengths, capacity):
    """Rows as pairs of (room, members), searched from the fullest on."""
    rows = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        for row in sorted(rows, key=lambda row: row[0]):
            if row[0] >= lengths[i]:
                row[0] -= lengths[i]
                row[1].append(i)
                break
        else:
            rows.append([capacity - lengths[i], [i]])
    return sorted(sorted(members) for _, members in rows)


def best_fit_by_used(lengths, capacity):
    """What is used instead of what is left, and a dict from document to row."""
    used, home = [], {}
    for length, i in sorted((-length, i) for i, length in enumerate(lengths)):
        best = None
        for r, taken in enumerate(used):
            if taken - length <= capacity and (best is None or taken > used[best]):
                best = r
        if best is None:
            best = len(used)
            used.append(0)
        used[best] -= length
        home[i] = best
    groups = {}
    for i in range(len(lengths)):
        groups.setdefault(home[i], []).append(i)
    return list(groups.values())


def greedy(lengths, capacity, order, pick, fits=lambda room, length: room >= length):
    rows, room = [], []
    for i in order:
        open_rows = [r for r in range(len(rows)) if fits(room[r], lengths[i])]
        if not open_rows:
            rows.append([])
            room.append(capacity)
        r = pick(open_rows, room) if open_rows else len(rows) - 1
        rows[r].append(i)
        room[r] -= lengths[i]
    return rows


def longest_first(lengths):
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def fullest(rows, room):
    return min(rows, key=room.__getitem__)


def as_given(lengths, capacity):
    return sorted(sorted(row) for row in greedy(lengths, capacity, range(len(lengths)), fullest))


def first_fit(lengths, capacity):
    return sorted(sorted(row) for row in greedy(lengths, capacity, longest_first(lengths), lambda rows, room: rows[0]))


def emptiest(lengths, capacity):
    def pick(rows, room):
        return max(rows, key=room.__getitem__)

    return sorted(sorted(row) for row in greedy(lengths, capacity, longest_first(lengths), pick))


def never_full(lengths, capacity):
    rows = greedy(lengths, capacity, longest_first(lengths), fullest, lambda room, length: room > length)
    return sorted(sorted(row) for row in rows)


def last_row_only(lengths, capacity):
    rows, left = [[]], capacity
    for i in longest_first(lengths):
        if lengths[i] > left:
            rows.append([])
            left = capacity
        rows[-1].append(i)
        left -= lengths[i]
    return sorted(sorted(row) for row in rows)


def rows_as_opened(lengths, capacity):
    return [sorted(row) for row in greedy(lengths, capacity, longest_first(lengths), fullest)]


def rows_unsorted(lengths, capacity):
    return greedy(lengths, capacity, longest_first(lengths), fullest)


def their_lengths(lengths, capacity):
    return [[lengths[i] for i in row] for row in rows_unsorted(lengths, capacity)]


def room_forgotten(lengths, capacity):
    return [sorted(longest_first(lengths))]


def turned_round(lengths, capacity):
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    order.reverse()
    return sorted(sorted(row) for row in greedy(lengths, capacity, order, fullest))


# ---- exercise 2: inputs and targets ----------------------------------------------------------------------------------


def targets_by_loop(rows, pad_id):
    inputs = torch.stack([row[:-1] for row in rows])
    targets = torch.empty_like(inputs)
    for r in range(rows.shape[0]):
        for i in range(rows.shape[1] - 1):
            following = int(rows[r, i + 1])
            targets[r, i] = -100 if following == pad_id else following
    return inputs, targets


def targets_by_where(rows, pad_id):
    targets = torch.where(rows == pad_id, -100, rows).roll(-1, dims=1)[:, :-1]
    return rows.narrow(1, 0, rows.shape[1] - 1).clone(), targets


def ignored(targets, where, value=-100):
    return targets.masked_fill(where, value)


def copies(rows, pad_id):
    return rows[:, :-1], ignored(rows[:, :-1], rows[:, :-1] == pad_id)


def backwards(rows, pad_id):
    return rows[:, 1:], ignored(rows[:, :-1], rows[:, :-1] == pad_id)


def wrong_way_round(rows, pad_id):
    return ignored(rows[:, 1:], rows[:, 1:] == pad_id), rows[:, :-1]


def padding_kept(rows, pad_id):
    return rows[:, :-1], rows[:, 1:]


def by_input(rows, pad_id):
    return rows[:, :-1], ignored(rows[:, 1:], rows[:, :-1] == pad_id)


def inputs_marked(rows, pad_id):
    marked = ignored(rows, rows == pad_id)
    return marked[:, :-1], marked[:, 1:]


def minus_one(rows, pad_id):
    return rows[:, :-1], ignored(rows[:, 1:], rows[:, 1:] == pad_id, -1)


def rolled(rows, pad_id):
    targets = torch.roll(rows, -1, 1)
    return rows, ignored(targets, targets == pad_id)


def in_place(rows, pad_id):
    rows[rows == pad_id] = -100
    return rows[:, :-1].clamp(min=pad_id), rows[:, 1:]


# ---- exercise 3: the document mask -----------------------------------------------------------------------------------


def mask_by_loop(document_ids):
    b, s = document_ids.shape
    mask = torch.zeros(b, s, s, dtype=torch.bool)
    for r in range(b):
        for query in range(s):
            for key in range(query + 1):
                mask[r, query, key] = document_ids[r, query] == document_ids[r, key]
    return mask


def mask_by_places(document_ids):
    places = torch.arange(document_ids.shape[1])
    later = places[None, :] > places[:, None]
    return (document_ids.unsqueeze(2) - document_ids.unsqueeze(1) == 0).masked_fill(later, False)


def equal(document_ids):
    return document_ids[:, :, None] == document_ids[:, None, :]


def causal_only(document_ids):
    b, s = document_ids.shape
    return torch.ones(b, s, s, dtype=torch.bool).tril()


def strictly_before(document_ids):
    return equal(document_ids) & torch.ones(document_ids.shape[1], document_ids.shape[1]).tril(-1).bool()


def looks_ahead(document_ids):
    return mask_by_loop(document_ids).transpose(1, 2)


def inverted(document_ids):
    return ~mask_by_loop(document_ids)


def blind_padding(document_ids):
    real = document_ids != -1
    return mask_by_loop(document_ids) & real[:, :, None] & real[:, None, :]


def first_for_all(document_ids):
    return mask_by_loop(document_ids[:1].repeat(len(document_ids), 1))


def floats(document_ids):
    return mask_by_loop(document_ids).float()


# ---- exercise 4: fill in the middle ----------------------------------------------------------------------------------


def psm_by_appending(ids, start, end, special):
    told = [special.fim_begin_id]
    told.extend(ids[:start])
    told.append(special.fim_hole_id)
    told.extend(ids[end:])
    told.append(special.fim_end_id)
    told.extend(ids[start:end])
    told.append(special.eos_id)
    return told


def psm_by_place(ids, start, end, special):
    before = [t for i, t in enumerate(ids) if i < start]
    middle = [t for i, t in enumerate(ids) if start <= i < end]
    after = [t for i, t in enumerate(ids) if i >= end]
    s = special
    return [s.fim_begin_id] + before + [s.fim_hole_id] + after + [s.fim_end_id] + middle + [s.eos_id]


def in_reading_order(ids, start, end, s):
    return [s.fim_begin_id, *ids[:start], s.fim_hole_id, *ids[start:end], s.fim_end_id, *ids[end:], s.eos_id]


def spm(ids, start, end, s):
    return [s.fim_begin_id, *ids[end:], s.fim_hole_id, *ids[:start], s.fim_end_id, *ids[start:end], s.eos_id]


def open_ended(ids, start, end, s):
    return psm_by_place(ids, start, end, s)[:-1]


def eos_too_early(ids, start, end, s):
    return [s.fim_begin_id, *ids[:start], s.fim_hole_id, *ids[end:], s.eos_id, s.fim_end_id, *ids[start:end]]


def marks_swapped(ids, start, end, s):
    return [s.fim_begin_id, *ids[:start], s.fim_end_id, *ids[end:], s.fim_hole_id, *ids[start:end], s.eos_id]


def no_end_mark(ids, start, end, s):
    return [token for token in psm_by_place(ids, start, end, s) if token != s.fim_end_id]


def no_begin_mark(ids, start, end, s):
    return psm_by_place(ids, start, end, s)[1:]


def middle_too_long(ids, start, end, s):
    return [s.fim_begin_id, *ids[:start], s.fim_hole_id, *ids[end:], s.fim_end_id, *ids[start : end + 1], s.eos_id]


def token_lost(ids, start, end, s):
    return [s.fim_begin_id, *ids[:start], s.fim_hole_id, *ids[end + 1 :], s.fim_end_id, *ids[start:end], s.eos_id]


# ---- exercise 5: find the bug ----------------------------------------------------------------------------------------


def loss_by_gather(logits, rows, pad_id):
    targets = rows[:, 1:]
    losses = -logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    counts = targets != pad_id
    return (losses * counts).sum() / counts.sum()


def loss_by_row_and_place(logits, rows, pad_id):
    losses = []
    for logit, row in zip(logits, rows, strict=True):
        end = int((row != pad_id).sum()) - 1  # padding stands at the end
        for place in range(end):
            losses.append(logit[place].logsumexp(0) - logit[place, row[place + 1]])
    return sum(losses) / len(losses)


def entropy(logits, targets, **how):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **how)


def targets_of(rows, pad_id):
    return rows[:, 1:].masked_fill(rows[:, 1:] == pad_id, -100)


def as_it_was(logits, rows, pad_id):
    return entropy(logits[:, :-1], targets_of(rows, pad_id)[:, 1:])


def shifted_back(logits, rows, pad_id):
    return entropy(logits[:, 1:], targets_of(rows, pad_id)[:, :-1])


def last_place_lost(logits, rows, pad_id):
    return entropy(logits[:, :-1], targets_of(rows, pad_id)[:, :-1])


def copying(logits, rows, pad_id):
    return entropy(logits, rows[:, :-1].masked_fill(rows[:, :-1] == pad_id, -100))


def padding_in_the_loss(logits, rows, pad_id):
    return entropy(logits, rows[:, 1:])


def over_all_places(logits, rows, pad_id):
    return entropy(logits, targets_of(rows, pad_id), reduction="sum") / rows[:, 1:].numel()


def sum_of_all(logits, rows, pad_id):
    return entropy(logits, targets_of(rows, pad_id), reduction="sum")


def row_by_row(logits, rows, pad_id):
    return sum(loss_by_gather(logit[None], row[None], pad_id) for logit, row in zip(logits, rows, strict=True)) / len(
        rows
    )


# ---- what they must say ----------------------------------------------------------------------------------------------

RIGHT = [
    (check.best_fit, best_fit_by_heap),
    (check.best_fit, best_fit_by_used),
    (check.inputs_and_targets, targets_by_loop),
    (check.inputs_and_targets, targets_by_where),
    (check.document_mask, mask_by_loop),
    (check.document_mask, mask_by_places),
    (check.psm, psm_by_appending),
    (check.psm, psm_by_place),
    (check.next_token_loss, loss_by_gather),
    (check.next_token_loss, loss_by_row_and_place),
]

WRONG = [
    (check.best_fit, as_given, "Take the longest first"),
    (check.best_fit, first_fit, "the row with the *least* room left"),
    (check.best_fit, emptiest, "You take the row with the most room"),
    (check.best_fit, never_full, "compare with >="),
    (check.best_fit, last_row_only, "only into the row opened last"),
    (check.best_fit, rows_as_opened, "but not in order"),
    (check.best_fit, rows_unsorted, "but not in order"),
    (check.best_fit, their_lengths, "Return the documents' numbers"),
    (check.best_fit, room_forgotten, "the room of a row must shrink"),
    (check.best_fit, turned_round, "you take the later first"),
    (check.inputs_and_targets, copies, "only has to copy"),
    (check.inputs_and_targets, backwards, "the token *before*"),
    (check.inputs_and_targets, wrong_way_round, "return the inputs first"),
    (check.inputs_and_targets, padding_kept, "padding still counts"),
    (check.inputs_and_targets, by_input, "look at the target"),
    (check.inputs_and_targets, inputs_marked, "An embedding has no row"),
    (check.inputs_and_targets, minus_one, "another number than -100"),
    (check.inputs_and_targets, rolled, "as long as the row"),
    (check.inputs_and_targets, in_place, "changes its input number 1 in place"),
    (check.document_mask, causal_only, "the causal mask alone"),
    (check.document_mask, equal, "what comes *later* in its document"),
    (check.document_mask, strictly_before, "cannot see itself"),
    (check.document_mask, looks_ahead, "the query is the row"),
    (check.document_mask, inverted, "your mask is the opposite"),
    (check.document_mask, blind_padding, "A softmax over nothing is NaN"),
    (check.document_mask, first_for_all, "keep the batch axis"),
    (check.document_mask, floats, "torch.bool is wanted"),
    (check.psm, in_reading_order, "The middle goes to the *end*"),
    (check.psm, spm, "suffix, prefix, middle (SPM)"),
    (check.psm, open_ended, "the eos is missing"),
    (check.psm, eos_too_early, "it comes last, after the middle"),
    (check.psm, marks_swapped, "hole and end are swapped"),
    (check.psm, no_end_mark, "`fim_end` is missing"),
    (check.psm, no_begin_mark, "`fim_begin` is missing"),
    (check.psm, middle_too_long, "off by one"),
    (check.psm, token_lost, "off by one"),
    (check.next_token_loss, as_it_was, "it still shifts twice"),
    (check.next_token_loss, shifted_back, "undoes the first"),
    (check.next_token_loss, last_place_lost, "left out on both sides"),
    (check.next_token_loss, copying, "once, not never"),
    (check.next_token_loss, padding_in_the_loss, "padding counts in your loss"),
    (check.next_token_loss, over_all_places, "you divide by all places"),
    (check.next_token_loss, sum_of_all, "this is the sum"),
    (check.next_token_loss, row_by_row, "weighs more than others"),
]


def blank(*args):
    raise NotImplementedError


def named(value):
    return getattr(value, "name", None) or getattr(value, "__name__", None)


@pytest.mark.parametrize(("exercise", "answer"), RIGHT, ids=named)
def test_right_answers_are_accepted_however_they_are_written(exercise, answer):
    result = exercise.run(answer)
    assert result.state == "right", str(result)


@pytest.mark.parametrize(("exercise", "answer", "hint"), WRONG, ids=named)
def test_wrong_answers_are_refused_with_their_own_hint(exercise, answer, hint):
    result = exercise.run(answer)
    assert result.state == "wrong"
    assert hint.lower() in " ".join(result.lines).lower(), str(result)
    assert len(result.lines) <= 2


@pytest.mark.parametrize("exercise", exercises_of(check).values(), ids=named)
def test_a_blank_is_unsolved_and_every_exercise_is_tried_here(exercise):
    assert exercise.run(blank).state == "unsolved"
    assert sum(each is exercise for each, _ in RIGHT) >= 2
    assert sum(each is exercise for each, _, _ in WRONG) >= 3
