"""Trainings for lesson 16: one model on one stream of text, in BF16, in FP32, in FP8, and in FP8 with one choice turned round.

    python -m dsv3_mini.course.fp8_runs                      # trains, and writes data/fp8/runs.json
    python -m dsv3_mini.course.fp8_runs --table              # trains nothing: the distances of what is written there

A run is `training_steps`, which the lesson also trains live. All runs of a size and seed start from the same FP32 weights and read
the same text in the same order, so that what differs is arithmetic. FP32 beside BF16 is the yardstick: how far two runs drift
apart where nothing but rounding differs, and neither is at fault.

What the lesson measures beside runs stands here too: one linear layer with outliers (`layer_errors`), and gradients of a
model by its parts (`gradients`, `differences`).

Simplified against `dsv3 train`: one process, no checkpoints, no moving average of the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.data.packing import inputs_and_targets
from dsv3_mini.data.shipped import shipped, shipped_root
from dsv3_mini.data.stream import TokenStream, held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import UserError
from dsv3_mini.evaluate.bits_per_byte import held_out_loss
from dsv3_mini.files import write_text
from dsv3_mini.fp8.convert import to_fp8
from dsv3_mini.fp8.linear import FP8Linear
from dsv3_mini.fp8.recipe import ABLATIONS, REPORT, Fp8Recipe
from dsv3_mini.hub import from_pretrained
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.train.balance import LoadCounter, update_biases
from dsv3_mini.train.losses import training_losses
from dsv3_mini.train.optimizer import MasterAdamW
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.schedules import Piece, Schedule, constant

Batch = tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]

RECORDED = "fp8/runs.json"
COMMAND = "python -m dsv3_mini.course.fp8_runs"
LINE = 0.0025  # the report's: relative loss error against BF16 stays below it
BASE, YARDSTICK, REPORTS = "BF16", "FP32", "FP8"

# ---- what is trained ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """In which numbers a run computes: `dtype` for all that is not FP8, and how linears and experts are quantised, if they are."""

    dtype: torch.dtype
    recipe: Fp8Recipe | None = None

    @property
    def moments(self) -> torch.dtype:
        """Of Adam's moments: BF16 belongs to the FP8 recipe."""
        return torch.float32 if self.recipe is None else torch.bfloat16


WAYS: dict[str, Way] = {
    BASE: Way(torch.bfloat16),
    YARDSTICK: Way(torch.float32),
    REPORTS: Way(torch.bfloat16, REPORT),
    **{name: Way(torch.bfloat16, recipe) for name, recipe in ABLATIONS.items() if recipe != REPORT},
}


@dataclass(frozen=True)
class Size:
    """A model, how it is trained and for how many steps; `ways` are those that are recorded, in this order."""

    cfg: ModelConfig
    recipe: Recipe
    steps: int
    small_tokenizer: bool
    ways: tuple[str, ...]
    held_out_rows: int  # of each domain
    trained: str | None = None  # the model that ships whose weights the runs start from; None: new ones


def _nano_recipe(steps: int, rows: int = 12, context: int = 64) -> Recipe:
    tokens, warmup = steps * rows * context, 10 * rows * context
    return Recipe.preset("nano").replace(
        total_tokens=tokens,
        learning_rate=Schedule("learning_rate", (Piece(warmup, 0.0, 3e-3), Piece(float(10**12), 3e-3, 3e-3))),
        batch_size=constant("batch_size", rows),
        context=constant("context", context),
        gamma=constant("gamma", 0.01),
        mtp_lambda=constant("mtp_lambda", 0.0),
        mixture={"stories": 0.6, "sums": 0.4},
    )


SIZES: dict[str, Size] = {
    "nano": Size(
        ModelConfig.preset("nano", vocab_size=512, num_nextn_predict_layers=0),
        _nano_recipe(150),
        steps=150,
        small_tokenizer=True,
        ways=tuple(WAYS),
        held_out_rows=32,
    ),
    # Whole as `dsv3 train --preset tiny` begins it.
    "tiny": Size(
        ModelConfig.preset("tiny"),
        Recipe.preset("tiny"),
        steps=400,
        small_tokenizer=False,
        ways=(BASE, YARDSTICK, REPORTS),
        held_out_rows=24,
    ),
    # The trained model, trained on at a quarter of its highest rate. New weights learn so fast that a rounding decides who
    # learns a thing first; here little is left to learn, the runs stay together, and a small distance can be seen. Of the
    # choices turned round the one that everybody made before the report is kept beside it.
    "tiny-trained": Size(
        ModelConfig.preset("tiny"),
        Recipe.preset("tiny").replace(learning_rate=constant("learning_rate", 6e-4), gamma=constant("gamma", 0.0)),
        steps=300,
        small_tokenizer=False,
        ways=(BASE, YARDSTICK, REPORTS, "per-tensor scaling"),
        held_out_rows=24,
        trained="tiny",
    ),
}
SEEDS = (0, 1, 2)


class Step(NamedTuple):
    """One optimizer step: its number from 1, and the main loss of its batch in nats per token, before it."""

    number: int
    loss: float


def fresh_model(size: str, way: str, seed: int = 0) -> tuple[DeepSeekV3, dict[str, Tensor]]:
    """A model that computes in this way, and the FP32 weights that it was made of: the same ones for every way.

    The caller's random numbers stay as they were.
    """
    chosen = SIZES[size]
    if chosen.trained:
        model = from_pretrained(shipped(chosen.trained))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DeepSeekV3(chosen.cfg)
        if chosen.recipe.head_from_embedding:
            with torch.no_grad():
                model.lm_head.weight.copy_(model.embed_tokens.weight)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if WAYS[way].recipe is not None:
        model = to_fp8(model, WAYS[way].recipe)
    return model.to(WAYS[way].dtype), start


def training_steps(
    model: DeepSeekV3,
    start: Mapping[str, Tensor],
    batches: Iterable[Batch],
    recipe: Recipe,
    moments: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Train, one step for each `next`. Masters are FP32 and begin at `start`, whatever the model computes in."""
    optimizer = MasterAdamW(model, recipe.betas, recipe.weight_decay, 0.0, start, moments)
    seen = 0
    for number, (tokens, targets) in enumerate(batches, start=1):
        losses = training_losses(model, tokens, targets, recipe.mtp_lambda(seen), recipe.alpha)
        losses.total.backward()
        optimizer.clip_gradients(recipe.clip_norm)
        optimizer.step(recipe.learning_rate(seen))
        counter = LoadCounter()
        counter.add(losses.routing)
        update_biases(model, counter.load, recipe.gamma(seen))
        seen += tokens.numel()
        yield Step(number, losses.main.item())


def tokenizer_of(size: str) -> Tokenizer:
    """The shipped one; for nano its first 504 tokens and the special ones, so that the head is small."""
    whole = Tokenizer.shipped()
    return Tokenizer.from_ranks(whole.ranks[:504]) if SIZES[size].small_tokenizer else whole


@cache
def training_batches(size: str, steps: int, seed: int = 0) -> tuple[Batch, ...]:
    """The text of a run, made once, so that every way reads the same."""
    tokenizer, recipe = tokenizer_of(size), SIZES[size].recipe
    stream = TokenStream(tokenizer, round(recipe.context(0)), recipe.mixture, seed=seed)
    batches, seen = [], 0
    for _ in range(steps):
        batch = inputs_and_targets(stream.next_batch(round(recipe.batch_size(seen))), tokenizer.pad_id)
        seen += batch[0].numel()
        batches.append(batch)
    stream.close()
    return tuple(batches)


def held_out(size: str, model: DeepSeekV3) -> float:
    """The loss on stories and sums that training never reads, in nats per token."""
    tokenizer, context = tokenizer_of(size), round(SIZES[size].recipe.context(0))
    rows = [
        held_out_rows(domain, tokenizer, context, SIZES[size].held_out_rows).tokens for domain in ("stories", "sums")
    ]
    return held_out_loss(model, torch.cat(rows), tokenizer.pad_id).per_token


# ---- what is kept ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training. loss: of each step, in nats per token. held_out: at its end, on text never read."""

    size: str
    way: str
    seed: int
    loss: tuple[float, ...]
    held_out: float


def last_third(losses: Sequence[float]) -> float:
    """The mean of the last third of the steps."""
    return statistics.fmean(losses[-max(1, len(losses) // 3) :])


def relative_gap(losses: Sequence[float], base: Sequence[float]) -> float:
    """(loss - base) / base, each the mean of its last third: the report's relative loss error, smoothed."""
    return last_third(losses) / last_third(base) - 1


@dataclass(frozen=True)
class Recording:
    """All recorded runs."""

    runs: tuple[Run, ...]

    @property
    def sizes(self) -> list[str]:
        """Those of which something was recorded, the smallest first."""
        return [size for size in SIZES if any(run.size == size for run in self.runs)]

    @property
    def largest(self) -> str:
        return self.sizes[-1]

    def seeds(self, size: str, way: str = BASE) -> list[int]:
        """Those of which BF16 and this way were recorded."""
        seeds = [{run.seed for run in self.runs if (run.size, run.way) == (size, which)} for which in (BASE, way)]
        return sorted(seeds[0] & seeds[1])

    def ways(self, size: str) -> list[str]:
        """In the order of `WAYS`, BF16 first."""
        return [way for way in WAYS if any((run.size, run.way) == (size, way) for run in self.runs)]

    def run(self, size: str, way: str, seed: int = 0) -> Run:
        """One run.

        Raises:
            UserError: no such run was recorded.
        """
        for run in self.runs:
            if (run.size, run.way, run.seed) == (size, way, seed):
                return run
        there = ", ".join(f"{run.size} {run.way} {run.seed}" for run in self.runs)
        raise UserError(f"size {size!r}, way {way!r}, seed {seed} was not recorded: there are {there}")

    def losses(self, size: str, seed: int = 0) -> dict[str, tuple[float, ...]]:
        """Way -> losses, BF16 first."""
        return {way: self.run(size, way, seed).loss for way in self.ways(size)}

    def gap(self, size: str, way: str, seed: int = 0) -> float:
        """The relative distance of the training loss from BF16's, smoothed over the last third."""
        return relative_gap(self.run(size, way, seed).loss, self.run(size, BASE, seed).loss)

    def mean_gap(self, size: str, way: str) -> float:
        """`gap`, of the losses of all seeds together: what the drift of single runs leaves over."""
        means = [
            statistics.fmean(last_third(self.run(size, w, s).loss) for s in self.seeds(size, way)) for w in (way, BASE)
        ]
        return means[0] / means[1] - 1

    def with_run(self, run: Run) -> Recording:
        """This one with the run in the place of that of the same size, way and seed, or in its place in the order."""
        places = {name: place for place, name in enumerate((*SIZES, *WAYS))}
        key = {(r.size, r.way, r.seed): r for r in (*self.runs, run)}
        return Recording(tuple(sorted(key.values(), key=lambda r: (places[r.size], r.seed, places[r.way]))))

    def to_text(self) -> str:
        """JSON, a run a line."""
        records = [
            {"size": r.size, "way": r.way, "seed": r.seed, "held_out": round(r.held_out, 5),
             "loss": [round(loss, 4) for loss in r.loss]}
            for r in self.runs
        ]  # fmt: skip
        lines = ",\n".join(json.dumps(record, separators=(",", ":")) for record in records)
        return f'{{"made_by": "{COMMAND}",\n"runs": [\n{lines}\n]}}\n'

    @classmethod
    def from_text(cls, text: str) -> Recording:
        return cls(tuple(Run(**{**each, "loss": tuple(each["loss"])}) for each in json.loads(text)["runs"]))


@cache
def recorded() -> Recording:
    """The runs that ship with the course."""
    return Recording.from_text(shipped(RECORDED).read_text(encoding="utf-8"))


def train(size: str, way: str, seed: int = 0, steps: int | None = None) -> Run:
    """One whole run."""
    model, start = fresh_model(size, way, seed)
    batches = training_batches(size, steps or SIZES[size].steps, seed)
    steps_done = training_steps(model, start, batches, SIZES[size].recipe, WAYS[way].moments)
    losses = tuple(step.loss for step in steps_done)
    return Run(size, way, seed, losses, held_out(size, model))


def record(sizes: Sequence[str], seeds: Sequence[int], workers: int, steps: int | None = None) -> Iterator[Run]:
    """Train all ways of these sizes, a run to a process at a time; each comes when it has ended."""
    tasks = [(size, way, seed, steps) for size in sizes for seed in seeds for way in SIZES[size].ways]
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for number, run in enumerate(pool.map(_train, tasks), start=1):
            said = f"{number} of {len(tasks)}: {run.size}, {run.way}, seed {run.seed}: {last_third(run.loss):.4f}"
            print(said, file=sys.stderr, flush=True)
            yield run


def table(recording: Recording) -> str:
    """A line for each size and way: its distance from BF16 in percent, for each seed, for all, and on held-out text."""
    lines = []
    for size in recording.sizes:
        seeds, steps = recording.seeds(size), len(recording.run(size, BASE).loss)
        names = "".join(f"{f'seed {seed}':>10}" for seed in seeds)
        lines.append(f"{f'{size}, {steps} steps':24}{names}{'all':>10}{'held out':>12}")
        for way in recording.ways(size):
            if way != BASE:
                known = recording.seeds(size, way)
                gaps = "".join(f"{recording.gap(size, way, s):>+10.3%}" if s in known else " " * 10 for s in seeds)
                mean, held = recording.mean_gap(size, way), held_out_gap(recording, size, way)
                lines.append(f"{way:24}{gaps}{mean:>+10.3%}{held:>+12.3%}")
    return "\n".join(lines)


def held_out_gap(recording: Recording, size: str, way: str) -> float:
    """The relative distance from BF16's on held-out text at the end: the median over the seeds."""
    pairs = [(recording.run(size, way, seed), recording.run(size, BASE, seed)) for seed in recording.seeds(size, way)]
    return statistics.median(run.held_out / base.held_out - 1 for run, base in pairs)


def _train(task: tuple[str, str, int, int | None]) -> Run:
    return train(*task)


# ---- one layer, with outliers ------------------------------------------------------------------------------------------

RESULTS = ("y (Fprop)", "dx (Dgrad)", "dw (Wgrad)")
TOKENS, WIDTH, LOUD = 2048, 128, 64  # rows and both widths of the layer; every so many tokens one is loud


class Off(NamedTuple):
    """How far a result is off, relative to its size: `error` in all, `missing` what is systematically too small."""

    error: float
    missing: float


@cache
def layer_errors(recipe: Fp8Recipe, outlier: float = 1.0) -> dict[str, Off]:
    """The three results of one FP8 linear against FP32, by name in `RESULTS`.

    Inputs, weights and the gradient that arrives are normal numbers; of every `LOUD` tokens one is `outlier` times as large, in
    its activations and in its gradient. y and dx are judged by the median over the tokens: a token that is lost
    altogether counts, however quiet it is beside the loud ones. dw is one matrix and is judged whole.
    """
    random = torch.Generator().manual_seed(0)
    x, g = (torch.randn(TOKENS, WIDTH, generator=random) for _ in range(2))
    for rows in (x, g):
        rows[::LOUD] *= outlier
    layer = FP8Linear(WIDTH, WIDTH)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=random) * WIDTH**-0.5)
    layer.recipe = recipe
    x.requires_grad_()
    y = layer(x)
    dx, dw = torch.autograd.grad(y, [x, layer.weight], g)
    with torch.no_grad():
        exact = (x @ layer.weight.T, g @ layer.weight, g.T @ x)
        rows = [(y, exact[0]), (dx, exact[1]), (dw.flatten()[None], exact[2].flatten()[None])]
        return {name: _off(got.float(), right) for name, (got, right) in zip(RESULTS, rows, strict=True)}


def _off(got: Float[Tensor, "r c"], right: Float[Tensor, "r c"]) -> Off:
    """The medians over the rows."""
    size = right.norm(dim=-1)
    error = (got - right).norm(dim=-1) / size
    missing = 1 - (got * right).sum(-1) / size.square()
    return Off(error.median().item(), missing.median().item())


# ---- the gradients of a model, by its parts ----------------------------------------------------------------------------


def gradients(model: DeepSeekV3, tokens: Int[Tensor, "b s"], targets: Int[Tensor, "b s"]) -> dict[str, Tensor]:
    """Parameter -> its gradient of the main loss, in FP32; those that the loss does not reach are left out."""
    loss = training_losses(model, tokens, targets, 0.0, 0.0).total
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g.float() for name, g in zip(parameters, found, strict=True) if g is not None}


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to."""
    rules = {
        "norm": "norms",
        "self_attn.": "attention",
        "mlp.experts.": "routed experts",
        "mlp.gate.": "router",
        "mlp.": "other feed-forwards",
        "embed_tokens.": "embedding",
        "lm_head.": "head",
    }
    return next(part for begin, part in rules.items() if begin in name)


def differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Part -> how far the gradients `other` are from `one`, relative to the size of `one`."""
    apart: dict[str, float] = defaultdict(float)
    size: dict[str, float] = defaultdict(float)
    for name, gradient in one.items():
        part = part_of(name)
        apart[part] += float((other[name] - gradient).square().sum())
        size[part] += float(gradient.square().sum())
    return {part: (apart[part] / size[part]) ** 0.5 for part in size}


# ---- the command -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Record the runs of lesson 16.")
    parser.add_argument("--table", action="store_true", help="train nothing, print the distances of what is recorded")
    parser.add_argument(
        "--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="other runs stay as they are"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, help="of a run; default: nano 150, tiny 400, tiny-trained 300")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, help="the file to write; default: where the course reads it")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(recorded()))
        return 0
    out = options.out or shipped_root(Path(__file__).resolve().parents[1]) / RECORDED
    recording = Recording.from_text(out.read_text(encoding="utf-8")) if out.exists() else Recording(())
    out.parent.mkdir(parents=True, exist_ok=True)
    for run in record(options.sizes, options.seeds, options.workers, options.steps):
        recording = recording.with_run(run)
        write_text(out, recording.to_text())  # whoever stops here keeps what has ended
    print(table(recording))
    return 0


if __name__ == "__main__":
    sys.exit(main())
