"""Judges stories: is this text of the language, can it have happened, and is its answer right?

The judge starts from the text alone. It reads every sentence (`story_reader.py`), keeps the books of who and what has
been introduced, and then replays the events in a world of its own that knows these rules:

    a person is in one place, and goes only where they are not yet;
    only a thing that lies where a person is can be picked up, found or moved, and only by who holds it be put or given;
    people give, sell, lend, trade, talk and watch in one place;
    who is present when a thing is put down remembers it there, who is present when it is taken forgets that;
    what people see, say or think must be what is so, what they know, or what they remember.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from dsv3_mini.data import lexicon
from dsv3_mini.data.story_grammar import ANSWERS, QUESTIONS
from dsv3_mini.data.story_reader import (
    Reading,
    Unreadable,
    gender,
    is_place_phrase,
    is_task,
    read_question,
    read_sentence,
)


@dataclass(frozen=True)
class Verdict:
    """What the judge says of a text.

    well_formed: every sentence is of the grammar, nothing is mentioned before it is introduced, and opening, ending,
    question and answer are there and fit. consistent: the events obey the world's rules; False for what is not
    well-formed. answer_right: None unless well-formed and consistent. problem: the first thing that is wrong.
    sentences: how many sentences stand before the question, read or not.
    """

    well_formed: bool
    consistent: bool
    answer_right: bool | None
    problem: str | None
    sentences: int


def well_formed_sentence(sentence: str) -> bool:
    """Whether the grammar has this sentence, judged alone: words, articles, the pronouns it can decide itself."""
    try:
        read_sentence(sentence)
    except Unreadable:
        return False
    return True


def judge_story(text: str) -> Verdict:
    """Judges a whole document, from the opening to the answer."""
    body, *rest = text.rstrip("\n").split("\n")
    sentences = re.split(r"(?<=\.) ", body)
    count = len(sentences)
    try:
        readings = _read_body(sentences)
        asked = _read_end(rest, readings)
    except _Fault as fault:
        return Verdict(False, False, None, str(fault), count)
    world = _World()
    for sentence, reading in zip(sentences, readings, strict=True):
        try:
            world.happen(reading)
        except _Fault as fault:
            return Verdict(True, False, None, f"{fault}: {sentence!r}", count)
    for question, answer in asked:
        right = world.answers(question)
        if right != {answer}:
            wanted = "no answer" if not right else "several answers" if len(right) > 1 else f"the answer {min(right)!r}"
            problem = f"{QUESTIONS[question.kind][0].format(**question.slots)!r} has {wanted}, not {answer!r}"
            return Verdict(True, True, False, problem, count)
    return Verdict(True, True, True, None, count)


class _Fault(Exception):
    """Why a text is refused."""


# ---- form ------------------------------------------------------------------------------------------------------------

_CROWDS = frozenset({"open_both", "go_both", "bond", "talk"})  # no single subject for a pronoun to follow


def _read_body(sentences: list[str]) -> list[Reading]:
    """All sentences before the question, read, in order and with nothing mentioned before it is introduced."""
    readings: list[Reading] = []
    known: set[str] = set()  # people, things, jobs, places and what hiding places are named after
    subject: str | None = None
    for number, sentence in enumerate(sentences):
        try:
            reading = read_sentence(sentence)
        except Unreadable as error:
            raise _Fault(f"{error}: {sentence!r}") from None
        opens, ends = reading.kind.startswith("open"), reading.kind == "end"
        _require(opens == (number == 0), f"{'an opening inside' if opens else 'no opening'}: {sentence!r}")
        _require(ends == (number == len(sentences) - 1), f"{'an ending inside' if ends else 'no ending'}: {sentence!r}")
        if reading.pronoun:
            _require(
                subject is not None and gender(subject) == reading.pronoun,
                f"the pronoun does not agree with {subject or 'anybody'}: {sentence!r}",
            )
        slots = reading.slots
        if opens or reading.kind.startswith("meet"):
            known.update(slots[slot] for slot in "ab" if slot in slots)
        recalled = [slots[slot] for slot in ("a", "b", "o", "q", "spot_noun", "worker") if slot in slots]
        where = [slots[slot].rsplit(" ", 1)[-1] for slot in ("at", "to", "spot", "loc") if slot in slots]
        for word in recalled + (where if reading.kind == "place" else []):
            _require(word in known, f"{word!r} has not been introduced: {sentence!r}")
        known.update(where)
        if "job" in slots:
            known.add(slots["job"])
        if "new" in slots:
            noun = slots["new"].split(" ")[1]
            _require(noun not in known, f"a second {noun!r} is introduced: {sentence!r}")
            known.add(noun)
        subject = None if reading.kind in _CROWDS else slots.get("a")
        readings.append(reading)
    return readings


def _read_end(lines: list[str], readings: list[Reading]) -> list[tuple[Reading, str]]:
    """The questions and what their answers say."""
    _require(len(lines) >= 1 and lines[0].startswith("Question: "), "no question")
    asked = []
    for number in range(0, len(lines), 2):
        question, *answer = lines[number : number + 2]
        _require(question.startswith("Question: "), f"text after the answer: {question!r}")
        _require(len(answer) == 1 and answer[0].startswith("Answer: "), "no answer")
        asked.append(_read_pair(question, answer[0].removeprefix("Answer: "), readings))
    return asked


def _read_pair(asked: str, reply: str, readings: list[Reading]) -> tuple[Reading, str]:
    """A question and what its answer says: about what the story holds, and in the form that fits."""
    try:
        question = read_question(asked.removeprefix("Question: "))
    except Unreadable as error:
        raise _Fault(f"{error}: {asked!r}") from None
    slots = question.slots
    people = {r.slots[slot] for r in readings for slot in "ab" if slot in r.slots}
    things = {r.slots["new"].split(" ")[1] for r in readings if "new" in r.slots}
    jobs = {r.slots["job"] for r in readings if "job" in r.slots}
    for slot, present in (("a", people), ("b", people), ("o", things), ("job", jobs)):
        if slot in slots:
            _require(slots[slot] in present, f"{slots[slot]!r} is not in the story: {asked!r}")
    before, after = ANSWERS[question.kind].format(answer="\n", **slots).split("\n")
    refusal = f"{reply!r} does not answer {asked!r}"
    _require(reply.startswith(before) and reply.endswith(after), refusal)
    answer = reply[len(before) : len(reply) - len(after)]
    match question.kind:
        case "where_object" | "thinks":
            fits = is_place_phrase(answer)
        case "where_person":
            fits = answer in lexicon.PLACE_PREPOSITIONS
        case "what_received":
            fits = answer in things
        case "promised":
            fits = is_task(answer)
        case "colour":
            fits = answer in lexicon.COLOURS
        case "material":
            fits = answer in lexicon.MATERIALS
        case _:
            fits = answer in people
    _require(fits, refusal)
    return question, answer


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise _Fault(problem)


# ---- events ----------------------------------------------------------------------------------------------------------


@dataclass
class _World:
    """The replay: what is so after the events so far."""

    place: dict[str, str] = field(default_factory=dict)  # person -> place
    arrived: dict[str, str] = field(default_factory=dict)  # person -> where their last move led
    hands: dict[str, str] = field(default_factory=dict)  # thing -> who holds it
    lying: dict[str, tuple[str, str]] = field(default_factory=dict)  # thing -> place, phrase
    memory: dict[tuple[str, str], str] = field(default_factory=dict)  # (person, thing) -> phrase
    held_by: dict[str, set[str]] = field(default_factory=dict)  # thing -> everybody who ever held it
    looks: dict[str, str] = field(default_factory=dict)  # thing -> adjective
    jobs: list[tuple[str, str]] = field(default_factory=list)
    handed: list[tuple[str, str, str, str]] = field(default_factory=list)  # kind, giver, thing, receiver
    promises: list[tuple[str, str]] = field(default_factory=list)
    scene: str | None = None  # the place of the last event with a thing

    def happen(self, reading: Reading) -> None:
        """One sentence comes true. Raises _Fault if it cannot."""
        slots = reading.slots
        a, b, thing, other = (slots.get(slot, "") for slot in ("a", "b", "o", "q"))
        phrase = slots.get("loc") or slots.get("spot") or slots.get("at") or ""
        if "new" in slots:
            adjective, thing = slots["new"].split(" ")
            self.looks[thing] = adjective
        if "job" in slots:
            self.jobs.append((slots["job"], a))
        match reading.kind:
            case "open" | "open_job" | "open_both" | "open_alone" | "open_job_alone" | "meet" | "meet_job":
                for person in filter(None, (a, b)):
                    self._appear(person, _place_of(phrase))
            case "has" | "makes":
                self._hold(thing, a)
            case "lies":
                self._put_down(thing, _place_of(phrase), phrase)
            case "sees_new":
                self._put_down(thing, self.place[a], phrase)
            case "go":
                self._walk(a, slots["to"])
            case "go_both":
                self._together(a, b)
                for person in (a, b):
                    self._walk(person, slots["to"])
            case "take" | "take_go":
                self._pick_up(thing, a)
                if "to" in slots:
                    self._walk(a, slots["to"])
            case "put" | "hide" | "carry_put" | "lose":
                self._needs_holder(thing, a)
                if "to" in slots:
                    self._walk(a, slots["to"])
                if phrase.split(" ")[2] in lexicon.PLACE_PREPOSITIONS:
                    _require(_place_of(phrase) == self.place[a], f"{a} is not {phrase}")
                self._put_down(thing, self.place[a], phrase, seen=reading.kind != "lose")
            case "shift":
                self._pick_up(thing, a)
                self._put_down(thing, self.place[a], phrase)
            case "find":
                self._lies_here(thing, a, phrase)
                self._pick_up(thing, a)
            case "thief":
                _require(thing in self.lying, f"somebody holds the {thing}")
                self._forget(thing, self.lying[thing][0])
                self._put_down(thing, _place_of(phrase), phrase)
            case "give" | "sell" | "lend" | "back":
                self._together(a, b)
                if reading.kind == "back":
                    _require(b in self.held_by.get(thing, ()), f"{b} never had the {thing}")
                self._hand_over(reading.kind, a, thing, b)
            case "trade":
                self._together(a, b)
                self._needs_holder(other, b)
                self._hand_over("trade", a, thing, b)
                self._hand_over("trade", b, other, a)
            case "see":
                self._lies_here(thing, a, phrase)
                self.memory[a, thing] = phrase
            case "thinks":
                _require(self.memory.get((a, thing)) == phrase, f"{a} does not remember the {thing} {phrase}")
            case "tells":
                self._together(a, b)
                _require(self.memory.get((b, thing)) == phrase, f"{b} does not remember the {thing} {phrase}")
                self.memory[a, thing] = phrase
            case "holds":
                self._needs_holder(thing, a)
            case "misses":
                _require(self.scene is not None and self.scene != self.place[a], f"{a} was there")
            case "seeks" | "wants":
                _require(self.hands.get(thing) != a, f"{a} has the {thing}")
            case "not_here":
                if a:
                    _require(_place_of(phrase) == self.place[a], f"{a} is not {phrase}")
                _require(self._whereabouts(thing) != _place_of(phrase), f"the {thing} is {phrase}")
            case "watches" | "asks" | "thanks" | "talk" | "promise_to" | "promise":
                if b:
                    self._together(a, b)
                if "task" in slots:
                    self.promises.append((a, slots["task"]))
            case "look":
                adjective = slots["adj"]
                _require(self.looks[thing] == adjective, f"the {thing} is {self.looks[thing]}, not {adjective}")
            case "plan":
                _require((a, slots["task"]) in self.promises, f"{a} did not promise to {slots['task']}")
            case "job" | "place" | "spot" | "worker" | "bond" | "feel" | "feel_he" | "scene" | "end":
                pass
            case kind:
                raise AssertionError(f"the judge does not know what {kind!r} does")

    def answers(self, question: Reading) -> set[str]:
        """Everything that answers the question: a good question has just one."""
        slots = question.slots
        a, b, thing = (slots.get(slot, "") for slot in ("a", "b", "o"))
        match question.kind:
            case "where_object":
                return {self.lying[thing][1]} if thing in self.lying else set()
            case "who_has":
                return {self.hands[thing]} if thing in self.hands else set()
            case "where_person":
                return {self.arrived[a]} if a in self.arrived else set()
            case "who_gave":
                return {
                    giver for kind, giver, o, to in self.handed if kind in ("give", "back") and (o, to) == (thing, b)
                }
            case "what_received":
                return {o for _, giver, o, receiver in self.handed if (giver, receiver) == (a, b)}
            case "promised":
                return {task for person, task in self.promises if person == a}
            case "colour" | "material":
                return {self.looks[thing]}
            case "who_is":
                return {person for job, person in self.jobs if job == slots["job"]}
            case "thinks":
                return {self.memory[a, thing]} if (a, thing) in self.memory else set()
        raise AssertionError(f"the judge cannot answer {question.kind!r}")

    # ---- rules

    def _appear(self, person: str, place: str) -> None:
        _require(self.place.get(person, place) == place, f"{person} is elsewhere")
        self.place[person] = place

    def _walk(self, person: str, place: str) -> None:
        _require(self.place[person] != place, f"{person} is already there")
        self.place[person] = self.arrived[person] = place

    def _together(self, a: str, b: str) -> None:
        _require(self.place[a] == self.place[b], f"{a} and {b} are in different places")

    def _hold(self, thing: str, person: str) -> None:
        self.hands[thing] = person
        self.held_by.setdefault(thing, set()).add(person)

    def _needs_holder(self, thing: str, person: str) -> None:
        _require(self.hands.get(thing) == person, f"{person} does not have the {thing}")

    def _whereabouts(self, thing: str) -> str:
        return self.lying[thing][0] if thing in self.lying else self.place[self.hands[thing]]

    def _lies_here(self, thing: str, person: str, phrase: str) -> None:
        _require(
            self.lying.get(thing) == (self.place[person], phrase), f"the {thing} does not lie {phrase} by {person}"
        )

    def _pick_up(self, thing: str, person: str) -> None:
        _require(thing in self.lying, f"somebody holds the {thing}")
        place, _ = self.lying[thing]
        _require(place == self.place[person], f"the {thing} is not where {person} is")
        del self.lying[thing]
        self._hold(thing, person)
        self._forget(thing, place)
        self.scene = place

    def _put_down(self, thing: str, place: str, phrase: str, seen: bool = True) -> None:
        self.hands.pop(thing, None)
        self.lying[thing] = (place, phrase)
        self.scene = place
        if seen:
            self.memory |= {(person, thing): phrase for person, its in self.place.items() if its == place}

    def _forget(self, thing: str, place: str) -> None:
        for person, its in self.place.items():
            if its == place:
                self.memory.pop((person, thing), None)

    def _hand_over(self, kind: str, giver: str, thing: str, receiver: str) -> None:
        self._needs_holder(thing, giver)
        self._hold(thing, receiver)
        self.handed.append((kind, giver, thing, receiver))


def _place_of(phrase: str) -> str:
    return phrase.split(" ")[2]
