"""Running a reader's function safely: with a time limit, and with its exception made short.

The limit is an alarm that interrupts Python code between two instructions (one long torch operation is first let finish).
Where there are no alarms (Windows, or outside the main thread) the function runs on a thread of its own and is abandoned
when its time is over.
"""

from __future__ import annotations

import linecache
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Problem(Exception):
    """What is wrong with an answer, in words for the reader."""


class Unsolved(Exception):
    """The blank is still there."""


class _TimeOver(BaseException):
    """Not an Exception, so that a reader's `except Exception` does not catch it."""


def call(
    answer: Callable[..., Any], args: tuple[Any, ...], seconds: float, blame: Callable[..., Any] | None = None
) -> Any:
    """`answer(*args)`; `blame` is the reader's function where `answer` only calls it.

    Raises:
        Unsolved: it raised NotImplementedError, as the blank does.
        Problem: it raised anything else, tried to leave, or did not return within `seconds`.
    """
    try:
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            with _alarm(seconds):
                return answer(*args)
        return _on_a_thread(answer, args, seconds)
    except NotImplementedError:
        raise Unsolved from None
    except _TimeOver:
        raise Problem(
            f"it had not returned after {seconds:g} seconds: is there a loop that never ends, or one over single numbers "
            "where one tensor operation would do?"
        ) from None
    except RecursionError:
        raise Problem("it calls itself without end (RecursionError)") from None
    except MemoryError:
        raise Problem("it asked for more memory than there is") from None
    except SystemExit:
        raise Problem("it calls exit(): return the answer instead") from None
    except KeyboardInterrupt:
        raise  # the reader's own
    except BaseException as error:
        raise Problem(_short(error, blame or answer)) from None


def _short(error: BaseException, answer: Callable[..., Any]) -> str:
    """The error in one or two lines: its message, and the reader's line that it came from."""
    message = " ".join(str(error).split())
    said = f"{type(error).__name__}: {message}" if message else type(error).__name__
    code = getattr(answer, "__code__", None)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    numbers = [number for _, number in traceback.walk_tb(error.__traceback__)]
    own = [i for i, frame in enumerate(frames) if frame.f_code is code]  # not what it calls: that may be the course's
    if not own:
        return said
    number = numbers[own[-1]]
    line = linecache.getline(code.co_filename, number).strip()
    return f"{said}\nin line {number - code.co_firstlineno + 1} of your function: {line}" if line else said


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _TimeOver

    before = signal.signal(signal.SIGALRM, ring)
    # It rings again and again: a bare `except:` in a loop would swallow the first.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _on_a_thread(answer: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> Any:
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = answer(*args)
        except BaseException:
            outcome["error"] = sys.exc_info()[1]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise _TimeOver
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
