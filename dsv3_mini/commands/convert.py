"""dsv3 convert: a model folder in the layout that transformers, vLLM and SGLang open, in BF16 or FP8."""

from __future__ import annotations

import argparse

import torch

from dsv3_mini.commands.flags import add_model, read_model
from dsv3_mini.hub.export import export_pretrained

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "fp8": torch.float8_e4m3fn}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where to write: a folder that is new or empty")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bfloat16",
        help="of the stored weights; fp8 is the released layout, with a scale for each 128x128 block (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument("--no-mtp", action="store_true", help="leave the MTP modules out")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that lies there")


def run(args: argparse.Namespace) -> int:
    model, tokenizer = read_model(args, mtp=not args.no_mtp)
    export_pretrained(model, tokenizer, args.out, DTYPES[args.dtype], overwrite=args.overwrite)
    print(f"wrote {args.out}: transformers, vLLM and SGLang open it")
    return 0
