"""The run of lesson 13: a nano model on all four domains, in half a minute or as long as one likes. And what is read from runs.

It is a run as `dsv3 train` makes them, by the package's trainer, but for what is measured on the way: little, so that it can
be measured often. Lines of a run are those of its log.jsonl (`train/trainer.py`), as JSON gives them back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.data.corpora import DOMAINS
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.story_judge import well_formed_sentence
from dsv3_mini.data.stream import HeldOut, held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.evaluate.bits_per_byte import held_out_loss
from dsv3_mini.evaluate.judged import sample_stories
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.trainer import Observer, Trainer

SHAPE = ModelConfig.preset("nano", initializer_range=0.08)
TOKENS = 100_000  # half a minute on one core
SAMPLES, SAMPLE_TOKENS, TEMPERATURE = 4, 48, 0.7  # of the stories that are sampled at each evaluation
ROWS = 8  # held-out rows of each domain

Line = Mapping[str, Any]


def run_recipe(tokens: int = TOKENS) -> Recipe:
    """The recipe `nano`, its schedules stretched to so many tokens; measured seven times on the way."""
    return Recipe.preset(
        "nano",
        total_tokens=tokens,
        ema_decay=0.95,
        head_from_embedding=True,
        evaluate_every=max(1, tokens // 7),
        checkpoint_every=max(1, tokens // 4),
    )


# ---- measured on the way -----------------------------------------------------------------------------------------------


class Scores(Observer):
    """Held-out loss and bits per byte of each domain, and sampled stories read by the grammar. Measures the averaged weights.

    The held-out rows are made once; a sample begins with the first token of a held-out story and is a few sentences long.
    """

    def __init__(self, domains: Sequence[str], tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer = tokenizer
        self.held_out: dict[str, HeldOut] = {
            domain: held_out_rows(domain, tokenizer, context, ROWS) for domain in domains
        }

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        model, tokenizer = trainer.averaged_model(), self.tokenizer
        scores: dict[str, Any] = {"validation_loss": {}, "bits_per_byte": {}}
        for domain, rows in self.held_out.items():
            loss = held_out_loss(model, rows.tokens, tokenizer.pad_id)
            scores["validation_loss"][domain] = round(loss.per_token, 4)
            scores["bits_per_byte"][domain] = round(loss.bits_per_byte(rows.n_bytes), 4)
        texts = sample_stories(model, tokenizer, SAMPLES, TEMPERATURE, seed=0, most=SAMPLE_TOKENS)
        judged = [well_formed for text in texts for _, well_formed in read_by_grammar(text) if well_formed is not None]
        share = sum(judged) / max(1, len(judged))
        return {**scores, "judged": {"sentences_well_formed": round(share, 4)}, "sample": texts[0]}


def read_by_grammar(text: str) -> list[tuple[str, bool | None]]:
    """The sentences of a story's first line, and whether the grammar has each; None for an end that is no whole sentence."""
    line = text.split("\n", 1)[0].strip()
    sentences = [part for part in re.split(r"(?<=\.) ", line) if part]
    return [(part, well_formed_sentence(part) if part.endswith(".") else None) for part in sentences]


# ---- a run's lines -----------------------------------------------------------------------------------------------------


def read_log(file: Path) -> list[Line]:
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def shipped_run() -> list[Line]:
    """The log of the run that made the tiny model."""
    return read_log(shipped("tiny/log.jsonl"))


def thinned(lines: Sequence[Line], most: int) -> list[Line]:
    """At most `most` of them, evenly spaced; the last is always among them."""
    if len(lines) <= most:
        return list(lines)
    kept = list(lines[:: -(-len(lines) // (most - 1))])
    return kept if kept[-1] is lines[-1] else [*kept, lines[-1]]


# ---- who works for whom ------------------------------------------------------------------------------------------------


def reference_rows(
    tokenizer: Tokenizer, context: int = 208, rows: int = 12, domains: Sequence[str] = DOMAINS
) -> dict[str, Int[Tensor, "b s"]]:
    """Held-out rows of every domain, to see whom experts serve."""
    return {domain: held_out_rows(domain, tokenizer, context, rows).tokens[:, :-1] for domain in domains}


@torch.no_grad()
def domain_loads(model: DeepSeekV3, rows: Mapping[str, Int[Tensor, "b s"]], pad_id: int) -> Float[Tensor, "n l e"]:
    """The load that each domain brings to the experts of each sparse layer, in even shares; padding brings none."""
    loads = []
    for tokens in rows.values():
        _, routings = model.main_states(tokens)
        chosen = torch.stack([routing.chosen for routing in routings])[:, tokens != pad_id]  # [l T k]
        visits = torch.nn.functional.one_hot(chosen, model.cfg.n_routed_experts).float()
        loads.append(reduce(visits, "l T k e -> l e", "sum"))
    load = torch.stack(loads)
    return load / reduce(load, "n l e -> n l 1", "mean")


def apart(loads: Float[Tensor, "n l e"]) -> Float[Tensor, " l"]:
    """How far two domains' loads are apart, averaged over the pairs: the share of visits that would have to move."""
    shares = loads / reduce(loads, "n l e -> n l 1", "sum")
    pairs = [(one - other).abs().sum(-1) / 2 for one, other in combinations(shares, 2)]
    return torch.stack(pairs).mean(0)


def served(loads: Float[Tensor, "n l e"]) -> Float[Tensor, "n l e"]:
    """Of an expert's visitors, the part that comes from each domain when all are read equally often; sums to 1 over n."""
    return loads / reduce(loads, "n l e -> 1 l e", "sum").clamp(min=1e-9)


def at_the_start(cfg: ModelConfig, seed: int = 0) -> DeepSeekV3:
    """A model with the first weights of a run of that seed; the caller's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DeepSeekV3(cfg).eval()
