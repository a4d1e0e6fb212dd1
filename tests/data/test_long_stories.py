"""Long stories: the judge of stories reads them back, and the haystack never says what a question could mean."""

from __future__ import annotations

import re

import pytest

from dsv3_mini.data.corpora import generated_text, is_generated, load_corpus
from dsv3_mini.data.long_stories import PLACES, LongStory, long_story, plot_of, questions_of
from dsv3_mini.data.stories import HELD_OUT_SEED, TRAIN_SEED, generate_story
from dsv3_mini.data.story_judge import judge_story, well_formed_sentence
from dsv3_mini.errors import DataError

LONG = [long_story(HELD_OUT_SEED, index, 400) for index in range(80)]


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text) if text else []


def test_haystack_is_of_the_grammar_and_the_story_stays_whole() -> None:
    for index, long in enumerate(LONG):
        story = generate_story(HELD_OUT_SEED, index)
        assert long.story == story and plot_of(story) in long.text
        assert long.text.split("\n")[1:] == story.text.split("\n")[1:]
        hay = sentences(long.before) + sentences(long.behind)
        assert len(hay) > 5 and all(map(well_formed_sentence, hay))
        assert sum(len(sentences(part)) for part in (long.before, plot_of(story), long.behind)) == len(
            sentences(long.body)
        )


def test_the_judge_finds_the_same_answers_through_the_haystack() -> None:
    """It wants the opening first, the ending last and no place that nobody was in (those sentences are left out here), and
    replays all between: the haystack changes nothing."""
    drawn_out = 0
    for long in LONG:
        opening, *middle, ending = sentences(plot_of(long.story))
        before, behind = (
            [each for each in sentences(part) if not set(re.findall("[a-z]+", each)) & set(PLACES)]
            for part in (long.before, long.behind)
        )
        body = " ".join([opening, *before, *middle, *behind, ending])
        verdict = judge_story("\n".join([body, *long.text.split("\n")[1:]]))
        alone = judge_story(long.story.text)
        assert (verdict.answer_right, verdict.problem) == (True, None) and alone.answer_right
        drawn_out += verdict.sentences - alone.sentences
    assert drawn_out > 11 * len(LONG)


def test_no_word_of_an_answer_stands_in_the_haystack() -> None:
    for long in LONG:
        hay = set(re.findall(r"[a-z]{3,}", f"{long.before} {long.behind}"))
        for question, answer in questions_of(long.story):
            said = set(re.findall(r"[a-z]{3,}", answer)) - set(re.findall(r"[a-z]{3,}", question))
            assert not said & hay - {"the", "with", "was", "that", "from", "his", "her", "near"}, (answer, said & hay)


def test_long_and_deep_are_common_and_none_is_longer_than_asked() -> None:
    room = [400 - len(long.story.text.split()) for long in LONG]
    hay = [len(long.text.split()) - len(long.story.text.split()) for long in LONG]
    behind = [len(long.behind.split()) for long in LONG]
    # The longest of six draws is 6/7 of the room on average, and the earliest of six places leaves 6/7 of that behind the
    # needle; the last sentence that does not fit is left out, three words on average.
    assert sum(hay) / sum(room) == pytest.approx(6 / 7 - 3 / 315, abs=0.06)
    assert sum(behind) / sum(hay) == pytest.approx(6 / 7, abs=0.06)
    assert all(words <= most for words, most in zip(hay, room, strict=True)) and min(hay) < 0.7 * max(hay)


def test_same_arguments_same_story_and_training_has_its_own_stream() -> None:
    assert long_story(5, 3, 300) == long_story(5, 3, 300) != long_story(5, 4, 300)
    assert isinstance(long_story(5, 3, 20), LongStory)
    train = {generated_text("long_stories:90", "train", i).split("\n", 1)[1] for i in range(50)}
    for seed in (TRAIN_SEED, HELD_OUT_SEED):
        assert not train & {generate_story(seed, i).text.split("\n", 1)[1] for i in range(50)}
    assert generated_text("long_stories:90", "held_out", 7) == long_story(HELD_OUT_SEED, 7, 90).text


def test_as_a_corpus_it_says_how_long() -> None:
    assert is_generated("long_stories:40") and not is_generated("hub:somebody/long_stories")
    for name in ("long_stories", "long_stories:", "long_stories:0", "long_stories:-3", "long_stories:many"):
        with pytest.raises(DataError, match="needs the most words"):
            load_corpus(name)
