"""dsv3 train: train a model from the beginning, go on with a run that was stopped, or extend a trained model's context."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from dsv3_mini.commands.flags import TOKENIZER_FILE, add_config, model_folder, number, read_changes, read_config, whole
from dsv3_mini.config import ModelConfig
from dsv3_mini.data.stream import TokenStream
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import ConfigError
from dsv3_mini.evaluate.observer import Validation
from dsv3_mini.hub import from_pretrained, save_pretrained
from dsv3_mini.ledger import count_parameters
from dsv3_mini.machine import memory
from dsv3_mini.parallel.launch import joined, own_device
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.train.allocator import keep_freed_memory
from dsv3_mini.train.display import Display
from dsv3_mini.train.extend import extended_config, with_config
from dsv3_mini.train.recipe import EXTENSIONS, Recipe
from dsv3_mini.train.recipe import PRESETS as RECIPES
from dsv3_mini.train.replicas import Replicas
from dsv3_mini.train.run_log import read_log
from dsv3_mini.train.schedules import constant
from dsv3_mini.train.trainer import Trainer
from dsv3_mini.viz.figures.training import training_figure

STATE_BYTES = 20  # of each parameter, in FP32: weight, gradient, two moments, moving average


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, default="tiny")
    parser.add_argument(
        "--recipe", choices=[*RECIPES, *EXTENSIONS], help="how to train (default: the preset's own, else tiny's)"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="the run's folder, resumed if it holds one (default: runs/PRESET)"
    )
    parser.add_argument("--tokens", type=whole(1), metavar="N", help="stretch the recipe to so many tokens")
    parser.add_argument(
        "--mixture",
        metavar="CORPUS=SHARE,...",
        help="corpora and shares: stories, sums, code, prose, paths, hub:owner/name",
    )
    parser.add_argument("--text-column", default="text", help="the column of JSONL and Parquet that holds the text")
    parser.add_argument("--allow-network", action="store_true", help="let hub: corpora be read from the network")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a rank file in tiktoken's form (default: the one that ships)"
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp8"], help="of weights and activations; masters stay FP32"
    )
    parser.add_argument("--micro-batch", type=whole(1), help="sequences at a time: lower it where memory is short")
    parser.add_argument("--seed", type=whole(0), help="of weights and data (default: the recipe's)")
    parser.add_argument("--threads", type=whole(1, most=1024), help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--processes",
        type=whole(1, most=1024),
        help="share each batch among so many processes (default: 1, or the layout's)",
    )
    parser.add_argument(
        "--layout",
        metavar="NAME=NUMBER,...",
        help="what the processes share: pp, schedule, dp_shard, dp_replicate, ep, ep_nodes, zero; recompute; "
        "dispatch=plain, fp8 or deep_ep (default: each has all)",
    )
    parser.add_argument(
        "--restarts",
        type=whole(0),
        default=0,
        metavar="N",
        help="with --processes: start again so often when one fails",
    )
    parser.add_argument(
        "--patience", type=number(1), default=30, metavar="SECONDS",
        help="of several processes: a machine that is silent for so long is lost, and all end (default: 30)",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--judge", type=whole(0), default=16, help="samples to judge at each evaluation (default: 16)")
    parser.add_argument(
        "--extend",
        metavar="FOLDER",
        help="start from this trained model or run, stretched by YaRN to the recipe's context (default recipe: tiny-4x)",
    )
    parser.add_argument(
        "--context", type=whole(2), metavar="N", help="with --extend: tokens a row, instead of the recipe's"
    )
    parser.add_argument(
        "--trained-context",
        type=whole(1),
        metavar="N",
        help="with --extend: tokens a row in the model's first training (default: what its folder says)",
    )
    parser.add_argument("--minutes", type=number(0.01), help="stop and save after so long; run again to go on")


def run(args: argparse.Namespace) -> int:
    recipe = read_recipe(args)
    cfg = read_config(args) if args.extend is None else read_extended(args, recipe)
    args.device = own_device(args.device)
    require_device(args.device)
    require_memory(cfg, args.device)
    plan = None if args.layout is None else parse_layout(args.layout)
    if plan is not None:
        plan.check_training()
    if plan is not None and max(plan.dp_shard, plan.pp) > 1 and recipe.precision == "fp8":
        # FSDP puts weights together in BF16: FP8 would be rounded from what was rounded.
        name = "dp_shard" if plan.dp_shard > 1 else "pp"
        raise ConfigError(
            f"--precision fp8 does not go with {name} = {getattr(plan, name)} in --layout yet: use dp_replicate, with or without ep"
        )
    if not torch.distributed.is_torchelastic_launched():
        processes = args.processes or (1 if plan is None else plan.processes)
        if plan is not None:
            plan.check(cfg, processes)
        if processes > 1:
            return start_processes(processes, args.restarts)
    if args.device == "cpu":
        keep_freed_memory()
    # Ctrl-C is caught before the processes meet: one that it ended would leave the others waiting for it.
    with (
        cpu_threads(args.threads),
        stop_on_interrupt(args.minutes) as stopped,
        joined(args.device, args.patience) as replicas,
    ):
        if plan is not None and dist.is_initialized():
            # Only processes that share weights need wait for torch's parts for it.
            from dsv3_mini.parallel.pipeline_team import join

            replicas = join(plan, cfg, torch.device(args.device).type)
        return train(args, cfg, recipe, replicas, stopped)


def start_processes(count: int, restarts: int) -> int:
    """This same command in `count` processes, by torch's launcher; the exit code of the first that fails, or 0.

    The first process speaks for all; the launcher's own report of a failure would bury its line.
    """
    # The launcher is only for runs of several processes: one alone need not wait for its import.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    logs = tempfile.TemporaryDirectory(prefix="dsv3-")  # the launcher would leave a folder of its own behind
    launch = elastic_launch(
        LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            run_id=f"dsv3-{os.getpid()}", max_restarts=restarts, monitor_interval=1.0,
            logs_specs=DefaultLogsSpecs(log_dir=logs.name, local_ranks_filter={0}),
        ),
        sys.executable,
    )  # fmt: skip
    try:
        launch("-m", "dsv3_mini.cli", *sys.argv[1:])
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        # Where process 0 was killed, or told to end before it could say why.
        if 0 not in failed.failures or failed.failures[0].exitcode < 0:
            print(f"dsv3 train: process {rank} failed with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode
    except SignalException:  # Ctrl-C went on to the processes, which have saved and said so
        pass
    finally:
        logging.disable(before)
        logs.cleanup()
    return 0


def train(
    args: argparse.Namespace, cfg: ModelConfig, recipe: Recipe, replicas: Replicas, stopped: Callable[[], bool]
) -> int:
    tokenizer = Tokenizer.shipped() if args.tokenizer is None else Tokenizer.load(args.tokenizer)
    if (args.config or args.extend) and args.out is None:
        flag = "--config" if args.config else "--extend"
        raise ConfigError(f"--out is missing: a run of {flag} has no name of its own, give its folder")
    folder = Path(f"runs/{args.preset}" if args.out is None else args.out)

    def open_stream(context: int) -> TokenStream:
        return TokenStream(
            tokenizer,
            context,
            recipe.mixture,
            seed=recipe.seed,
            text_column=args.text_column,
            allow_network=args.allow_network,
        )

    start = None
    if args.extend is not None:
        start = with_config(from_pretrained(model_folder(args.extend), mtp=cfg.num_nextn_predict_layers > 0), cfg)
    trainer = Trainer(folder, cfg, recipe, tokenizer, open_stream, args.device, replicas, start)
    trained = folder / "model"
    # The tokenizer is written last: with it the model is whole.
    if trainer.tokens >= recipe.total_tokens and (trained / TOKENIZER_FILE).exists():
        if replicas.first:
            print(f"{folder} has ended ({trainer.tokens:,} tokens): its model is {trained}; another --out starts anew")
        return 0
    if not replicas.first:
        if trainer.run(should_stop=stopped):
            trainer.averaged_weights()  # for the first process, which saves them
        trainer.stream.close()
        return 0
    validation = Validation(list(recipe.mixture), tokenizer, samples=args.judge, text_column=args.text_column)
    try:
        with Display(trainer) as display:
            ended = trainer.run([display, validation], stopped)
    finally:
        trainer.stream.close()
    if not ended:
        draw_log(folder)
        print(
            f"stopped after step {trainer.step} ({trainer.tokens:,} tokens), saved: the same command goes on from here"
        )
        return 0
    # An FP8 run ends as the released model is stored.
    stored = torch.float8_e4m3fn if recipe.precision == "fp8" else torch.bfloat16
    save_pretrained(trainer.averaged_model(), trained, stored, overwrite=trained.exists())
    tokenizer.save(trained / TOKENIZER_FILE)
    draw_log(folder)
    print(f"trained: {trained}; try `dsv3 sample --model {folder}` and `dsv3 eval --model {folder}`")
    return 0


def draw_log(folder: Path) -> None:
    """RUN/training.png: the log as a picture."""
    training_figure(read_log(folder / "log.jsonl")).savefig(folder / "training.png")


def read_recipe(args: argparse.Namespace) -> Recipe:
    for flag, value in (("--context", args.context), ("--trained-context", args.trained_context)):
        if value is not None and args.extend is None:
            raise ConfigError(f"{flag} {value} goes with --extend FOLDER alone: a new model's context is its recipe's")
    own = args.preset if args.preset in RECIPES else "tiny"
    name = args.recipe or (own if args.extend is None else "tiny-4x")
    changes = {
        "total_tokens": args.tokens,
        "precision": args.precision,
        "micro_batch": args.micro_batch,
        "seed": args.seed,
        "mixture": None if args.mixture is None else parse_mixture(args.mixture),
        "context": None if args.context is None else constant("context", args.context),
    }
    return Recipe.preset(name, **{key: value for key, value in changes.items() if value is not None})


def read_extended(args: argparse.Namespace, recipe: Recipe) -> ModelConfig:
    """The config of --extend's model, stretched to the longest rows of the recipe; with the changes of --set."""
    folder = model_folder(args.extend)
    context = round(max(value for piece in recipe.context.pieces for value in (piece.start, piece.end)))
    cfg = ModelConfig.from_hf(folder)
    trained = args.trained_context or (None if cfg.rope_scaling else trained_context(Path(args.extend)))
    if trained is None and cfg.rope_scaling is None:
        raise ConfigError(
            f"--trained-context is missing: {args.extend} has no recipe.json that says how long its rows were"
        )
    return extended_config(cfg, context, trained).replace(**read_changes(args))


def trained_context(folder: Path) -> int | None:
    """The length of the rows that a run ended with, by its recipe.json; None where there is none."""
    file = folder / "recipe.json"
    if not file.exists():
        return None
    try:
        return round(json.loads(file.read_text(encoding="utf-8"))["context"][-1][2])
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        raise ConfigError(f"{file} does not say how long the rows were: give --trained-context") from None


def parse_mixture(text: str) -> dict[str, float]:
    """'stories=0.6,code=0.4' or 'my_folder' (a share of 1 where none is given)."""
    mixture: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().rpartition("=") if "=" in part else (part.strip(), "", "1")
        try:
            value = float(share)
        except ValueError:
            raise ConfigError(
                f"--mixture: the share of {name!r} is {share!r}: give a number, as in stories=0.6,code=0.4"
            ) from None
        if not 0 < value < float("inf"):
            raise ConfigError(
                f"--mixture: the share of {name!r} is {share}: it must be above 0, or leave the corpus out"
            )
        if not name or name in mixture:
            raise ConfigError(f"--mixture {text!r}: {'a corpus has no name' if not name else name + ' stands twice'}")
        mixture[name] = value
    return mixture


def parse_layout(text: str) -> ParallelPlan:
    """'pp=2,schedule=DualPipeV,dp_shard=4,ep=2,zero=1' or 'ep=2,dispatch=fp8,recompute': the fields of a `ParallelPlan`."""
    fields: dict[str, int | bool | str] = {}
    known = [field.name for field in dataclasses.fields(ParallelPlan)]
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        new = name in known and name not in fields
        if new and name == "recompute" and not value:
            fields[name] = True
        elif new and name in ("schedule", "dispatch") and value:
            fields[name] = value
        elif new and name not in ("recompute", "schedule", "dispatch") and value.isdecimal():
            fields[name] = int(value)
        else:
            raise ConfigError(
                f"--layout: {part.strip()!r} must be one of {', '.join(known)}, once, and (but for recompute, schedule and "
                "dispatch) a number: ep=2"
            )
    return ParallelPlan(**fields)


def require_device(device: str) -> None:
    """Raises ConfigError unless torch can train there."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"--device {device} is not known: give cpu, cuda, or cuda:N for GPU number N")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device} is not here: this machine has no CUDA GPU, leave --device out")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= torch.cuda.device_count():
        raise ConfigError(f"--device {device} is not here: CUDA GPUs are numbered 0 to {torch.cuda.device_count() - 1}")


def require_memory(cfg: ModelConfig, device: str) -> None:
    """Raises ConfigError where not even the training state fits: a machine that runs out may end other programs, too."""
    needed = STATE_BYTES * count_parameters(cfg).live
    there = memory()[0] if device == "cpu" else torch.cuda.get_device_properties(device).total_memory
    if there is not None and needed > there:
        raise ConfigError(
            f"training this model takes {needed / 1e9:,.0f} GB and {device} has {there / 1e9:,.0f} GB: choose a smaller "
            "--preset, or make it smaller with --set"
        )


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """torch's threads for a while; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stop_on_interrupt(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Ctrl-C (or a time limit) asks the run to stop after its step; a second Ctrl-C stops it where it is."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        for caught in before:
            signal.signal(caught, signal.default_int_handler)

    before = {caught: signal.signal(caught, ask) for caught in (signal.SIGINT, signal.SIGTERM)}
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    try:
        yield lambda: asked or time.monotonic() > deadline
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
