"""What several commands read in the same way: a model, a configuration, numbers with a lower bound."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dsv3_mini.config import PRESETS, ModelConfig
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import CheckpointError, ConfigError
from dsv3_mini.hub import from_pretrained
from dsv3_mini.model import DeepSeekV3

TOKENIZER_FILE = "tokenizer.tiktoken"


def add_config(parser: argparse.ArgumentParser, default: str) -> None:
    """--preset, --config and --set, which `read_config` turns into a ModelConfig."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--preset", choices=list(PRESETS), default=default, help=f"named configuration (default: {default})"
    )
    which.add_argument("--config", metavar="PATH", help="a config.json in Hugging Face's form, or its folder")
    parser.add_argument("--set", metavar="FIELD=VALUE", action="append", default=[], help="change a field of the model")


def read_config(args: argparse.Namespace) -> ModelConfig:
    cfg = ModelConfig.from_hf(args.config) if args.config else ModelConfig.preset(args.preset)
    return cfg.replace(**read_changes(args))


def read_changes(args: argparse.Namespace) -> dict[str, object]:
    """What --set says."""
    return dict(_assignment(text) for text in args.set)


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, which `read_model` loads: by default the model that ships."""
    parser.add_argument(
        "--model", metavar="FOLDER", help="a model folder, or a finished run (default: the tiny model that ships)"
    )


def read_model(args: argparse.Namespace, mtp: bool = False) -> tuple[DeepSeekV3, Tokenizer]:
    """The model and the tokenizer beside it (the shipped tokenizer where there is none).

    Without `mtp` the MTP modules are left out, and need not be there: folders that transformers wrote have none.
    """
    folder = shipped("tiny") if args.model is None else model_folder(args.model)
    own = folder / TOKENIZER_FILE
    tokenizer = Tokenizer.load(own) if own.exists() else Tokenizer.shipped()
    model = from_pretrained(folder, mtp=mtp).eval()
    if tokenizer.n_vocab > model.cfg.vocab_size:
        raise ConfigError(
            f"{folder}: vocab_size = {model.cfg.vocab_size} is less than the tokenizer's {tokenizer.n_vocab} tokens: "
            f"put the model's own {TOKENIZER_FILE} into its folder"
        )
    return model, tokenizer


def model_folder(name: str) -> Path:
    """A model's folder, or a finished run's, which holds one.

    Raises:
        CheckpointError: a run that has not ended.
    """
    folder = Path(name)
    if (folder / "recipe.json").exists() and not any(folder.glob("*.safetensors")):
        if not (folder / "model").is_dir():
            raise CheckpointError(f"{folder} is a run that has not ended: finish it with `dsv3 train --out {folder}`")
        return folder / "model"
    return folder


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`, by default the greatest that torch takes."""

    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} must be at most {most}")
        return value

    return parse


def number(least: float) -> Callable[[str], float]:
    """An argparse type: a finite number of at least `least`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be a number of at least {least:g}")
        return value

    return parse


def _assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {text!r} must be FIELD=VALUE, as in --set n_routed_experts=32")
    words = {"true": True, "false": False, "none": None, "null": None}
    if value.lower() in words:
        return name, words[value.lower()]
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
