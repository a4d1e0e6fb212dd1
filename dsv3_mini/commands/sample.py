"""dsv3 sample: a model writes, token by token."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

import torch

from dsv3_mini.commands.flags import add_model, number, read_model, whole
from dsv3_mini.commands.talk import talk
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.inference.conversation import Conversation
from dsv3_mini.inference.generate import TEMPERATURE, TOP_P, stream
from dsv3_mini.inference.settings import Settings
from dsv3_mini.inference.writing import Counts
from dsv3_mini.model import DeepSeekV3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "prompt", nargs="?", default="", help="text to go on from (default: nothing, a new text begins)"
    )
    parser.add_argument("--max-new-tokens", type=whole(1), default=200, help="at most so many tokens (default: 200)")
    parser.add_argument(
        "--temperature", type=number(0), default=TEMPERATURE,
        help=f"0 takes the likeliest token (default: {TEMPERATURE})",
    )  # fmt: skip
    parser.add_argument(
        "--top-p", type=number(0), default=TOP_P, metavar="P",
        help=f"draw from the likeliest tokens that together hold P (default: {TOP_P}; 1: from all)",
    )  # fmt: skip
    parser.add_argument(
        "--min-p", type=number(0), default=0.0, metavar="P", help="draw from tokens P times as likely as the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty", type=number(0), default=1.0, metavar="X",
        help="above 1, what was already written becomes less likely (default: 1)",
    )  # fmt: skip
    parser.add_argument("--seed", type=whole(0), help="for the same text again (default: another one each time)")
    parser.add_argument(
        "--mtp", action="store_true", help="draft with the MTP modules, and say on stderr how many drafts held"
    )
    parser.add_argument(
        "--drafts",
        type=whole(1),
        metavar="N",
        help="tokens drafted in each pass, with --mtp (default: as many as are likely to hold)",
    )
    parser.add_argument(
        "--interactive", action="store_true", help="talk with the model: it answers line by line, until the input ends"
    )


def run(args: argparse.Namespace) -> int:
    try:
        args.prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # a terminal hands on bytes that are no UTF-8 as lone surrogates
        raise DataError(f"the prompt is not UTF-8: {error.object[error.start]!r} at character {error.start}") from None
    model, tokenizer = read_model(args, mtp=args.mtp)
    if args.interactive:
        return _interactive(args, model, tokenizer)
    generator = torch.Generator()
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)
    ids = [tokenizer.eos_id, *tokenizer.encode(args.prompt)]
    room = model.cfg.max_position_embeddings - len(ids)
    if room < 1:
        raise DataError(
            f"the prompt has {len(ids)} tokens and leaves no room: it must be shorter than max_position_embeddings = "
            f"{model.cfg.max_position_embeddings}"
        )
    tokens = stream(
        model, torch.tensor([ids]), min(args.max_new_tokens, room), args.temperature, tokenizer.eos_id, generator,
        top_p=args.top_p, min_p=args.min_p, repetition_penalty=args.repetition_penalty, use_mtp=args.mtp,
        drafts=args.drafts,
    )  # fmt: skip
    print(args.prompt, end="", flush=True)
    written, shown = [], ""
    for token in tokens:
        if token.item() == tokenizer.eos_id:
            break
        written.append(token.item())
        text = tokenizer.decode(written)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a letter of several tokens is shown when it is whole
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(written)[len(shown) :])  # what was cut off within a letter
    if args.mtp:
        print(drafting(tokens.counts), file=sys.stderr)
    return 0


def _interactive(args: argparse.Namespace, model: DeepSeekV3, tokenizer: Tokenizer) -> int:
    settings = Settings(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, min_p=args.min_p,
        repetition_penalty=args.repetition_penalty, use_mtp=args.mtp, drafts=args.drafts,
    )  # fmt: skip
    chosen = {field.name: getattr(settings, field.name) for field in fields(settings)}
    for name in ("stop_id", "generator", "prefix"):  # the conversation has its own
        del chosen[name]
    return talk(Conversation(model, tokenizer, args.seed, **chosen), args.prompt)


def drafting(counts: Counts) -> str:
    """One line: which share of the drafts held, and what that saved."""
    if not counts.passes:
        return "dsv3 sample: nothing was drafted, the first token was the last"
    held = ", ".join(f"{counts.acceptance_at(depth):.0%}" for depth in range(1, len(counts.checked) + 1))
    return f"dsv3 sample: drafts held {held or 'none'}; {counts.tokens_per_pass:.2f} tokens a pass"
