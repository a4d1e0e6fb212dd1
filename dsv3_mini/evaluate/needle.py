"""Needle in a haystack: does a model still answer, when its story lies far back in a long text?

The needle is a whole story of the grammar, the haystack sentences that change nothing (`data/long_stories.py`), and at the end
stands the story's question. `depth` says where the needle lies: at 0 the text begins with it, at 1 the question follows at
once. Length and depth change nothing but the haystack, so whatever an answer loses is lost to the distance.

Counted are only questions that a model answers when their story stands alone (`needles`): not how well it understands
stories, but how far back. One pass over a text decides: greedy writing gives the answer exactly if every token of it is the
likeliest after those before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.data.long_stories import LongStory, haystack, plot_of
from dsv3_mini.data.stories import HELD_OUT_SEED, Story, generate_story
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.model import DeepSeekV3

BATCH = 8
Read = Callable[[Int[Tensor, "b s"]], Float[Tensor, "b s d"]]
"""Tokens to the states that the head reads. A model's own `main_states`, unless told otherwise."""


@dataclass(frozen=True)
class NeedleGrid:
    """right[i][j]: how many of `asked` needles were answered at lengths[i] (tokens) and depths[j] (0 to 1)."""

    lengths: list[int]
    depths: list[float]
    right: list[list[int]]
    asked: int

    def share(self, length: int, depth: float) -> float:
        return self.right[self.lengths.index(length)][self.depths.index(depth)] / self.asked

    def shares(self) -> list[list[float]]:
        """[length][depth], from 0 to 1."""
        return [[count / self.asked for count in row] for row in self.right]


@dataclass(frozen=True)
class Asked:
    """A text up to the end of its answer, and where the answer's tokens begin."""

    tokens: list[int]
    answer_at: int


def hidden_in_hay(story: Story, length: int, depth: float, tokenizer: Tokenizer) -> LongStory:
    """The story in as much haystack as `length` tokens hold, with the end of document in front, question and answer.

    The haystack's first sentences are the same at every length, and it is the same at every depth but for a sentence or two.

    Raises:
        DataError: depth is not in [0, 1], or the story alone is longer.
    """
    if not 0 <= depth <= 1:
        raise DataError(f"depth = {depth} must be from 0 (the needle comes first) to 1 (the question follows at once)")
    if len(asked(LongStory(story, "", ""), tokenizer).tokens) > length:
        raise DataError(f"length = {length} is too short for the story alone: give more")
    room = length - len(tokenizer.encode(plot_of(story)))
    sentences: list[str] = []
    for sentence in haystack(random.Random(f"needle-{story.text}"), story):
        room -= len(tokenizer.encode(" " + sentence))
        if room < 0:
            break
        sentences.append(sentence)
    while True:  # tokens at the seams depend on what stands there
        place = round(depth * len(sentences))
        text = LongStory(story, " ".join(sentences[:place]), " ".join(sentences[place:]))
        if len(asked(text, tokenizer).tokens) <= length:
            return text
        sentences.pop()


def asked(text: LongStory, tokenizer: Tokenizer) -> Asked:
    """The text with the story's last question alone, and its answer."""
    prompt = f"{text.body}\nQuestion: {text.story.question}\nAnswer:"
    before, whole = tokenizer.encode(prompt), tokenizer.encode(f"{prompt} {text.story.answer}")
    return Asked([tokenizer.eos_id, *whole], 1 + len(before))


def needles(model: DeepSeekV3, tokenizer: Tokenizer, count: int, longest: int = 120) -> list[Story]:
    """The first `count` held-out stories of at most `longest` tokens whose question the model answers without haystack."""
    found: list[Story] = []
    index = 0
    while len(found) < count:
        stories = [generate_story(HELD_OUT_SEED, index + i) for i in range(4 * BATCH)]
        index += len(stories)
        alone = [asked(LongStory(story, "", ""), tokenizer) for story in stories]
        short = [(story, text) for story, text in zip(stories, alone, strict=True) if len(text.tokens) <= longest]
        right = answered(model, tokenizer, [text for _, text in short])
        found += [story for (story, _), ok in zip(short, right, strict=True) if ok]
    return found[:count]


@torch.inference_mode()
def answered(model: DeepSeekV3, tokenizer: Tokenizer, texts: Sequence[Asked], read: Read | None = None) -> list[bool]:
    """Of each text: whether the model, writing greedily after the question, would write the answer and end its line."""
    read = read or (lambda tokens: model.main_states(tokens)[0])
    device, verdicts = model.lm_head.weight.device, []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        longest = max(len(text.tokens) for text in part)
        padded = [text.tokens + [tokenizer.pad_id] * (longest - len(text.tokens)) for text in part]
        states = read(torch.tensor(padded, device=device))
        for row, text in zip(states, part, strict=True):
            written = model.lm_head(row[text.answer_at - 1 : len(text.tokens) - 1]).argmax(-1).tolist()
            verdicts.append(_is_answer(written, text.tokens[text.answer_at :], tokenizer))
    return verdicts


def needle_grid(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    stories: Sequence[Story],
    lengths: Sequence[int],
    depths: Sequence[float],
    read: Read | None = None,
) -> NeedleGrid:
    """Each story asked at each length and depth."""
    right = []
    for length in lengths:
        row = []
        for depth in depths:
            texts = [asked(hidden_in_hay(story, length, depth, tokenizer), tokenizer) for story in stories]
            row.append(sum(answered(model, tokenizer, texts, read)))
        right.append(row)
    return NeedleGrid(list(lengths), list(depths), right, len(stories))


def _is_answer(written: list[int], answer: list[int], tokenizer: Tokenizer) -> bool:
    """The last token may also hold the end of the line: ".", or a token that goes on with a line break."""
    if written[:-1] != answer[:-1]:
        return False
    return tokenizer.decode(written[-1:]).split("\n", 1)[0] == tokenizer.decode(answer[-1:])
