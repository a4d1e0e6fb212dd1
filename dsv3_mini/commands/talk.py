"""dsv3 sample --interactive: line by line, the reader says something and the model goes on."""

from __future__ import annotations

import sys

from dsv3_mini.errors import DataError
from dsv3_mini.inference.conversation import Conversation

HELP = (
    "A line begins a story or tells on; a line that ends in ? asks about it. An empty line begins a new text. "
    "Ctrl-C stops an answer; Ctrl-D ends."
)


def talk(conversation: Conversation, first: str = "") -> int:
    """Read lines until they end; returns the exit code. `first` is said before them."""
    waits = sys.stdin.isatty()
    if waits:
        print(HELP, file=sys.stderr)
    while True:
        try:
            line, first = first or input("> " if waits else ""), ""
        except (EOFError, KeyboardInterrupt):
            if waits:
                print()
            return 0
        except UnicodeDecodeError:
            print("dsv3 sample: this line is not UTF-8", file=sys.stderr)
            continue
        if line.strip():
            _answer(conversation, line)
        else:
            conversation.restart()


def _answer(conversation: Conversation, line: str) -> None:
    said = ""
    try:
        for piece in conversation.say(line):
            print(piece.text, end="", flush=True)
            said = piece.text
    except KeyboardInterrupt:  # enough; what was said stays said
        pass
    except DataError as error:  # the conversation is full, and can begin anew
        print(f"dsv3 sample: {error} (an empty line does)", file=sys.stderr)
        return
    print(end="" if said.endswith("\n") else "\n", flush=True)
