"""Sums with worked steps, and their judge.

`generate_sum(seed, index)` is a pure function. The steps go column by column from the right, as on paper, so that every
line needs only the digits above it and one fact of a small table:

    47 + 38 = ?
    ones: 7 + 8 = 15, write 5, carry 1
    tens: 4 + 3 + 1 = 8, write 8
    answer: 85

The first column always says what it carries (or borrows), also when it is 0, and the last column writes all its digits.
One pair of two-digit numbers in ten is held out: no sum that this module generates, of any kind, holds such a pair in
either order; `held_out_sum` gives the additions of just these pairs. The judge reads text and does its own arithmetic.
"""

from __future__ import annotations

import functools
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_mini.data import lexicon

TRAIN_SEED = 0
HELD_OUT_SEED = 1  # for the kinds that hold nothing out by number

# How often each kind comes, in percent. `story` is a word problem with an addition or a subtraction in it.
KIND_SHARES = {"add_two": 58, "subtract": 13, "add_three": 8, "multiply": 9, "story": 12}
_KINDS, _SHARES = list(KIND_SHARES), list(KIND_SHARES.values())

_COLUMNS = ("ones", "tens", "hundreds")

THINGS = lexicon.words("""acorns apples balls balloons beads books bricks buttons candles cards coins cookies cups drums eggs
feathers flowers hats keys kites lemons letters marbles masks melons nuts onions oranges peaches pears pebbles pencils
pictures plums ribbons ropes shells socks spoons stamps stickers stones tickets toys""")

_ADDING = (
    "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
    "{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
    "{name} buys {a} {things} and then {b} more. How many {things} does {name} have now?",
    "There are {a} {things} in a box and {b} {things} in a bag. How many {things} are there?",
)
_TAKING = (
    "{name} has {a} {things} and gives away {b}. How many {things} does {name} have now?",
    "{name} has {a} {things} and loses {b}. How many {things} does {name} have now?",
    "There are {a} {things} in a box and {name} takes {b}. How many {things} are left?",
)


@dataclass(frozen=True)
class Sum:
    """`text` is the whole document; `a operator b = answer`; `kind` is a key of `KIND_SHARES`."""

    text: str
    a: int
    b: int
    operator: str  # "+", "-" or "x"
    answer: int
    kind: str

    @property
    def prompt(self) -> str:
        """The question's line with its line break: the steps and the answer are the model's."""
        return self.text[: self.text.index("\n") + 1]


def is_held_out(a: int, b: int) -> bool:
    """Whether the pair of two-digit numbers, in either order, is kept from training."""
    low, high = sorted((a, b))
    # A checksum rather than a linear hash: a*131 + b*7919 modulo 10 would hold out whole rows of the digit table.
    return low >= 10 and high <= 99 and zlib.crc32(f"{low} and {high}".encode()) % 10 == 0


def generate_sum(seed: int, index: int) -> Sum:
    """Sum number `index` of the stream `seed`: the same arguments always give the same sum."""
    rng = random.Random(f"sums-{seed}-{index}")
    kind = rng.choices(_KINDS, _SHARES)[0]
    question = None
    if kind == "multiply":
        return _write(kind, rng.randint(2, 9), "x", rng.randint(10, 99))
    if kind == "add_three":
        return _write(kind, rng.randint(100, 999), "+", rng.randint(100, 999))
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    while is_held_out(a, b):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
    operator = "-" if kind == "subtract" or (kind == "story" and rng.random() < 0.4) else "+"
    if operator == "-":
        a, b = max(a, b), min(a, b)
    if kind == "story":
        name, other = rng.sample(lexicon.GIRLS + lexicon.BOYS, 2)
        frame = rng.choice(_ADDING if operator == "+" else _TAKING)
        question = frame.format(name=name, other=other, things=rng.choice(THINGS), a=a, b=b)
    return _write(kind, a, operator, b, question)


def held_out_count() -> int:
    """How many additions are held out."""
    return len(_held_out_pairs())


def held_out_sum(index: int) -> Sum:
    """Held-out two-digit addition number `index`, from 0 up to `held_out_count()`, in a mixed but fixed order."""
    a, b = _held_out_pairs()[index]
    return _write("add_two", a, "+", b)


@functools.cache
def _held_out_pairs() -> list[tuple[int, int]]:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out(a, b)]
    return sorted(pairs, key=lambda pair: zlib.crc32(repr(pair).encode()))


def is_right(problem: Sum, completion: str) -> bool:
    """Whether the first answer line of what follows the prompt holds the answer."""
    found = re.search(r"^answer:(.*)$", completion, re.MULTILINE)
    return found is not None and found[1].strip() == str(problem.answer)


def samples(count: int, seed: int = TRAIN_SEED) -> Iterator[Sum]:
    """The first `count` sums of a stream."""
    return (generate_sum(seed, index) for index in range(count))


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write(kind: str, a: int, operator: str, b: int, question: str | None = None) -> Sum:
    lines = [f"{a} {operator} {b} = ?"]
    if question:
        lines.insert(0, question)
    steps, answer = {"+": _add, "-": _subtract, "x": _multiply}[operator](a, b)
    return Sum("\n".join([*lines, *steps, f"answer: {answer}"]), a, b, operator, answer, kind)


def _add(a: int, b: int) -> tuple[list[str], int]:
    steps, carry, written = [], None, ""
    digits = list(zip(reversed(str(a)), reversed(str(b)), strict=True))
    for column, (x, y) in zip(_COLUMNS, digits, strict=False):
        total = int(x) + int(y) + (carry or 0)
        step = f"{column}: {x} + {y}" + ("" if carry is None else f" + {carry}") + f" = {total}"
        if column == _COLUMNS[len(digits) - 1]:
            steps.append(f"{step}, write {total}")
            return steps, int(f"{total}{written}")
        carry, written = total // 10, f"{total % 10}{written}"
        steps.append(f"{step}, write {written[0]}, carry {carry}")
    raise AssertionError("no column is the last")


def _subtract(a: int, b: int) -> tuple[list[str], int]:
    (tens_a, ones_a), (tens_b, ones_b) = divmod(a, 10), divmod(b, 10)
    borrow = int(ones_a < ones_b)
    ones = ones_a + 10 * borrow - ones_b
    tens = tens_a - tens_b - borrow
    return [
        f"ones: {ones_a + 10 * borrow} - {ones_b} = {ones}, write {ones}, borrow {borrow}",
        f"tens: {tens_a} - {tens_b} - {borrow} = {tens}, write {tens}",
    ], 10 * tens + ones


def _multiply(a: int, b: int) -> tuple[list[str], int]:
    tens_b, ones_b = divmod(b, 10)
    carry, ones = divmod(a * ones_b, 10)
    tens = a * tens_b + carry
    return [
        f"ones: {a} x {ones_b} = {a * ones_b}, write {ones}, carry {carry}",
        f"tens: {a} x {tens_b} = {a * tens_b}, {a * tens_b} + {carry} = {tens}, write {tens}",
    ], 10 * tens + ones


# ---- judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SumVerdict:
    """What the judge says of a text. The later fields are None where an earlier one is false.

    well_formed: every line has its form and its place. steps_right: every step's digits come from the question and the
    step before, and its arithmetic holds. answer_right: the answer is the result of the question's sum.
    """

    well_formed: bool
    steps_right: bool | None
    answer_right: bool | None
    problem: str | None


_NUMBER = r"(0|[1-9][0-9]*)"
_QUESTION_LINE = re.compile(rf"{_NUMBER} ([-+x]) {_NUMBER} = \?")
_ANSWER_LINE = re.compile(rf"answer: {_NUMBER}")
_STEP_LINE = re.compile(rf"(ones|tens|hundreds): (.+), write {_NUMBER}(?:, (carry|borrow) {_NUMBER})?")
_EQUATION = re.compile(r"([0-9]+(?: [-+x] [0-9]+)+) = ([0-9]+)")


def judge_sum(text: str) -> SumVerdict:
    """Judges a whole document: its form, its steps, its answer."""
    lines = text.rstrip("\n").split("\n")
    told = None
    if not _QUESTION_LINE.fullmatch(lines[0]):
        told = _read_word_problem(lines[0])
        if told is None:
            return SumVerdict(False, None, None, f"not a question: {lines[0]!r}")
        lines = lines[1:]
    question = _QUESTION_LINE.fullmatch(lines[0]) if lines else None
    if not question:
        return SumVerdict(False, None, None, f"not a sum: {lines[0] if lines else ''!r}")
    a, operator, b = int(question[1]), question[2], int(question[3])
    problem = _form(a, operator, b, lines)
    if problem:
        return SumVerdict(False, None, None, problem)
    right = {"+": a + b, "-": a - b, "x": a * b}[operator]
    answer = _ANSWER_LINE.fullmatch(lines[-1])
    assert answer
    answer_right = int(answer[1]) == right
    if told is not None and told != (a, operator, b):
        answer_right, wrong_steps = False, f"the question does not ask for {lines[0]!r}"
    else:
        wrong_steps = _wrong_step(a, operator, b, lines[1:-1])
    problem = wrong_steps or (None if answer_right else f"{a} {operator} {b} is {right}, not {answer[1]}")
    return SumVerdict(True, wrong_steps is None, answer_right, problem)


def _form(a: int, operator: str, b: int, lines: list[str]) -> str | None:
    """What is wrong with the shape of the lines, or None."""
    widths = (len(str(a)), len(str(b)))
    if widths not in {"+": ((2, 2), (3, 3)), "-": ((2, 2),), "x": ((1, 2),)}[operator] or (operator == "-" and a < b):
        return f"not a sum of this language: {lines[0]!r}"
    columns = _COLUMNS[: widths[1]]
    if len(lines) != len(columns) + 2:
        return f"{len(columns) + 2} lines are needed from the sum to the answer, not {len(lines)}"
    for column, line in zip(columns, lines[1:-1], strict=True):
        step = _STEP_LINE.fullmatch(line)
        if not step or step[1] != column:
            return f"not the step of the {column}: {line!r}"
        if step[4] != (None if column == columns[-1] else "borrow" if operator == "-" else "carry"):
            return f"what is carried is missing or out of place: {line!r}"
        parts = [_EQUATION.fullmatch(part) for part in step[2].split(", ")]
        if not all(parts):
            return f"not an equation: {line!r}"
        shape = [re.sub(r"\d+", "n", part[1]) for part in parts if part]
        first = column == "ones"
        if operator == "x":
            wanted = ["n x n"] if first else ["n x n", "n + n"]
        else:
            wanted = [f"n {operator} n" if first else f"n {operator} n {operator} n"]
        if shape != wanted:
            return f"not the equation of this step: {line!r}"
    if not _ANSWER_LINE.fullmatch(lines[-1]):
        return f"not an answer: {lines[-1]!r}"
    return None


def _wrong_step(a: int, operator: str, b: int, steps: list[str]) -> str | None:
    """The first step that does not follow from what stands before it, or None."""
    carried = 0
    for index, line in enumerate(steps):
        numbers = [int(number) for number in re.findall(r"\d+", line)]
        x, y = a // 10**index % 10, b // 10**index % 10
        last = index == len(steps) - 1
        if operator == "x":
            x = a
            value = x * y + carried
            expected = [x, y, x * y] + ([x * y, carried, value] if index else [])
        elif operator == "+":
            value = x + y + carried
            expected = [x, y, value] if index == 0 else [x, y, carried, value]
        else:
            lent = int(not last and x - carried < y)
            x += 10 * lent
            value = x - y - carried
            expected = [x, y, value] if index == 0 else [x, y, carried, value]
        carried = lent if operator == "-" else value // 10
        expected += [value] if last else [value % 10, carried]
        if numbers != expected:
            return f"wrong step: {line!r}"
    return None


def _frame_regex(frame: str) -> re.Pattern[str]:
    """A word problem's sentence as a pattern; a slot that returns must hold the same word again."""
    seen: set[str] = set()
    pattern = ""
    for position, piece in enumerate(re.split(r"\{(\w+)\}", frame)):
        if position % 2 == 0:
            pattern += re.escape(piece)
        elif piece in seen:
            pattern += f"(?P={piece})"
        else:
            seen.add(piece)
            pattern += f"(?P<{piece}>" + (r"[1-9][0-9]" if len(piece) == 1 else r"[A-Za-z]+") + ")"
    return re.compile(pattern)


_FRAMES = [(_frame_regex(frame), "+") for frame in _ADDING] + [(_frame_regex(frame), "-") for frame in _TAKING]
_NAMES = frozenset(lexicon.GIRLS + lexicon.BOYS)
_THINGS = frozenset(THINGS)


def _read_word_problem(line: str) -> tuple[int, str, int] | None:
    """The sum that a word problem asks for, or None if the line is no word problem."""
    for frame, operator in _FRAMES:
        if found := frame.fullmatch(line):
            slots = found.groupdict()
            names = [slots[slot] for slot in ("name", "other") if slot in slots]
            if slots["things"] in _THINGS and _NAMES.issuperset(names) and len(set(names)) == len(names):
                return int(slots["a"]), operator, int(slots["b"])
    return None
