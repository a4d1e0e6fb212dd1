"""The command `dsv3`. Each subcommand is a file in commands/ with `add_arguments(parser)` and `run(args) -> exit code`.

A mistake in what was given is one line on standard error and exit code 2. A traceback means a bug of ours.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from dsv3_mini.errors import UserError

COMMANDS = {
    "train": "train a model, or resume a run",
    "sample": "let a model write",
    "eval": "bits per byte by domain, and judged samples",
    "ledger": "parameters, FLOPs, memory and cost of a configuration",
    "bench": "measure against transformers, side by side in one run",
    "doctor": "what this machine has, and what is missing",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="dsv3", description="DeepSeek-V3, readable: train, sample, measure, count.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Only the chosen command is imported: `dsv3 --help` need not wait for torch.
    chosen = next((word for word in arguments if word in COMMANDS), None)
    for name, purpose in COMMANDS.items():
        sub = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        if name == chosen:
            command = importlib.import_module(f"dsv3_mini.commands.{name}")
            command.add_arguments(sub)
    args = parser.parse_args(arguments)
    try:
        return command.run(args)
    except UserError as error:
        print(f"dsv3 {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `dsv3 ledger | head`
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
