"""What every checker is made of: an exercise, its cases, the mistakes it knows, and a result that a reader likes to read.

    rms_norm = Exercise(
        name="rms_norm",
        reference=reference_rms_norm,                    # right, and written apart from what the lesson teaches where possible
        cases=[Case("two tokens of width 4", make_inputs)],
        mistakes=[Mistake(with_the_mean_taken_off, "RMSNorm does not subtract the mean: ...")],
        properties=[Property("...", does_not_depend_on_scale, "...")],
    )

In a lesson `check.rms_norm(rms_norm)` prints one line while the blank is there, and then says what is right or wrong. An
answer is never compared with the memory of one seed's output: each case computes what is right from its inputs. A wrong
answer is compared with what the known mistakes would have given; the one that gives the same numbers has its hint shown.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dsv3_mini.course.checks.guard import Problem, Unsolved, call

SECONDS = 5.0
TOLERANCE = 1e-5  # of the largest number: FP32 sums in another order
SEED = 20


@dataclass(frozen=True)
class Case:
    """Inputs of one call. `inputs` makes them, from a generator, so that nothing is shared between calls."""

    what: str
    inputs: Callable[[torch.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people really give, and what to tell them."""

    wrong: Callable[..., Any]
    hint: str


@dataclass(frozen=True)
class Property:
    """Something that must hold, whatever the inputs. `holds(answer)` is true, or the hint is shown."""

    what: str
    holds: Callable[[Callable[..., Any]], bool]
    hint: str


@dataclass(frozen=True)
class Result:
    """What a check found. `lines` are the details, for the reader."""

    name: str
    state: Literal["right", "wrong", "unsolved"]
    lines: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.state == "right"

    def __str__(self) -> str:
        mark = {"right": "✓", "wrong": "✗", "unsolved": "○"}[self.state]
        return "\n  ".join([f"{mark} {self.name}: {self._headline()}", *self.lines])

    def _headline(self) -> str:
        return {"right": "right", "wrong": "not yet", "unsolved": "still blank, the notebook goes on without it"}[
            self.state
        ]

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        colour = {"right": "#00734F", "wrong": "#A34700", "unsolved": "#5F5F5F"}[self.state]
        first, *rest = str(self).split("\n")
        body = "".join(
            f"<div style='margin-left:1.2em;white-space:pre-wrap'>{html.escape(line)}</div>" for line in rest
        )
        page = f"<div style='border-left:4px solid {colour};padding:2px 10px'><b style='color:{colour}'>{html.escape(first)}</b>{body}</div>"
        return {"text/plain": str(self), "text/html": page}


@dataclass(frozen=True)
class Exercise:
    """A function for the reader to write. Call it with the reader's function to see how it does.

    Args:
        name: of the reader's function.
        reference: a right answer; cases are compared with what it returns.
        cases: inputs to try, small ones first.
        mistakes: known wrong answers with their hints, the likeliest first.
        properties: what else must hold.
        tolerance: largest difference allowed, relative to the largest number expected (FP32 sums in another order differ
            by about 1e-6 of it).
        seconds: how long one call may take.
    """

    name: str
    reference: Callable[..., Any]
    cases: Sequence[Case]
    mistakes: Sequence[Mistake] = ()
    properties: Sequence[Property] = ()
    tolerance: float = TOLERANCE
    seconds: float = SECONDS

    def __call__(self, answer: Callable[..., Any]) -> None:
        """Check an answer and show the result."""
        show(self.run(answer))

    def run(self, answer: Any) -> Result:
        """Check an answer; never raises for what the answer does."""
        state = torch.get_rng_state()
        try:
            return self._run(answer)
        except Unsolved:
            return Result(self.name, "unsolved")
        except Problem as problem:
            return Result(self.name, "wrong", tuple(str(problem).split("\n")))
        finally:
            torch.set_rng_state(state)

    def _run(self, answer: Any) -> Result:
        if not callable(answer):
            raise Problem(
                f"give the function itself, check.{self.name}({self.name}); this is a {type(answer).__name__}"
            )
        for number, case in enumerate(self.cases):
            torch.manual_seed(number)
            inputs = self._inputs(case, number)
            got = call(answer, inputs, self.seconds)
            for position, (now, then) in enumerate(zip(inputs, self._inputs(case, number), strict=True), start=1):
                if difference(now, then, 0.0):
                    raise Problem(
                        f"it changes its input number {position} in place: make a new tensor, the caller still needs the old"
                    )
            expected = self.reference(*self._inputs(case, number))
            wrong = difference(got, expected, self.tolerance)
            if wrong:
                raise Problem("\n".join([f"with {case.what}: {wrong}", *self._hint(got, case, number)]))
        for each in self.properties:
            if not call(each.holds, (answer,), 2 * self.seconds, blame=answer):
                raise Problem(f"{each.what}: this does not hold.\n{each.hint}")
        count = len(self.cases) + len(self.properties)
        return Result(
            self.name,
            "right",
            (f"{count} trials passed: " + "; ".join([c.what for c in self.cases] + [p.what for p in self.properties]),),
        )

    def _inputs(self, case: Case, number: int) -> tuple[Any, ...]:
        return case.inputs(torch.Generator().manual_seed(SEED + number))

    def _hint(self, got: Any, case: Case, number: int) -> list[str]:
        for mistake in self.mistakes:
            try:
                like = mistake.wrong(*self._inputs(case, number))
            except Exception:
                continue  # this mistake cannot be made with these inputs
            if not difference(got, like, max(self.tolerance, TOLERANCE)):
                return [mistake.hint]
        return []


def show(result: Result) -> None:
    """In a notebook as a coloured box, elsewhere as lines."""
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import display
    except ImportError:
        get_ipython = display = None
    if get_ipython is not None and get_ipython() is not None:
        display(result)
    else:
        print(result)


def exercises_of(module: ModuleType) -> dict[str, Exercise]:
    """The exercises of a lesson's checker module by name, in the order in which they stand there."""
    return {value.name: value for value in vars(module).values() if isinstance(value, Exercise)}


def difference(got: Any, expected: Any, tolerance: float) -> str:
    """In words, how `got` is not `expected`; empty where it is. Tensors, numbers, text, and lists, tuples and dicts of them."""
    if got is None and expected is not None:
        return "it returned nothing (None): is there a `return`?"
    if isinstance(expected, (Tensor, np.ndarray)):
        return _tensor_difference(got, torch.as_tensor(expected), tolerance)
    if isinstance(expected, bool) or isinstance(got, bool):
        return "" if got is expected or got == expected else f"it gave {got!r}, and {expected!r} is right"
    if isinstance(expected, (int, float)):
        if isinstance(got, Tensor) and got.numel() == 1:
            got = got.item()
        if not isinstance(got, (int, float, np.number)):
            return f"it gave {_kind(got)}, and a number is wanted"
        # Infinity first: any number is within a share of it.
        if got == expected or (math.isnan(got) and math.isnan(expected)):
            return ""
        if math.isfinite(expected) and abs(got - expected) <= tolerance * max(1.0, abs(expected)):
            return ""
        return f"it gave {got:.6g}, and {expected:.6g} is right"
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping):
            return f"it gave {_kind(got)}, and a dict is wanted"
        if set(got) != set(expected):
            odd = sorted(map(repr, set(got) ^ set(expected)))
            return (
                f"its keys are not the right ones: {odd[0]} is {'too many' if set(got) - set(expected) else 'missing'}"
            )
        return next((f"at {k!r}: {d}" for k in expected if (d := difference(got[k], expected[k], tolerance))), "")
    if isinstance(expected, (list, tuple)):
        if not isinstance(got, (list, tuple)):
            return f"it gave {_kind(got)}, and a {type(expected).__name__} is wanted"
        if len(got) != len(expected):
            return f"it gave {len(got)} items, and {len(expected)} are right"
        return next(
            (
                f"item {i}: {d}"
                for i, (g, e) in enumerate(zip(got, expected, strict=True))
                if (d := difference(g, e, tolerance))
            ),
            "",
        )
    return "" if got == expected else f"it gave {_shown(got)}, and {_shown(expected)} is right"


def _tensor_difference(got: Any, expected: Tensor, tolerance: float) -> str:
    if not isinstance(got, (Tensor, np.ndarray)):
        return f"it gave {_kind(got)}, and a tensor of shape {tuple(expected.shape)} is wanted"
    got = torch.as_tensor(got)
    if got.shape != expected.shape:
        return f"its shape is {tuple(got.shape)}, and {tuple(expected.shape)} is right"
    if expected.dtype == torch.bool and got.dtype != torch.bool:
        return f"its dtype is {got.dtype}, and torch.bool is wanted"
    if got.is_complex() and not expected.is_complex():
        return "it gave complex numbers, and real ones are wanted"
    if expected.numel() == 0:
        return ""
    got, expected = got.detach().to(torch.complex128 if expected.is_complex() else torch.float64), expected.detach()
    expected = expected.to(got.dtype)
    same = torch.eq(got, expected) | (got.isnan() & expected.isnan())
    finite = expected[torch.isfinite(expected.abs())]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    off = torch.where(same, 0.0, (got - expected).abs()).nan_to_num(nan=math.inf)
    if float(off.max()) <= tolerance * max(scale, 1e-6):
        return ""
    place = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
    share = float((off > tolerance * max(scale, 1e-6)).double().mean())
    at = f"at {list(place)} " if place else ""
    return f"{at}it gave {_number(got[place])}, and {_number(expected[place])} is right ({share:.0%} of the numbers are off)"


def _number(value: Tensor) -> str:
    number = value.item()
    return f"{number:.4g}" if not isinstance(number, complex) else f"{number.real:.4g}{number.imag:+.4g}i"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return {"NoneType": "nothing (None)", "NotImplementedType": "NotImplemented"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
