"""Little stories in which things move and people remember, each with questions that have one right answer.

`generate_story(seed, index)` is a pure function: it picks a kind of question, a plot that can raise it, people, places
and things, and then plays the plot in a small simulated world. Nobody gives what they do not hold or is in two places,
and everybody remembers a thing where they last saw it, so a question about a belief has an answer too. The sentences
are in `story_grammar.py`, the words in `lexicon.py`, the plots in `story_plots.py`; `story_judge.py` reads stories back.

Simplifications: people notice only what happens while they are present, arriving somewhere shows them nothing, and a
hiding place ("under the bench") belongs to the place where it was used.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_mini.data.story_plots import PLOTS_BY_KIND
from dsv3_mini.data.story_world import Teller

TRAIN_SEED = 0
HELD_OUT_SEED = 1

# How often each kind of question is asked, in percent.
QUESTION_SHARES = {
    "where_object": 24,
    "who_has": 14,
    "where_person": 13,
    "who_gave": 9,
    "what_received": 8,
    "promised": 8,
    "colour": 6,
    "material": 6,
    "who_is": 6,
    "thinks": 6,
}
_KINDS, _SHARES = list(QUESTION_SHARES), list(QUESTION_SHARES.values())


@dataclass(frozen=True)
class Story:
    """`text` is the whole document, from the opening to the last answer.

    `question` and `answer` are the last of its questions and that one's answer, and `kind`, a key of `QUESTION_SHARES`,
    is theirs. Up to three questions of other kinds stand before it, with their answers.
    """

    text: str
    question: str
    answer: str
    kind: str


def generate_story(seed: int, index: int) -> Story:
    """Story number `index` of the stream `seed`: the same arguments always give the same story."""
    rng = random.Random(f"stories-{seed}-{index}")
    kind = rng.choices(_KINDS, _SHARES)[0]
    teller = Teller(rng, kind)
    rng.choice(PLOTS_BY_KIND[kind])(teller)
    asked = teller.ask()
    body = teller.finish()
    lines = [body, *(f"Question: {question}\nAnswer: {answer}" for question, answer in asked)]
    return Story("\n".join(lines), *asked[-1], kind)


def prompt_of(story: Story) -> str:
    """The text up to and including the last "Answer:"; the answer follows after a space."""
    return story.text[: -len(story.answer) - 1]


def is_right(story: Story, answer_text: str) -> bool:
    """Whether the first line of what follows the prompt is exactly the answer."""
    return answer_text.split("\n", 1)[0].strip() == story.answer


def samples(count: int, seed: int = TRAIN_SEED) -> Iterator[Story]:
    """The first `count` stories of a stream."""
    return (generate_story(seed, index) for index in range(count))
