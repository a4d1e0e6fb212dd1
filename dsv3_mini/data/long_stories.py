"""Long stories: a story of the grammar, drawn out by sentences that change nothing, so that its questions reach far back.

    It smelled of hay. Somewhere a cow was calling. ...       before: haystack
    One day, Mira was in the mill. ... Mira hid the lamp.     the story, whole: the needle
    The sky was grey. There were five doves in the sky. ...   behind: haystack
    Question: Where is the lamp?

Any story can be told so, at any length and with the needle at any depth, and the answer stays the story's own. What is
drawn around it are the grammar's own scenes and moods of places (`story_grammar.py`), never a word that the story's
questions or answers could mean.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_mini.data import lexicon
from dsv3_mini.data.stories import Story, generate_story
from dsv3_mini.data.story_world import render

LONG_TRAIN_SEED = 2  # stories that no pre-training read
PLACES = sorted(lexicon.PLACE_PREPOSITIONS)
DRAWS = 6  # of lengths and places, see long_story
SCENES = 0.75  # of the haystack; the rest are moods of places


@dataclass(frozen=True)
class LongStory:
    """A story with its haystack: `before` and `behind` are what stands around `story.text`'s first line."""

    story: Story
    before: str
    behind: str

    @property
    def body(self) -> str:
        """All that stands before the first question."""
        return " ".join(part for part in (self.before, plot_of(self.story), self.behind) if part)

    @property
    def text(self) -> str:
        """The whole document, from the first sentence to the last answer."""
        return "\n".join([self.body, *self.story.text.split("\n")[1:]])


def plot_of(story: Story) -> str:
    """A story without its questions."""
    return story.text.split("\n", 1)[0]


def questions_of(story: Story) -> list[tuple[str, str]]:
    """Its questions, each with the answer, in their order."""
    lines = [line.split(": ", 1)[1] for line in story.text.split("\n")[1:]]
    return list(zip(lines[::2], lines[1::2], strict=True))


def long_story(seed: int, index: int, most_words: int) -> LongStory:
    """Story number `index` of the stream `seed`, drawn out to at most `most_words` words, its questions among them. The
    same arguments always give the same. A story that is longer by itself stays as it is.

    Of six lengths drawn the longest is taken, and of six places the earliest: drawn evenly, a question would reach over more
    than three quarters of the longest haystack in one story of 27, so it does in every other.
    """
    rng = random.Random(f"long-{seed}-{index}-{most_words}")
    story = generate_story(seed, index)
    room = max(0, most_words - len(story.text.split()))
    room = max(rng.randint(0, room) for _ in range(DRAWS))
    sentences = []
    for sentence in haystack(rng, story):
        room -= len(sentence.split())
        if room < 0:
            break
        sentences.append(sentence)
    place = min(rng.randint(0, len(sentences)) for _ in range(DRAWS))
    return LongStory(story, " ".join(sentences[:place]), " ".join(sentences[place:]))


def haystack(rng: random.Random, story: Story) -> Iterator[str]:
    """Sentences without end that change nothing, and name nothing that the story names."""
    taken = words(story.text) & NAMED
    while True:
        if rng.random() < SCENES:
            sentence = render(rng, "scene", {}, "")
        else:
            place = lexicon.draw(rng, PLACES)
            sentence = render(rng, "place", {"to": place, "at": lexicon.at(place)}, "")
        if not words(sentence) & taken:
            yield sentence


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text))


NAMED = {
    *lexicon.OBJECTS,
    *lexicon.ADJECTIVES,
    *PLACES,
    *lexicon.SPOT_NOUNS,
    *lexicon.JOBS,
    *lexicon.TASK_VERBS,
    *lexicon.TASK_NOUNS,
    *lexicon.ANIMALS,
}
"""Words that an answer may hold, and those that a story's event may be about."""
