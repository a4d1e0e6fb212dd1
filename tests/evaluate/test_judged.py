"""The judged scores of writers whose every word is known: one that is always right, and ones that fail in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import dsv3_mini.evaluate.judged as judged
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import stories, sums
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.evaluate.judged import (
    ANSWER_TOKENS,
    JUDGED_CONTEXT,
    STORY_TOKENS,
    SUM_TOKENS,
    JudgedScores,
    judge_model,
    plot_sentences,
    sample_stories,
    well_formed_sentences,
)
from dsv3_mini.model import DeepSeekV3

COUNT = 40


class Writer:
    """Stands where `complete` stands: writes what is known to follow each prompt, changed by `change`, cut as asked.

    `change(kind, number, text)` gets what follows the prompt; kind is "sample", "question" or "sum".
    """

    def __init__(self, change: Callable[[str, int, str], str] = lambda kind, number, text: text) -> None:
        self.tokenizer, self.change = Tokenizer.shipped(), change
        self.asked: list[tuple[str, list[str], int, float]] = []

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        stop_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        assert stop_id == self.tokenizer.eos_id and all(prompt[0] == stop_id for prompt in prompts)
        assert all(len(prompt) + max_new_tokens <= JUDGED_CONTEXT for prompt in prompts)
        texts = [self.tokenizer.decode(prompt[1:]) for prompt in prompts]
        samples = max_new_tokens == STORY_TOKENS
        kind = "sample" if samples else "question" if "Answer:" in texts[0] else "sum"
        self.asked.append((kind, texts, max_new_tokens, temperature))
        written = []
        for number, prompt in enumerate(texts):
            whole = self.whole_text(kind, number)
            assert whole.startswith(prompt), "a prompt is the beginning of what nobody trained on"
            ids = self.tokenizer.encode(self.change(kind, number, whole[len(prompt) :]))
            written.append(ids[:max_new_tokens])
        return written

    def whole_text(self, kind: str, number: int) -> str:
        if kind == "sum":
            return sums.held_out_sum(number * sums.held_out_count() // COUNT).text
        return stories.generate_story(stories.HELD_OUT_SEED, number).text


def scores_of(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> JudgedScores:
    monkeypatch.setattr(judged, "complete", writer)
    model = DeepSeekV3(ModelConfig.preset("nano"))
    return judge_model(model, writer.tokenizer, samples=COUNT, questions=COUNT, temperature=0.7)


def test_a_writer_that_is_always_right_scores_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer()
    scores = scores_of(writer, monkeypatch)
    first = stories.generate_story(stories.HELD_OUT_SEED, 0).text
    assert scores.a_sentence is not None and first.startswith(scores.a_sentence)
    assert scores == JudgedScores(COUNT, 0.7, 1.0, scores.a_sentence, 1.0, 1.0, 1.0, COUNT, 1.0, 1.0, [])
    assert [(kind, tokens, t) for kind, _, tokens, t in writer.asked] == [
        ("sample", STORY_TOKENS, 0.7),
        ("question", ANSWER_TOKENS, 0.0),  # answers are greedy
        ("sum", SUM_TOKENS, 0.0),
    ]
    for kind, prompts, *_ in writer.asked:
        if kind == "question":
            assert all(prompt.endswith("Answer:") for prompt in prompts)
        if kind == "sum":
            assert all("answer" not in prompt and prompt.endswith("?\n") for prompt in prompts)
            assert len(set(prompts)) == COUNT, "no sum twice"


def test_there_is_room_for_the_longest_of_the_grammar() -> None:
    tokenizer = Tokenizer.shipped()
    held_out = [stories.generate_story(stories.HELD_OUT_SEED, i) for i in range(1000)]
    assert max(len(tokenizer.encode(story.text)) for story in held_out) <= STORY_TOKENS
    assert max(len(tokenizer.encode(" " + story.answer)) for story in held_out) < ANSWER_TOKENS
    assert max(len(tokenizer.encode(stories.prompt_of(s))) for s in held_out) + 1 + ANSWER_TOKENS <= JUDGED_CONTEXT
    problems = [sums.held_out_sum(i) for i in range(sums.held_out_count())]
    assert max(len(tokenizer.encode(p.text.removeprefix(p.prompt))) for p in problems) < SUM_TOKENS
    assert max(len(tokenizer.encode(problem.prompt)) for problem in problems) + 1 + SUM_TOKENS <= JUDGED_CONTEXT


def test_wrong_answers_are_counted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(kind: str, number: int, text: str) -> str:
        if kind == "question" and number < 10:
            return " a purple zebra"
        if kind == "question" and number < 20:
            return text + "\nQuestion: and what comes after the first line does not count?"
        if kind == "sum" and number < 5:
            return text[:-1] + str((int(text[-1]) + 1) % 10)
        if kind == "sum" and number < 8:
            return text.replace("write", "wrote")  # the right answer after steps that are none
        return text

    scores = scores_of(Writer(change), monkeypatch)
    assert scores.story_answers == 0.75
    assert scores.sum_answers == 1 - 5 / COUNT, "the answer counts, the steps on the way do not"
    assert (scores.well_formed, scores.consistent, scores.own_answer_right) == (1.0, 1.0, 1.0)


def test_each_fault_of_a_sample_is_its_own_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(kind: str, number: int, text: str) -> str:
        if kind != "sample":
            return text
        if number < 4:
            return text.replace(". ", " and flew to the moon. ", 1)  # not of the grammar
        if number < 10:
            answer = text.rsplit("Answer: ", 1)[1]
            return text.removesuffix(answer) + answer[::-1]
        if number < 12:
            return text[: len(text) // 2]  # it ran out of breath
        return text

    scores = scores_of(Writer(change), monkeypatch)
    assert scores.well_formed <= 1 - 6 / COUNT
    assert scores.own_answer_right == pytest.approx(1 - 12 / COUNT)
    assert 0 < len(scores.problems) <= 5 and all(isinstance(problem, str) for problem in scores.problems)
    assert scores.story_answers == scores.sum_answers == 1.0
    assert scores.to_log()["well_formed"] == round(scores.well_formed, 4)


def test_a_story_of_a_wrong_world_is_well_formed_but_not_consistent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell one event twice, and every sentence is still of the grammar; but who has left a place cannot leave it again."""

    def change(kind: str, number: int, text: str) -> str:
        if kind != "sample":
            return text
        plot, _, end = text.partition("\n")
        sentences = plot.split(". ")
        return ". ".join([*sentences[:-3], sentences[-3], *sentences[-3:]]) + "\n" + end

    scores = scores_of(Writer(change), monkeypatch)
    # In the shortest stories the event told twice is an opening, of which there can be one only.
    assert scores.own_answer_right <= scores.consistent < 0.5 < 0.8 < scores.well_formed
    assert scores.sentences_well_formed == 1.0


def test_samples_are_repeatable_and_begin_as_held_out_stories_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged, "STORY_TOKENS", 20)
    tokenizer, model = Tokenizer.shipped(), DeepSeekV3(ModelConfig.preset("nano", vocab_size=4096))
    samples = sample_stories(model, tokenizer, 3, 1.0, seed=4)
    assert (
        samples == sample_stories(model, tokenizer, 3, 1.0, seed=4) != sample_stories(model, tokenizer, 3, 1.0, seed=5)
    )
    for i, sample in enumerate(samples):
        story = stories.generate_story(stories.HELD_OUT_SEED, i)
        first = tokenizer.decode(tokenizer.encode(story.text)[:1])
        assert sample.startswith(first) and len(tokenizer.encode(sample)) > 3


def test_sentences_are_counted_before_whole_stories_come_out_right() -> None:
    texts = [stories.generate_story(stories.HELD_OUT_SEED, i).text for i in range(20)]
    assert well_formed_sentences(texts)[0] == 1.0
    for text in texts:
        sentences = plot_sentences(text)
        assert " ".join(sentences) == text.split("\n")[0]
        spoiled = text.replace(". ", " quite grobbled. ", 1)
        assert well_formed_sentences([spoiled]) == (pytest.approx(1 - 1 / len(sentences)), sentences[1])
    assert well_formed_sentences([]) == well_formed_sentences([""]) == (0.0, None)
    assert well_formed_sentences(["Colourless green ideas sleep."]) == (0.0, None)
