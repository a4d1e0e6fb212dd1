"""dsv3 sample: a model writes, token by token."""

from __future__ import annotations

import argparse

import torch

from dsv3_mini.commands.flags import add_model, number, read_model, whole
from dsv3_mini.errors import DataError
from dsv3_mini.inference.generate import TEMPERATURE, stream


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
    parser.add_argument("--seed", type=whole(0), help="for the same text again (default: another one each time)")


def run(args: argparse.Namespace) -> int:
    try:
        args.prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # a terminal hands on bytes that are no UTF-8 as lone surrogates
        raise DataError(f"the prompt is not UTF-8: {error.object[error.start]!r} at character {error.start}") from None
    model, tokenizer = read_model(args)
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
    print(args.prompt, end="", flush=True)
    written, shown = [], ""
    prompt = torch.tensor([ids])
    for token in stream(model, prompt, min(args.max_new_tokens, room), args.temperature, tokenizer.eos_id, generator):
        if token.item() == tokenizer.eos_id:
            break
        written.append(token.item())
        text = tokenizer.decode(written)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a letter of several tokens is shown when it is whole
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(written)[len(shown) :])  # what was cut off within a letter
    return 0
