"""The command `dsv3`. Each subcommand is a file in commands/ with `add_arguments(parser)` and `run(args) -> exit code`.

A mistake in what was given is one line on standard error and exit code 2. A traceback means a bug of ours.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsv3_mini.errors import UserError

COMMANDS = {
    "train": "train a model, or resume a run",
    "sample": "let a model write",
    "convert": "a run or a model into a folder that servers read, in BF16, FP32 or FP8",
    "eval": "bits per byte by domain, and judged samples",
    "ledger": "parameters, FLOPs, memory and cost of a configuration",
    "dry-run": "a training step of a cluster, on this machine: memory, traffic, time",
    "grade": "run readers' notebooks and say which exercises are right",
    "bench": "measure against transformers, side by side in one run",
    "doctor": "what this machine has, and what is missing",
}
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line: the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)}\n")

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """An error for the first word that no argument took, with the flag that it may have meant."""
        if words:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(words[0].partition("=")[0], flags, n=1)
            hint = f"did you mean {close[0]}?" if close else f"`{self.prog} --help` lists what it takes"
            self.error(f"{words[0]} is not known here: {hint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (a mistake in the flags raises SystemExit, as argparse does)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in arguments if word in COMMANDS), None)
    prefix = f"dsv3 {name}"
    try:
        code = _run(arguments, name)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{prefix}: {_one_line(error)}", file=sys.stderr)
    except BrokenPipeError:  # `dsv3 ledger | head`: what is still to be written has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that cannot be written
        said = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"{prefix}: {_one_line(said)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 2


def _run(arguments: list[str], name: str | None) -> int:
    parser = OneLineParser(prog="dsv3", description="DeepSeek-V3, readable: train, sample, measure, count.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parsers = {
        known: commands.add_parser(known, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        for known, purpose in COMMANDS.items()
    }
    # Only the chosen command is imported: `dsv3 --help` need not wait for torch.
    command = importlib.import_module(f"dsv3_mini.commands.{name.replace('-', '_')}") if name else None
    if command:
        command.add_arguments(parsers[name])
    args, unknown = parser.parse_known_args(arguments)
    parsers.get(args.command, parser).refuse_unknown(unknown)
    if command is None:
        parser.error(f"a COMMAND is missing: {', '.join(COMMANDS)}; `dsv3 --help` says what they do")
    return command.run(args)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


if __name__ == "__main__":
    sys.exit(main())
