"""dsv3 eval: loss and bits per byte by domain, and samples judged by the grammar."""

from __future__ import annotations

import argparse
import json

from dsv3_mini.commands.flags import add_model, number, read_model, whole
from dsv3_mini.data.stream import MIXTURE, held_out_rows
from dsv3_mini.errors import DataError
from dsv3_mini.evaluate.bits_per_byte import held_out_loss
from dsv3_mini.evaluate.judged import JUDGED_CONTEXT, judge_model
from dsv3_mini.inference.generate import TEMPERATURE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--domains", nargs="+", default=list(MIXTURE), help="corpora (default: the four of the course)")
    parser.add_argument("--text-column", default="text", help="the column of JSONL and Parquet that holds the text")
    parser.add_argument("--allow-network", action="store_true", help="let hub: corpora be read from the network")
    parser.add_argument("--rows", type=whole(1), default=64, help="held-out rows a domain (default: 64)")
    parser.add_argument("--context", type=whole(2), default=256, help="tokens a row (default: 256)")
    parser.add_argument(
        "--samples", type=whole(0), default=200, help="judged samples and questions; 0 judges none (default: 200)"
    )
    parser.add_argument(
        "--temperature", type=number(0), default=TEMPERATURE, help=f"of the judged samples (default: {TEMPERATURE})"
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of the judged samples (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    model, tokenizer = read_model(args)
    if args.context > model.cfg.max_position_embeddings:
        raise DataError(
            f"--context {args.context} is more than max_position_embeddings = {model.cfg.max_position_embeddings}"
        )
    if args.samples and model.cfg.max_position_embeddings < JUDGED_CONTEXT:
        raise DataError(
            f"--samples {args.samples} needs a context of {JUDGED_CONTEXT} and max_position_embeddings = "
            f"{model.cfg.max_position_embeddings}: --samples 0 judges none"
        )
    # All are read before the first is measured: a name that is wrong should not cost minutes.
    source = {"text_column": args.text_column, "allow_network": args.allow_network}
    held_out = {name: held_out_rows(name, tokenizer, args.context, args.rows, **source) for name in args.domains}
    scores: dict[str, object] = {"validation_loss": {}, "bits_per_byte": {}}
    for domain, rows in held_out.items():
        loss = held_out_loss(model, rows.tokens, tokenizer.pad_id)
        scores["validation_loss"][domain] = round(loss.per_token, 4)
        scores["bits_per_byte"][domain] = round(loss.bits_per_byte(rows.n_bytes), 4)
    if args.samples:
        judged = judge_model(model, tokenizer, args.samples, args.samples, args.temperature, args.seed)
        scores["judged"] = judged.to_log()
    if args.json:
        print(json.dumps(scores, indent=2))
        return 0
    print("held out    bits per byte   nats per token")
    for domain, value in scores["bits_per_byte"].items():
        print(f"  {domain:10} {value:12.3f} {scores['validation_loss'][domain]:16.3f}")
    if args.samples:
        print(
            f"judged, held out ({judged.samples} samples at temperature {args.temperature:g}, {judged.questions} questions of a kind)"
        )
        rows = {
            "samples that are well-formed stories": judged.well_formed,
            "... and break no rule of their world": judged.consistent,
            "... and answer their own question": judged.own_answer_right,
            "story questions answered right": judged.story_answers,
            "two-digit sums right": judged.sum_answers,
        }
        for name, share in rows.items():
            print(f"  {name:38} {share:6.1%}")
    return 0
