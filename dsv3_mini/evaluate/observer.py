"""Validation during a run: loss and bits per byte of each domain, and judged samples where the run learns the grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv3_mini.data.stream import HeldOut, held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.evaluate.bits_per_byte import losses_by_domain
from dsv3_mini.evaluate.judged import JUDGED_CONTEXT, judge_model, sample_stories
from dsv3_mini.train.trainer import Observer, Trainer

ROWS = 16  # held-out rows a domain: enough for two digits, quick enough to do often


class Validation(Observer):
    """Measures the averaged weights; never touches the run's own model, data or random state."""

    def __init__(self, domains: Sequence[str], tokenizer: Tokenizer, samples: int, text_column: str = "text") -> None:
        self.domains, self.tokenizer, self.samples, self.text_column = list(domains), tokenizer, samples, text_column
        self.held_out: dict[int, dict[str, HeldOut]] = {}  # by context, then by domain

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        model, context = trainer.averaged_model(), trainer.stream.seq_len
        if context not in self.held_out:  # rows are made once, and anew where the run's context grows
            self.held_out[context] = {
                domain: held_out_rows(domain, self.tokenizer, context, ROWS, text_column=self.text_column)
                for domain in self.domains
                if not domain.startswith("hub:")  # a streamed corpus would be read from its beginning
            }
        scores: dict[str, Any] = losses_by_domain(model, self.held_out[context], self.tokenizer.pad_id)
        learns_grammar = {"stories", "sums"} <= set(self.domains)
        if self.samples and learns_grammar and trainer.cfg.max_position_embeddings >= JUDGED_CONTEXT:
            scores["judged"] = judge_model(model, self.tokenizer, self.samples, self.samples).to_log()
            scores["sample"] = sample_stories(model, self.tokenizer, 1, seed=trainer.step)[0]
        return scores
