"""Nano runs for lesson 09: one model, one stream of text, balanced in different ways.

    python -m dsv3_mini.course.balance_runs             # trains all of them and writes data/balance/runs.json (minutes)
    python -m dsv3_mini.course.balance_runs --table     # trains nothing: the medians of what is written there

A run is `balance_steps`, which the lesson also trains live. What is kept of the runs is a film for each pair of gamma and
alpha (load and biases of every expert, the loss), and the scores of the lesson's `WAYS` for three seeds, on held-out text.

Simplified against a real training: stories and sums alone, read through the first 504 tokens of the shipped tokenizer; one
learning rate after a warm-up; no multi-token prediction; no groups of experts (lesson 10 adds them).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.pretrain_run import apart
from dsv3_mini.data.packing import IGNORED, inputs_and_targets
from dsv3_mini.data.shipped import shipped, shipped_root
from dsv3_mini.data.stream import TokenStream, held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import UserError
from dsv3_mini.files import write_text
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.router import Routing
from dsv3_mini.train.balance import LoadCounter, routers, update_biases
from dsv3_mini.train.losses import cross_entropy, sequence_balance_loss, token_losses

Batch = tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]

SHAPE = ModelConfig.preset("nano", vocab_size=512, n_group=1, topk_group=1, num_nextn_predict_layers=0)
MIXTURE = {"stories": 0.6, "sums": 0.4}
ROWS, CONTEXT, STEPS, EVERY = 12, 64, 180, 2  # sequences a step, tokens in each; steps a run, and a frame of its film
MOST = SHAPE.n_routed_experts / SHAPE.num_experts_per_tok  # even shares of an expert that every token visits
HELD_OUT_ROWS = {"stories": 36, "sums": 24}
RECORDED = "balance/runs.json"
COMMAND = "python -m dsv3_mini.course.balance_runs"


@dataclass(frozen=True)
class Way:
    """How a run is balanced: `gamma` moves biases; `alpha` weighs a balance loss `over` each "sequence" or the "batch"."""

    gamma: float = 0.0
    alpha: float = 0.0
    over: str = "sequence"


WAYS: dict[str, Way] = {
    "left alone": Way(),
    "biases": Way(gamma=0.01),
    "loss over sequences": Way(alpha=0.1),
    "loss over the batch": Way(alpha=0.1, over="batch"),
    "biases and a little loss": Way(gamma=0.01, alpha=0.01),
}
RACE = ("left alone", "biases", "loss over sequences")  # those that the lesson trains side by side
SEEDS = (0, 1, 2)
GAMMAS = (0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
ALPHAS = (0.0, 0.01, 0.1)
TARGET, PRICE = 0.4, 0.01  # the exercise: MaxVio at most this, for a loss at most this share above that of "left alone"


# ---- a run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """One step: its loss in nats per token (the balance loss left out), the load of its batch, the biases after it."""

    number: int
    loss: float
    load: Int[Tensor, "l e"]
    bias: Float[Tensor, "l e"]


def balance_steps(
    model: DeepSeekV3, batches: Iterable[Batch], way: Way, learning_rate: float = 3e-3, warmup: int = 10
) -> Iterator[Frame]:
    """Train, one step for each `next`, and balance the experts in this way."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for number, (tokens, targets) in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, number / warmup)
        states = model.hidden_states(tokens)
        main = cross_entropy(states.main, model.lm_head.weight, targets)
        balance = sum(balance_loss(routing, way.over) for routing in states.routing)
        (main + way.alpha * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        counter = LoadCounter()
        counter.add(states.routing)
        update_biases(model, counter.load, way.gamma)
        bias = torch.stack([router.e_score_correction_bias for router in routers(model)])
        yield Frame(number, main.item(), torch.stack(list(counter.load.values())), bias)


def balance_loss(routing: Routing, over: str) -> Float[Tensor, ""]:
    """Equations 17-20 for each sequence; or the same for the batch, as if it were one long sequence."""
    scores = rearrange(routing.scores, "b s e -> 1 (b s) e") if over == "batch" else routing.scores
    return sequence_balance_loss(scores, routing.chosen.shape[-1])


def fresh_model(seed: int = 0) -> DeepSeekV3:
    """The same first weights for every way; the caller's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DeepSeekV3(SHAPE)


@cache
def small_tokenizer() -> Tokenizer:
    """512 tokens, special tokens included: with them the head is small, and a step takes milliseconds."""
    return Tokenizer.from_ranks(Tokenizer.shipped().ranks[:504])


@cache
def training_batches(steps: int = STEPS, seed: int = 0) -> tuple[Batch, ...]:
    """The text of a run, made once, so that every way reads the same."""
    tokenizer = small_tokenizer()
    stream = TokenStream(tokenizer, CONTEXT, MIXTURE, seed=seed, fim_rate=0.0, split_rate=0.0)
    rows = [stream.next_batch(ROWS) for _ in range(steps)]
    stream.close()
    return tuple(inputs_and_targets(batch, tokenizer.pad_id) for batch in rows)


# ---- what a run is worth -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Measured on held-out text, with the weights and biases of a run's end; averages over the sparse layers.

    loss: nats per token. max_vio: of the load of all the text. sequence_vio: the mean over single sequences. apart: the
    share of visits that would have to move for stories and sums to have the same load.
    """

    loss: float
    max_vio: float
    sequence_vio: float
    apart: float


def violations(load: Float[Tensor, "*n e"]) -> Float[Tensor, "*n"]:
    """MaxVio of many loads at once: the busiest expert's excess over an even share, in even shares."""
    counted = load.float()
    return counted.amax(-1) / counted.mean(-1).clamp(min=1e-9) - 1


@torch.no_grad()
def score(model: DeepSeekV3) -> Score:
    """Loss and load on stories and sums that training never reads."""
    loads = {domain: sequence_loads(model, tokens) for domain, (tokens, _) in held_out().items()}  # [l b e]
    lost = kept = 0.0
    for tokens, targets in held_out().values():
        main, _ = model.main_states(tokens)
        lost += token_losses(main, model.lm_head.weight, targets).sum().item()
        kept += (targets != IGNORED).sum().item()
    stories, sums = (reduce(load, "l b e -> l e", "sum") for load in loads.values())
    return Score(
        loss=lost / kept,
        max_vio=violations(stories + sums).mean().item(),
        sequence_vio=violations(torch.cat(list(loads.values()), dim=1)).mean().item(),
        apart=apart(torch.stack([stories, sums])).mean().item(),
    )


@torch.no_grad()
def sequence_loads(model: DeepSeekV3, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "l b e"]:
    """How many choices of each single sequence fell on each expert, layer by layer."""
    _, routings = model.main_states(tokens)
    chosen = torch.stack([routing.chosen for routing in routings])
    picked = nn.functional.one_hot(chosen, model.cfg.n_routed_experts)
    return reduce(picked.float(), "l b s k e -> l b e", "sum")


@cache
def held_out() -> dict[str, Batch]:
    """Domain -> inputs and targets, in the shares of the training mixture."""
    tokenizer = small_tokenizer()
    return {
        domain: inputs_and_targets(held_out_rows(domain, tokenizer, CONTEXT, rows).tokens, tokenizer.pad_id)
        for domain, rows in HELD_OUT_ROWS.items()
    }


# ---- films -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Film:
    """A run in frames of `EVERY` steps: mean loss, load of all its batches, biases at its end."""

    gamma: float
    alpha: float
    loss: Float[Tensor, " frames"]
    load: Int[Tensor, "frames l e"]
    bias: Float[Tensor, "frames l e"]
    score: Score

    @property
    def share(self) -> Float[Tensor, "frames l e"]:
        """Load in even shares: 1 is what each would get if all got the same."""
        return self.load / reduce(self.load.float(), "frames l e -> frames l 1", "mean")

    @property
    def max_vio(self) -> Float[Tensor, "frames l"]:
        return violations(self.load)

    def __len__(self) -> int:
        return len(self.loss)

    def to_record(self) -> dict[str, Any]:
        """As plain JSON. A bias is a whole number of moves of gamma, and is kept as that."""
        moves = (self.bias / self.gamma).round().int() if self.gamma else torch.zeros_like(self.load)
        return {
            "gamma": self.gamma,
            "alpha": self.alpha,
            "score": _rounded(self.score),
            "loss": [round(loss, 3) for loss in self.loss.tolist()],
            "load": self.load.tolist(),
            "moves": moves.tolist(),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Film:
        gamma = record["gamma"]
        load, moves = torch.tensor(record["load"]), torch.tensor(record["moves"])
        return cls(gamma, record["alpha"], torch.tensor(record["loss"]), load, gamma * moves, Score(**record["score"]))


def film_of(frames: Sequence[Frame], way: Way, scored: Score) -> Film:
    """A run's steps, `EVERY` of them to a frame; steps that fill no frame are left out."""
    frames = frames[: len(frames) // EVERY * EVERY]
    load, bias = (torch.stack([getattr(frame, name) for frame in frames]) for name in ("load", "bias"))
    loss = torch.tensor([frame.loss for frame in frames])
    return Film(
        way.gamma,
        way.alpha,
        reduce(loss, "(frames every) -> frames", "mean", every=EVERY),
        reduce(load, "(frames every) l e -> frames l e", "sum", every=EVERY),
        rearrange(bias, "(frames every) l e -> frames every l e", every=EVERY)[:, -1],
        scored,
    )


@dataclass(frozen=True)
class Trial:
    """One run, of which only the score was kept."""

    way: Way
    seed: int
    score: Score


@dataclass(frozen=True)
class Recording:
    """All recorded runs. films: one for each pair of gamma and alpha, of seed 0. trials: `WAYS` for each seed."""

    films: tuple[Film, ...]
    trials: tuple[Trial, ...]

    @property
    def gammas(self) -> list[float]:
        return sorted({film.gamma for film in self.films})

    @property
    def alphas(self) -> list[float]:
        return sorted({film.alpha for film in self.films})

    def film(self, gamma: float, alpha: float = 0.0) -> Film:
        """The film of one pair.

        Raises:
            UserError: no such run was recorded.
        """
        for film in self.films:
            if (film.gamma, film.alpha) == (gamma, alpha):
                return film
        gammas, alphas = (", ".join(f"{value:g}" for value in values) for values in (self.gammas, self.alphas))
        raise UserError(f"gamma = {gamma:g}, alpha = {alpha:g} was not recorded: gamma is {gammas}; alpha is {alphas}")

    def median(self, way: Way) -> Score:
        """The median over the seeds, number by number."""
        scores = [asdict(trial.score) for trial in self.trials if trial.way == way]
        return Score(**{name: statistics.median(each[name] for each in scores) for name in scores[0]})

    def reaches(self, gamma: float) -> bool:
        """Whether this gamma solves the exercise: balance at `TARGET` or better, at no more than `PRICE`."""
        tuned, alone = self.film(gamma).score, self.film(0.0).score
        return tuned.max_vio <= TARGET and tuned.loss <= (1 + PRICE) * alone.loss

    def to_text(self) -> str:
        """JSON, a run a line."""
        films = ",\n".join(json.dumps(film.to_record(), separators=(",", ":")) for film in self.films)
        trials = ",\n".join(
            json.dumps({**asdict(each.way), "seed": each.seed, "score": _rounded(each.score)}) for each in self.trials
        )
        return f'{{"made_by": "{COMMAND}",\n"films": [\n{films}\n],\n"trials": [\n{trials}\n]}}\n'

    @classmethod
    def from_text(cls, text: str) -> Recording:
        values = json.loads(text)
        trials = [
            Trial(Way(each["gamma"], each["alpha"], each["over"]), each["seed"], Score(**each["score"]))
            for each in values["trials"]
        ]
        return cls(tuple(map(Film.from_record, values["films"])), tuple(trials))


@cache
def recorded() -> Recording:
    """The runs that ship with the course."""
    return Recording.from_text(shipped(RECORDED).read_text(encoding="utf-8"))


def train(way: Way, seed: int = 0, steps: int = STEPS) -> Film:
    """One whole run."""
    model = fresh_model(seed)
    frames = list(balance_steps(model, training_batches(steps, seed), way))
    return film_of(frames, way, score(model))


def record(workers: int) -> Recording:
    """Train everything that is kept, a run to a process at a time."""
    grid = [(Way(gamma, alpha), 0) for gamma in GAMMAS for alpha in ALPHAS]
    trials = [(way, seed) for way in WAYS.values() for seed in SEEDS]
    tasks = sorted({*grid, *trials}, key=lambda task: (task[1], *asdict(task[0]).values()))
    films = {}
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for task, film in zip(tasks, pool.map(_train, tasks), strict=True):
            films[task] = film
            print(f"{len(films)} of {len(tasks)}", *asdict(task[0]).values(), film.score, file=sys.stderr, flush=True)
    return Recording(
        tuple(films[task] for task in grid), tuple(Trial(way, seed, films[way, seed].score) for way, seed in trials)
    )


def table(recording: Recording) -> str:
    """The medians over the seeds, a way a line."""
    lines = [f"{'':26}{'gamma':>7}{'alpha':>7}{'loss':>8}{'MaxVio':>8}{'of a sequence':>15}{'apart':>7}"]
    for name, way in WAYS.items():
        s = recording.median(way)
        lines.append(
            f"{name:26}{way.gamma:>7g}{way.alpha:>7g}{s.loss:>8.3f}{s.max_vio:>8.2f}{s.sequence_vio:>15.2f}{s.apart:>7.2f}"
        )
    return "\n".join(lines)


def _train(task: tuple[Way, int]) -> Film:
    return train(*task)


def _rounded(scored: Score) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(scored).items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Record the runs of lesson 09.")
    parser.add_argument("--table", action="store_true", help="train nothing, print the medians of what is recorded")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, help="the file to write; default: where the course reads it")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(recorded()))
        return 0
    recording = record(options.workers)
    out = options.out or shipped_root(Path(__file__).resolve().parents[1]) / RECORDED
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, recording.to_text())
    print(table(recording))
    return 0


if __name__ == "__main__":
    sys.exit(main())
