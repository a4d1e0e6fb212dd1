"""Reads sentences of the stories back: which template made this one, and what stands in its slots.

Every template of `story_grammar.py` becomes a regular expression in which a slot is any word, and a check of each word
against the lexicon. Two steps instead of one tell a sentence that the grammar does not have from one with a word of the
wrong category, and keep reading fast.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass

from dsv3_mini.data import lexicon
from dsv3_mini.data.story_grammar import QUESTIONS, TEMPLATES, Template


@dataclass(frozen=True)
class Reading:
    """One sentence, understood.

    `slots` holds the words by slot name: people and things as bare words, `at`, `spot` and `loc` as phrases ("in the
    cellar"), `new` as "copper lantern", jobs under "job". `pronoun` is the gender ("he" or "she") of a pronoun that
    refers to the sentence before.
    """

    kind: str
    slots: dict[str, str]
    pronoun: str | None = None


class Unreadable(ValueError):
    """The sentence is not of the language; the message says why."""


_LOWER, _NAME, _PHRASE = "([a-z]+)", "([A-Z][a-z]+)", "([a-z]+ the [a-z]+)"
_SLOT_REGEX = {
    "a": _NAME, "b": _NAME, "c": _NAME, "o": _LOWER, "q": _LOWER, "he": "(he|she)", "his": "(his|her)",
    "He": "(He|She)", "new": "(an? [a-z]+ [a-z]+)", "New": "(An? [a-z]+ [a-z]+)", "at": _PHRASE, "to": _LOWER,
    "spot": _PHRASE, "loc": _PHRASE, "task": _PHRASE, "nearby": "([a-z ]+)", "month": _NAME, "weekday": _NAME,
}  # fmt: skip

_GENDER = {name: gender for gender, names in (("she", lexicon.GIRLS), ("he", lexicon.BOYS)) for name in names}
_PRONOUN_GENDER = {"he": "he", "his": "he", "He": "he", "she": "she", "her": "she", "She": "she"}
_OBJECTS = frozenset(lexicon.OBJECTS)
_ADJECTIVES = frozenset(lexicon.ADJECTIVES)
_SPOTS = frozenset(lexicon.INDOOR_SPOTS + lexicon.OUTDOOR_SPOTS)
_AT = frozenset(map(lexicon.at, lexicon.PLACE_PREPOSITIONS))
_TASK_VERBS, _TASK_NOUNS = frozenset(lexicon.TASK_VERBS), frozenset(lexicon.TASK_NOUNS)
_WORDS = {category: frozenset(words) for category, words in lexicon.CATEGORIES.items()}


@dataclass(frozen=True)
class _Matcher:
    kind: str
    regex: re.Pattern[str]
    slots: tuple[str, ...]


def _matcher(template: Template) -> _Matcher:
    pieces = re.split(r"\{(\w+)\}", template.pattern)
    pattern = ""
    for position, piece in enumerate(pieces):
        if position % 2 == 0:
            pattern += re.escape(piece)
        elif piece.startswith(("an_", "An_")):
            pattern += f"({piece[0]}n? [a-z]+)"
        else:
            pattern += _SLOT_REGEX.get(piece, _LOWER)
    return _Matcher(template.kind, re.compile(pattern), tuple(pieces[1::2]))


def _key(pattern: str) -> tuple[str | None, str | None]:
    """The first two words where they are fixed: a sentence is tried only on templates that agree."""
    first, second = pattern.split(" ", 2)[:2]
    if "{" in first:
        # Introductions span several words, so nothing is known about the second one.
        return None, None if "{" in second or first != "{a}" else second
    return first, None if "{" in second else second


def _index(templates: tuple[Template, ...]) -> dict[tuple[str | None, str | None], list[_Matcher]]:
    index: dict[tuple[str | None, str | None], list[_Matcher]] = {}
    for template in templates:
        index.setdefault(_key(template.pattern), []).append(_matcher(template))
    return index


_SENTENCES = _index(TEMPLATES)
_QUESTIONS = _index(tuple(Template(kind, pattern) for kind, patterns in QUESTIONS.items() for pattern in patterns))


def read_sentence(sentence: str) -> Reading:
    """Which template made this sentence, with which words.

    Raises:
        Unreadable: the grammar has no such sentence, or a word stands where its category may not.
    """
    return _read(sentence, _SENTENCES)


def all_readings(sentence: str) -> list[Reading]:
    """Every way to read a sentence; empty if there is none. The language wants it to have one meaning."""
    matches = [(m, found) for ms in _SENTENCES.values() for m in ms if (found := m.regex.fullmatch(sentence))]
    readings = []
    for matcher, found in matches:
        with contextlib.suppress(Unreadable):
            readings.append(_check(matcher, found.groups()))
    return readings


def read_question(question: str) -> Reading:
    """The same for a question ("Where is the lantern?"); the kind is a key of `story_grammar.QUESTIONS`."""
    return _read(question, _QUESTIONS)


def is_place_phrase(phrase: str) -> bool:
    """Whether the phrase says where a thing can be: in a place, or at a hiding place."""
    return phrase in _AT or phrase in _SPOTS


def is_task(phrase: str) -> bool:
    """Whether the phrase is something that can be promised ("feed the goats")."""
    parts = phrase.split(" ")
    return len(parts) == 3 and parts[1] == "the" and parts[0] in _TASK_VERBS and parts[2] in _TASK_NOUNS


def gender(name: str) -> str:
    """The pronoun that fits a name: "he" or "she"."""
    return _GENDER[name]


def _read(sentence: str, index: dict[tuple[str | None, str | None], list[_Matcher]]) -> Reading:
    first, _, rest = sentence.partition(" ")
    second = rest.partition(" ")[0]
    problem = "the grammar has no such sentence"
    for key in ((first, second), (first, None), (None, second), (None, None)):
        for matcher in index.get(key, ()):
            if found := matcher.regex.fullmatch(sentence):
                try:
                    return _check(matcher, found.groups())
                except Unreadable as error:
                    problem = str(error)
    raise Unreadable(problem)


def _check(matcher: _Matcher, words: tuple[str, ...]) -> Reading:
    slots: dict[str, str] = {}
    gendered: list[str] = []
    for slot, word in zip(matcher.slots, words, strict=True):
        if slot in ("he", "his", "He"):
            gendered.append(_PRONOUN_GENDER[word])
            continue
        name = {"New": "new", "an_job": "job", "an_adj": "adj"}.get(slot, slot)
        slots[name] = _check_word(slot, word)
    people = [slots[slot] for slot in "abc" if slot in slots]
    _need(len(set(people)) == len(people), f"{people[-1] if people else ''} stands in two roles")
    _need("q" not in slots or slots["o"] != slots["q"], "a thing stands in two roles")
    subject = slots.get("a")
    if gendered and subject:
        _need(set(gendered) == {_GENDER[subject]}, f"the pronoun does not agree with {subject}")
    return Reading(matcher.kind, slots, gendered[0] if gendered and not subject else None)


def _check_word(slot: str, word: str) -> str:
    """The word as a reading keeps it, or Unreadable."""
    match slot:
        case "a" | "b" | "c":
            _need(word in _GENDER, f"{word!r} is not a name")
        case "o" | "q":
            _need(word in _OBJECTS, f"{word!r} is not a thing")
        case "new" | "New":
            article, adjective, noun = word.split(" ")
            _need_article(article, adjective)
            _need(adjective in _ADJECTIVES, f"{adjective!r} is not an adjective")
            _need(noun in _OBJECTS, f"{noun!r} is not a thing")
            return f"{adjective} {noun}"
        case "to":
            _need(word in lexicon.PLACE_PREPOSITIONS, f"{word!r} is not a place")
        case "at":
            _need(word in _AT, f"{word!r} does not say where somebody is")
        case "spot":
            _need(word in _SPOTS, f"{word!r} is not a hiding place")
        case "loc":
            _need(is_place_phrase(word), f"{word!r} does not say where a thing is")
        case "task":
            _need(is_task(word), f"{word!r} cannot be promised")
        case _:
            category = slot
            if slot.startswith(("an_", "An_")):
                category = slot[3:]
                article, _, word = word.partition(" ")
                _need_article(article, word)
            _need(word in _WORDS[category], f"{word!r} is not of the category {category!r}")
    return word


def _need_article(article: str, word: str) -> None:
    right = lexicon.article(word)
    _need(article.lower() == right, f"it is {right!r}, not {article!r}, before {word!r}")


def _need(holds: bool, problem: str) -> None:
    if not holds:
        raise Unreadable(problem)
