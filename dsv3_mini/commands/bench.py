"""dsv3 bench: our training step, decoding, loss and attention beside what one would use instead, in turns, on this machine."""

from __future__ import annotations

import argparse

from dsv3_mini.commands.flags import whole
from dsv3_mini.config import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--rounds", type=whole(1), default=7, help="how often every side runs (default: 7)")
    shared.add_argument("--threads", type=whole(1), default=None, help="torch's threads (default: as torch chooses)")
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    train = what.add_parser("train", parents=[shared], help="a training step, beside transformers'")
    train.add_argument("--preset", choices=list(PRESETS), default="tiny", help="the model (default: tiny)")
    train.add_argument("--batch", type=whole(1), default=16, help="sequences in a step (default: 16)")
    train.add_argument("--context", type=whole(2), default=256, help="tokens in a sequence (default: 256)")
    train.add_argument(
        "--default-only",
        action="store_true",
        help="transformers as it comes, without the other settings that it offers",
    )
    generate = what.add_parser(
        "generate", parents=[shared], help="decoding, beside transformers', with and without MTP"
    )
    generate.add_argument("--model", metavar="FOLDER", help="a model folder (default: the tiny model that ships)")
    generate.add_argument("--prompt", type=whole(1), default=24, help="tokens in each prompt (default: 24)")
    generate.add_argument("--new", type=whole(2), default=128, help="tokens to write in each row (default: 128)")
    generate.add_argument(
        "--drafts", type=whole(1), help="tokens that MTP drafts in each pass (default: as many as are likely to hold)"
    )
    what.add_parser("halves", parents=[shared], help="a training step with its rows in two halves, and in one piece")
    what.add_parser("loss", parents=[shared], help="cross-entropy in chunks, beside all logits at once")
    what.add_parser("attention", parents=[shared], help="MLA's attention: padded, unequal widths, explicit softmax")


def run(args: argparse.Namespace) -> int:
    from dsv3_mini.bench import attention, generate, halves, loss, train

    if args.what == "train":
        result = train.run(
            args.preset, args.batch, args.context, args.rounds, args.threads, settings=not args.default_only
        )
        print(train.render(result))
    elif args.what == "generate":
        result = generate.run(args.model, args.prompt, args.new, args.drafts, args.rounds, args.threads)
        print(generate.render(result))
    elif args.what == "halves":
        print(halves.render(halves.run(rounds=args.rounds, threads=args.threads)))
    elif args.what == "loss":
        print(loss.render(loss.run(rounds=args.rounds, threads=args.threads)))
    else:
        print(attention.render(attention.run(rounds=args.rounds, threads=args.threads)))
    return 0
