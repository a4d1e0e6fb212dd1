"""dsv3 ledger: every number of a configuration, by arithmetic."""

from __future__ import annotations

import argparse
import json

from dsv3_mini.commands.flags import add_config, number, read_config, whole
from dsv3_mini.ledger import ledger, ledger_text, to_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, default="671b")
    parser.add_argument("--context", type=whole(1), default=4096, help="tokens of context (default: 4096)")
    parser.add_argument("--dollars-per-hour", type=number(0), default=2.0, help="price of a GPU hour (default: 2)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    cfg = read_config(args)
    if args.json:
        print(json.dumps(to_dict(ledger(cfg, args.context, dollars_per_hour=args.dollars_per_hour)), indent=2))
    else:
        print(ledger_text(cfg, args.context, args.dollars_per_hour))
    return 0
