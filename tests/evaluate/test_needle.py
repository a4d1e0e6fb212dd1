"""Needles against what can be known otherwise: greedy writing, and a model that sees exactly so far back and no further."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3_mini import from_pretrained
from dsv3_mini.data.long_stories import plot_of
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stories import HELD_OUT_SEED, Story, generate_story, is_right
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.evaluate.needle import answered, asked, hidden_in_hay, needle_grid, needles
from dsv3_mini.inference.generate import complete
from dsv3_mini.model import DeepSeekV3

TOKENIZER = Tokenizer.shipped()
STORIES = [story for i in range(30) if len((story := generate_story(HELD_OUT_SEED, i)).text) < 420]


@pytest.fixture(scope="module")
def tiny() -> DeepSeekV3:
    return from_pretrained(shipped("tiny"), mtp=False).eval()


class Oracle:
    """Knows every next token, and says it where the needle began at most `window` characters before; else token 0."""

    def __init__(self, stories: list[Story], window: int) -> None:
        self.stories, self.window = stories, window
        self.lm_head = self
        self.weight = torch.zeros(1)

    def __call__(self, states: Tensor) -> Tensor:
        return states

    def read(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, TOKENIZER.n_vocab)
        for row, ids in enumerate(tokens.tolist()):
            text = TOKENIZER.decode(ids[1:])
            start = next(text.index(plot_of(story)) for story in self.stories if plot_of(story) in text)
            seen = 0
            for place, following in enumerate(ids[1:]):
                near = seen - start <= self.window
                logits[row, place, following if near else 0] = 1.0
                seen += len(TOKENIZER.decode([following]))
        return logits


@pytest.mark.parametrize("window", [0, 500, 800, 10_000])
def test_an_oracle_with_a_window_finds_what_lies_within_it(window: int) -> None:
    stories, lengths, depths = STORIES[:5], [208, 320], [0.0, 0.4, 1.0]
    oracle = Oracle(stories, window)
    grid = needle_grid(oracle, TOKENIZER, stories, lengths, depths, oracle.read)
    for i, length in enumerate(lengths):
        for j, depth in enumerate(depths):
            expected = 0
            for story in stories:
                text = hidden_in_hay(story, length, depth, TOKENIZER)
                whole = f"{text.body}\nQuestion: {story.question}\nAnswer: {story.answer}"
                # The full stop is the last character that must be written; what is read before it is one less.
                expected += len(whole) - 1 - whole.index(plot_of(story)) <= window
            assert grid.right[i][j] == expected, (length, depth)
            assert grid.share(length, depth) == grid.shares()[i][j] == expected / 5
    assert grid.asked == 5
    if window == 800:
        assert 0 < sum(map(sum, grid.right)) < 30, "this window should part them"


def test_one_pass_says_what_greedy_writing_does(tiny: DeepSeekV3) -> None:
    stories = STORIES[:16]  # not needles: some are answered and some are not
    texts = [asked(hidden_in_hay(story, 160, 0.3, TOKENIZER), TOKENIZER) for story in stories]
    written = complete(tiny, [text.tokens[: text.answer_at] for text in texts], 20, stop_id=TOKENIZER.eos_id)
    expected = [is_right(story, TOKENIZER.decode(ids)) for story, ids in zip(stories, written, strict=True)]
    assert answered(tiny, TOKENIZER, texts) == expected
    assert 0 < sum(expected) < len(expected)


def test_texts_are_as_long_and_the_needle_as_deep_as_asked() -> None:
    for story in STORIES[:8]:
        for length in (208, 500):
            texts = {depth: hidden_in_hay(story, length, depth, TOKENIZER) for depth in (0.0, 0.5, 1.0)}
            for text in texts.values():
                assert length - 25 < len(asked(text, TOKENIZER).tokens) <= length
            assert not texts[0.0].before and not texts[1.0].behind
            assert abs(len(texts[0.5].before.split(". ")) - len(texts[0.5].behind.split(". "))) <= 1
            hay = {depth: f"{text.before} {text.behind}".strip() for depth, text in texts.items()}
            assert hay[0.0].startswith(hay[1.0][:300]) and hay[0.5].startswith(hay[1.0][:300])


def test_needles_are_answered_when_they_stand_alone(tiny: DeepSeekV3) -> None:
    found = needles(tiny, TOKENIZER, 5)
    assert len(found) == 5
    prompts = [[TOKENIZER.eos_id, *TOKENIZER.encode(f"{plot_of(s)}\nQuestion: {s.question}\nAnswer:")] for s in found]
    written = complete(tiny, prompts, 20, stop_id=TOKENIZER.eos_id)
    assert all(is_right(story, TOKENIZER.decode(ids)) for story, ids in zip(found, written, strict=True))


@pytest.mark.parametrize(
    "length, depth, words", [(200, 1.2, "depth = 1.2"), (200, -0.1, "depth = -0.1"), (20, 0.5, "length = 20")]
)
def test_impossible_places_are_refused(length: int, depth: float, words: str) -> None:
    with pytest.raises(DataError, match=words):
        hidden_in_hay(STORIES[0], length, depth, TOKENIZER)
