"""dsv3 convert: a run, one of its checkpoints, or a model folder, into a folder that transformers, vLLM and SGLang open."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dsv3_mini.commands.flags import TOKENIZER_FILE, whole
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import ConfigError
from dsv3_mini.hub import from_pretrained, save_pretrained
from dsv3_mini.hub.export import export_pretrained
from dsv3_mini.train.export import find_checkpoint, trained_model

STORED = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="a run (its last checkpoint is taken), a checkpoint, or a model folder"
    )
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument(
        "--dtype", choices=list(STORED), default="bf16",
        help="of the stored weights; fp8: as released, with a scale for each block (default: bf16)",
    )  # fmt: skip
    parser.add_argument("--ema", action="store_true", help="the moving average of a run's weights, not the weights")
    parser.add_argument("--step", type=whole(1), metavar="N", help="a run's checkpoint after step N, not the last one")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a rank file to put beside the model (default: the source's own, if it has one)",
    )
    parser.add_argument("--no-mtp", action="store_true", help="leave a model's MTP modules out")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that FOLDER holds")


def run(args: argparse.Namespace) -> int:
    stored = STORED[args.dtype]
    dtype = torch.float32 if args.dtype == "fp8" else stored  # FP8 is rounded to once, from all digits
    source: Path = args.source
    if args.tokenizer:
        ranks = Path(args.tokenizer)
    else:  # a run has one when it has ended
        ranks = next((f / TOKENIZER_FILE for f in (source, source / "model") if (f / TOKENIZER_FILE).is_file()), None)
    tokenizer = None if ranks is None else Tokenizer.load(ranks)
    if any(source.glob("model*.safetensors")):
        if args.ema or args.step:
            raise ConfigError(f"{source} is a model, not a run: leave --ema and --step out")
        what, model = str(source), from_pretrained(source, dtype, mtp=not args.no_mtp)
    else:
        if args.no_mtp:
            raise ConfigError(f"--no-mtp is for a model: convert {source} into one, then that one")
        checkpoint = find_checkpoint(source, args.step)
        what, model = f"step {int(checkpoint.name.removeprefix('step-'))}", trained_model(checkpoint, args.ema, dtype)
        what = f"the moving average after {what}" if args.ema else f"the weights after {what}"
    if tokenizer is None:
        save_pretrained(model, args.folder, stored, overwrite=args.overwrite)
        print(
            f"no {TOKENIZER_FILE} was found, so a server must be given a tokenizer; or convert again with --tokenizer FILE"
        )
    else:
        export_pretrained(model, tokenizer, args.folder, stored, overwrite=args.overwrite)
    print(f"{args.folder}: {what}, in {args.dtype.upper()}; try `dsv3 sample --model {args.folder}`")
    return 0
