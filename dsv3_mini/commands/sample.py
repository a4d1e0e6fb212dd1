"""dsv3 sample: a model writes, token by token."""

from __future__ import annotations

import argparse

import torch

from dsv3_mini.commands.flags import add_model, number, read_model, whole
from dsv3_mini.inference.generate import stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "prompt", nargs="?", default="", help="text to go on from (default: nothing, a new text begins)"
    )
    parser.add_argument("--max-new-tokens", type=whole(1), default=200, help="at most so many tokens (default: 200)")
    parser.add_argument("--temperature", type=number(0), default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--seed", type=whole(0), help="for the same text again (default: another one each time)")


def run(args: argparse.Namespace) -> int:
    model, tokenizer = read_model(args)
    generator = torch.Generator()
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)
    ids = [tokenizer.eos_id, *tokenizer.encode(args.prompt)]
    room = model.cfg.max_position_embeddings - len(ids)
    print(args.prompt, end="", flush=True)
    written, shown = [], ""
    prompt = torch.tensor([ids])
    for token in stream(
        model, prompt, max(min(args.max_new_tokens, room), 1), args.temperature, tokenizer.eos_id, generator
    ):
        if token.item() == tokenizer.eos_id:
            break
        written.append(token.item())
        text = tokenizer.decode(written)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a letter of several tokens is shown when it is whole
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return 0
