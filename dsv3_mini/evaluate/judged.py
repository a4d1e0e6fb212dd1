"""Judged samples: text that the model writes, read by the grammar that it was taught.

Scores on what training never saw: free samples that are well-formed (and consistent) stories; answers to held-out story
questions; held-out two-digit sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dsv3_mini.data import stories, sums
from dsv3_mini.data.story_judge import judge_story, well_formed_sentence
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.inference.generate import complete
from dsv3_mini.model import DeepSeekV3

STORY_TOKENS = 256  # room for the longest story of the grammar
JUDGED_CONTEXT = 288  # the least context that holds every prompt and its answer
ANSWER_TOKENS = 20
SUM_TOKENS = 80


@dataclass(frozen=True)
class JudgedScores:
    """Shares from 0 to 1 of `samples` free samples and `questions` held-out questions of each kind.

    temperature: that of the samples; questions are answered greedily.
    problems: what was wrong with the first few samples that are not well-formed.
    """

    samples: int
    temperature: float
    sentences_well_formed: float
    a_sentence: str | None
    well_formed: float
    consistent: float
    own_answer_right: float
    questions: int
    story_answers: float
    sum_answers: float
    problems: list[str]

    def to_log(self) -> dict[str, Any]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def judge_model(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    samples: int = 200,
    questions: int = 200,
    temperature: float = 1.0,
    seed: int = 0,
) -> JudgedScores:
    """Sample stories at `temperature`, each from the first token of a held-out story, and answer questions greedily."""
    texts = sample_stories(model, tokenizer, samples, temperature, seed)
    verdicts = [judge_story(text) for text in texts]
    sentences, a_sentence = well_formed_sentences(texts)
    held_out = [stories.generate_story(stories.HELD_OUT_SEED, i) for i in range(questions)]
    prompts = [[tokenizer.eos_id, *tokenizer.encode(stories.prompt_of(story))] for story in held_out]
    answers = complete(model, prompts, ANSWER_TOKENS, stop_id=tokenizer.eos_id)
    right = [stories.is_right(story, tokenizer.decode(ids)) for story, ids in zip(held_out, answers, strict=True)]
    problems = [
        sums.held_out_sum(i * sums.held_out_count() // questions) for i in range(min(questions, sums.held_out_count()))
    ]
    prompts = [[tokenizer.eos_id, *tokenizer.encode(problem.prompt)] for problem in problems]
    worked = complete(model, prompts, SUM_TOKENS, stop_id=tokenizer.eos_id)
    summed = [sums.is_right(problem, tokenizer.decode(ids)) for problem, ids in zip(problems, worked, strict=True)]
    return JudgedScores(
        samples=samples,
        temperature=temperature,
        sentences_well_formed=sentences,
        a_sentence=a_sentence,
        well_formed=_share(v.well_formed for v in verdicts),
        consistent=_share(v.consistent for v in verdicts),
        own_answer_right=_share(bool(v.answer_right) for v in verdicts),
        questions=questions,
        story_answers=_share(right),
        sum_answers=_share(summed),
        problems=[v.problem for v in verdicts if v.problem][:5],
    )


def sample_stories(
    model: DeepSeekV3, tokenizer: Tokenizer, count: int, temperature: float, seed: int, most: int | None = None
) -> list[str]:
    """`count` samples that begin as stories begin: with the first token of a held-out story each.

    Args:
        most: new tokens of a sample, at most; by default there is room for the longest story.
    """
    firsts = [tokenizer.encode(stories.generate_story(stories.HELD_OUT_SEED, i).text)[0] for i in range(count)]
    prompts = [[tokenizer.eos_id, first] for first in firsts]
    generator = torch.Generator(device=model.lm_head.weight.device).manual_seed(seed)
    new = complete(model, prompts, most or STORY_TOKENS, temperature, tokenizer.eos_id, generator)
    return [tokenizer.decode([first, *ids]) for first, ids in zip(firsts, new, strict=True)]


def plot_sentences(text: str) -> list[str]:
    """The sentences of a story's plot, the lines before its question."""
    plot = text.split("\n")[0].strip()
    return [part if part.endswith(".") else part + "." for part in plot.split(". ") if part]


def well_formed_sentences(texts: Iterable[str]) -> tuple[float, str | None]:
    """The share of well-formed sentences, and the first such one: a sign of life long before whole stories come out right."""
    sentences = [sentence for text in texts for sentence in plot_sentences(text)]
    good = [sentence for sentence in sentences if well_formed_sentence(sentence)]
    return len(good) / max(len(sentences), 1), (good[0] if good else None)


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(map(bool, flags)) / max(len(flags), 1)
