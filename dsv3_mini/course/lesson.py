"""What a lesson's cells call beside the checks: the package's source on the page, and two functions side by side."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from IPython.display import Code, display

from dsv3_mini.course.checks.framework import SECONDS, TOLERANCE, difference
from dsv3_mini.course.checks.guard import Problem, Unsolved, call


def show_source(*objects: Any) -> None:
    """The source of functions or classes of the package, coloured."""
    display(Code("\n\n".join(textwrap.dedent(inspect.getsource(each)).rstrip() for each in objects), language="python"))


def same(mine: Callable[..., Any], theirs: Callable[..., Any], *calls: tuple[Any, ...]) -> None:
    """Print whether two functions give the same for each call's arguments; one line if `mine` is still blank."""
    try:
        for number, arguments in enumerate(calls, start=1):
            wrong = difference(call(mine, arguments, SECONDS), theirs(*arguments), TOLERANCE)
            if wrong:
                print(f"✗ input {number}: {wrong}")
                return
        print(f"✓ the same on {len(calls)} inputs")
    except Unsolved:
        print(f"○ {getattr(mine, '__name__', 'your function')} is still blank: nothing to compare yet")
    except Problem as problem:
        print(f"✗ {problem}")
