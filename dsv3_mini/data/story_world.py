"""The world in which a story is told: who is where, who holds what, who remembers what.

A plot (`story_plots.py`) calls a `Teller` event by event; each call changes the world and tells one sentence of
`story_grammar.py`. At the end the teller asks a question that the world answers, and fills the story up with small
sentences that change nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dsv3_mini.data import lexicon
from dsv3_mini.data.story_grammar import ANSWERS, QUESTIONS, TEMPLATES

Word = TypeVar("Word")

# Without questions and answers; a plot's own sentences may ask for one more. Short stories teach a small model soonest
# that what was named comes back: there, less else stands between a name and its return.
MIN_SENTENCES, MAX_SENTENCES = 3, 8
RECALLED = 0.6  # how often a sentence is followed by one that comes back to a place, a look, a task or a job in it
MAX_QUESTIONS = 4

# ---- sentences -------------------------------------------------------------------------------------------------------


def _split(pattern: str) -> tuple[str, ...]:
    """Literals and slots in turn: "{a} felt {feeling}." -> ("", "a", " felt ", "feeling", ".")."""
    return tuple(re.split(r"\{(\w+)\}", pattern))


_BY_KIND: dict[str, list[tuple[str, ...]]] = {}
for _template in TEMPLATES:
    _BY_KIND.setdefault(_template.kind, []).append(_split(_template.pattern))

_GIRLS = frozenset(lexicon.GIRLS)
_INDOORS = frozenset(lexicon.INDOOR_PLACES)
_PRONOUNS = {"he": ("she", "he"), "his": ("her", "his"), "He": ("She", "He")}
_CROWDS = frozenset({"open_both", "go_both", "bond", "talk"})  # their subject is no single person


def render(rng: random.Random, kind: str, slots: dict[str, str], subject: str) -> str:
    pieces = list(rng.choice(_BY_KIND[kind]))
    drawn: set[str] = set()
    for position in range(1, len(pieces), 2):
        slot = pieces[position]
        if slot in slots:
            pieces[position] = slots[slot]
        elif slot in _PRONOUNS:
            pieces[position] = _PRONOUNS[slot][subject not in _GIRLS]
        elif slot == "New":
            pieces[position] = slots["new"].capitalize()
        else:
            pieces[position] = _draw(rng, slot, drawn)
    return "".join(pieces)


def _draw(rng: random.Random, slot: str, drawn: set[str]) -> str:
    """A free word, with its article if the slot asks for one, and none twice in a sentence."""
    head, _, rest = slot.partition("_")
    with_article = head in ("an", "An")
    words = lexicon.CATEGORIES[rest if with_article else slot]
    word = lexicon.draw(rng, words)
    while word in drawn:
        word = lexicon.draw(rng, words)
    drawn.add(word)
    if with_article:
        word = f"{lexicon.article(word)} {word}"
        word = word.capitalize() if head == "An" else word
    return word


def _recalls(slots: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Sentences that come back to what stands in the slots of another, as kinds and slots."""
    for slot in ("to", "at", "spot", "loc"):
        if slot in slots:
            noun = slots[slot].rsplit(" ", 1)[-1]
            is_place = noun in lexicon.PLACE_PREPOSITIONS
            yield ("place", {"to": noun, "at": lexicon.at(noun)}) if is_place else ("spot", {"spot_noun": noun})
    if "new" in slots:
        article, adjective, thing = slots["new"].split(" ")
        yield "look", {"o": thing, "adj": adjective, "an_adj": f"{article} {adjective}"}
    if "task" in slots:
        yield "plan", {"a": slots["a"], "task": slots["task"]}
    if "an_job" in slots:
        yield "worker", {"worker": slots["an_job"].split(" ")[1]}


_THINGS: list[tuple[str, list[str] | None]] = [
    (thing, materials) for things, materials in lexicon.OBJECT_GROUPS for thing in things
] + [(thing, None) for thing in lexicon.FOODS]
_MADE_THINGS = [(thing, materials) for thing, materials in _THINGS if materials]


# ---- the world -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """One sentence of the plot, with the words in its slots."""

    sentence: str
    kind: str
    slots: dict[str, str]

    @property
    def subject(self) -> str | None:
        return None if self.kind in _CROWDS else self.slots.get("a")

    @property
    def latest(self) -> str | None:
        """Who was named last."""
        return self.slots.get("b") or self.slots.get("a")


@dataclass
class Teller:
    """The world of one story, and the sentences told about it so far."""

    rng: random.Random
    kind: str
    told: list[Told] = field(default_factory=list)
    people: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)  # person -> place
    moved: set[str] = field(default_factory=set)
    last_moved: str | None = None
    holder: dict[str, str] = field(default_factory=dict)  # thing -> person
    where: dict[str, tuple[str, str]] = field(default_factory=dict)  # thing -> place, and the phrase that says where
    belief: dict[tuple[str, str], str] = field(default_factory=dict)  # (person, thing) -> the phrase they remember
    adjective: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)  # job -> person
    gifts: list[tuple[str, str, str]] = field(default_factory=list)  # giver, thing, receiver: the verb is to give
    received: list[tuple[str, str, str]] = field(default_factory=list)  # the same for every way of handing over
    promises: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)  # nouns of places and hiding places
    asked_about: str | None = None
    suspects: list[str] = field(default_factory=list)  # whose belief is worth a question

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def returning(self, words: Sequence[Word]) -> Word:
        """A word for what the story comes back to."""
        return lexicon.draw(self.rng, words, lexicon.RETURNING)

    # ---- casting

    def cast(self, count: int) -> list[str]:
        """People whose names begin with different letters: of two, one is a girl and one a boy."""
        names: list[str] = []
        girl = self.chance(0.5)
        while len(names) < count:
            name = self.returning(lexicon.GIRLS if girl == (len(names) % 2 == 0) else lexicon.BOYS)
            if all(name[0] != other[0] for other in names):
                names.append(name)
        return names

    def new_place(self) -> str:
        while True:
            place = self.returning(lexicon.INDOOR_PLACES if self.chance(0.55) else lexicon.OUTDOOR_PLACES)
            if place not in self.used:
                self.used.add(place)
                return place

    def new_spot(self, place: str) -> str:
        while True:
            spot = self.returning(lexicon.INDOOR_SPOTS if place in _INDOORS else lexicon.OUTDOOR_SPOTS)
            noun = spot.rsplit(" ", 1)[1]
            if noun not in self.used:
                self.used.add(noun)
                return spot

    def new_thing(self) -> tuple[str, str]:
        """A thing that the story does not have yet, and its introduction: ("lantern", "a copper lantern")."""
        thing, materials = self.returning(_MADE_THINGS if self.kind == "material" else _THINGS)
        if any(thing[0] == other[0] for other in self.adjective):
            return self.new_thing()
        if materials is None:
            adjectives = lexicon.FOOD_QUALITIES
            if self.kind == "colour":
                return self.new_thing()
        elif self.kind == "material":
            adjectives = materials
        elif self.kind == "colour":
            adjectives = lexicon.COLOURS
        else:
            adjectives = self.rng.choice((lexicon.COLOURS, lexicon.QUALITIES, materials or lexicon.QUALITIES))
        adjective = self.returning(adjectives)
        self.adjective[thing] = adjective
        return thing, f"{lexicon.article(adjective)} {adjective} {thing}"

    # ---- telling

    def say(self, kind: str, **slots: str) -> None:
        sentence = render(self.rng, kind, slots, slots.get("a", ""))
        self.told.append(Told(sentence, kind, slots))

    def open(self, *arrivals: tuple[str, str]) -> None:
        """The opening sentence, and one for everybody else who is somewhere when the story begins."""
        jobs: list[str] = []
        while len(jobs) < len(arrivals):
            job = self.returning(lexicon.JOBS)
            jobs += [job] if job not in jobs else []
        with_job = [self.chance(0.12) for _ in arrivals]
        if self.kind == "who_is":
            with_job[self.rng.randrange(len(arrivals))] = True
        together = len(arrivals) > 1 and arrivals[0][1] == arrivals[1][1] and not any(with_job[:2]) and self.chance(0.8)
        alone = "_alone" if len(arrivals) == 1 else ""
        for number, ((name, place), job) in enumerate(zip(arrivals, jobs, strict=True)):
            self.people.append(name)
            self.place[name] = place
            if together and number < 2:
                if number == 1:
                    self.say("open_both", a=arrivals[0][0], b=name, at=lexicon.at(place))
                continue
            if with_job[number] and self.chance(0.7):
                self.jobs[job] = name
                kind, slots = "meet_job" if number else f"open_job{alone}", {"an_job": f"{lexicon.article(job)} {job}"}
            else:
                kind, slots = "meet" if number else f"open{alone}", {}
            self.say(kind, a=name, at=lexicon.at(place), **slots)
            if with_job[number] and not slots:
                self.jobs[job] = name
                self.say("job", a=name, an_job=f"{lexicon.article(job)} {job}")

    def _witness(self, thing: str, place: str, phrase: str | None) -> None:
        """Everybody in `place` sees the thing put down (phrase) or taken away (None)."""
        for name in self.people:
            if self.place[name] == place:
                if phrase is None:
                    self.belief.pop((name, thing), None)
                else:
                    self.belief[name, thing] = phrase

    def _lay(self, thing: str, place: str, phrase: str) -> None:
        self.holder.pop(thing, None)
        self.where[thing] = (place, phrase)
        self._witness(thing, place, phrase)

    def _grasp(self, thing: str, name: str) -> None:
        assert self.where.get(thing, (self.place[name],))[0] == self.place[name], (thing, name)
        self.where.pop(thing, None)
        self.holder[thing] = name
        self._witness(thing, self.place[name], None)

    def has(self, name: str, kind: str = "has") -> str:
        thing, phrase = self.new_thing()
        self.holder[thing] = name
        self.say(kind, a=name, new=phrase)
        return thing

    def lies(self, place: str) -> str:
        thing, phrase = self.new_thing()
        self._lay(thing, place, lexicon.at(place))
        self.say("lies", new=phrase, at=lexicon.at(place))
        return thing

    def sees_new(self, name: str) -> str:
        thing, phrase = self.new_thing()
        spot = self.new_spot(self.place[name])
        self._lay(thing, self.place[name], spot)
        self.say("sees_new", a=name, new=phrase, spot=spot)
        return thing

    def _moves(self, *names: str) -> None:
        self.moved.update(names)
        self.last_moved = names[-1]

    def go(self, name: str, place: str) -> None:
        self.place[name] = place
        self._moves(name)
        self.say("go", a=name, to=place)

    def go_both(self, a: str, b: str, place: str) -> None:
        self.place[a] = self.place[b] = place
        self._moves(a, b)
        self.say("go_both", a=a, b=b, to=place)

    def take(self, name: str, thing: str) -> None:
        self._grasp(thing, name)
        self.say("take", a=name, o=thing)

    def take_and_go(self, name: str, thing: str, place: str) -> None:
        """Picks a thing up and walks, in one sentence or in two."""
        if self.chance(0.5):
            self._grasp(thing, name)
            self.place[name] = place
            self._moves(name)
            self.say("take_go", a=name, o=thing, to=place)
        else:
            self.take(name, thing)
            self.go(name, place)

    def put(self, name: str, thing: str, spot: bool | None = None) -> None:
        assert self.holder[thing] == name
        place = self.place[name]
        if self.chance(0.8) if spot is None else spot:
            phrase = self.new_spot(place)
            self.say("hide", a=name, o=thing, spot=phrase) if self.chance(0.4) else self.say(
                "put", a=name, o=thing, loc=phrase
            )
        else:
            phrase = lexicon.at(place)
            self.say("put", a=name, o=thing, loc=phrase)
        self._lay(thing, place, phrase)

    def carry_put(self, name: str, thing: str, place: str) -> None:
        assert self.holder[thing] == name
        self.place[name] = place
        self._moves(name)
        spot = self.new_spot(place)
        self._lay(thing, place, spot)
        self.say("carry_put", a=name, o=thing, to=place, spot=spot)

    def shift(self, name: str, thing: str) -> None:
        self._grasp(thing, name)
        spot = self.new_spot(self.place[name])
        self._lay(thing, self.place[name], spot)
        self.say("shift", a=name, o=thing, spot=spot)

    def hand(self, giver: str, thing: str, receiver: str, kind: str = "give") -> None:
        assert self.holder[thing] == giver and self.place[giver] == self.place[receiver]
        self.holder[thing] = receiver
        self.received.append((giver, thing, receiver))
        if kind in ("give", "back"):
            self.gifts.append((giver, thing, receiver))
        self.say(kind, a=giver, o=thing, b=receiver)

    def trade(self, a: str, thing: str, b: str, other: str) -> None:
        assert self.holder[thing] == a and self.holder[other] == b and self.place[a] == self.place[b]
        self.holder[thing], self.holder[other] = b, a
        self.received += [(a, thing, b), (b, other, a)]
        self.say("trade", a=a, o=thing, b=b, q=other)

    def lose(self, name: str, thing: str) -> None:
        """The thing stays behind and nobody sees it fall."""
        place = self.place[name]
        self.holder.pop(thing)
        self.where[thing] = (place, lexicon.at(place))
        self.say("lose", a=name, o=thing, at=lexicon.at(place))

    def find(self, name: str, thing: str) -> None:
        phrase = self.where[thing][1]
        self._grasp(thing, name)
        self.say("find", a=name, o=thing, loc=phrase)

    def stolen(self, thing: str, place: str) -> None:
        self._witness(thing, self.where[thing][0], None)
        thief = lexicon.draw(self.rng, lexicon.THIEVES)
        phrase = f"{lexicon.article(thief)} {thief}"
        self._lay(thing, place, lexicon.at(place))
        self.say("thief", an_animal=phrase, An_animal=phrase.capitalize(), o=thing, at=lexicon.at(place))

    def promise(self, name: str, other: str | None = None) -> None:
        task = self.returning(lexicon.TASKS)
        if task in self.promises.values():
            return self.promise(name, other)
        self.promises[name] = task
        if other and self.chance(0.4):
            self.say("promise_to", a=name, b=other, task=task)
        else:
            self.say("promise", a=name, task=task)

    # ---- the question, and the end

    def ask(self) -> list[tuple[str, str]]:
        """Questions with their answers: the last is of this story's kind, those before it are of other kinds."""
        slots, answer = self.rng.choice(list(self._questions(self.kind)))
        self.asked_about = slots.get("o")
        asked = [self._pair(self.kind, slots, answer)]
        others = [kind for kind in QUESTIONS if kind != self.kind and any(self._questions(kind))]
        for kind in self.rng.sample(others, min(len(others), self.rng.randrange(MAX_QUESTIONS))):
            asked.insert(0, self._pair(kind, *self.rng.choice(list(self._questions(kind)))))
        return asked

    def _pair(self, kind: str, slots: dict[str, str], answer: str) -> tuple[str, str]:
        return self.rng.choice(QUESTIONS[kind]).format(**slots), ANSWERS[kind].format(answer=answer, **slots)

    def _questions(self, kind: str) -> Iterator[tuple[dict[str, str], str]]:
        """Every question of a kind that the story answers, and what its answer says."""
        match kind:
            case "where_object":
                yield from (({"o": thing}, phrase) for thing, (_, phrase) in self.where.items())
            case "who_has":
                yield from (({"o": thing}, name) for thing, name in self.holder.items())
            case "where_person":
                moved = [name for name in self.people if name in self.moved]
                yield from (
                    ({"a": name}, self.place[name]) for name in moved for _ in range(1 + 9 * (name == self.last_moved))
                )
            case "who_gave":
                pairs = [(thing, receiver) for _, thing, receiver in self.gifts]
                yield from (
                    ({"o": thing, "b": receiver}, giver)
                    for giver, thing, receiver in self.gifts
                    if pairs.count((thing, receiver)) == 1
                )
            case "what_received":
                pairs = [(giver, receiver) for giver, _, receiver in self.received]
                yield from (
                    ({"a": giver, "b": receiver}, thing)
                    for giver, thing, receiver in self.received
                    if pairs.count((giver, receiver)) == 1
                )
            case "promised":
                yield from (({"a": name}, task) for name, task in self.promises.items())
            case "colour" | "material":
                wanted = lexicon.COLOURS if kind == "colour" else lexicon.MATERIALS
                yield from (({"o": thing}, word) for thing, word in self.adjective.items() if word in wanted)
            case "who_is":
                yield from (({"job": job}, name) for job, name in self.jobs.items())
            case "thinks":
                yield from (
                    ({"a": name, "o": thing}, phrase)
                    for (name, thing), phrase in self.belief.items()
                    if name in self.suspects
                )

    def finish(self) -> str:
        """Fills the story up with small sentences, ends it, and joins it."""
        if self.kind not in ("where_person", "who_has") and self.chance(0.4):
            self._echo()
        pauses = list(range(1, len(self.told) + 1))
        self.rng.shuffle(pauses)
        self.say("end", a=self.told[-1].latest or self.people[-1])
        asides: dict[int, str] = {}
        target = self.rng.randint(MIN_SENTENCES, MAX_SENTENCES)
        for position in pauses:
            recalls = list(_recalls(self.told[position - 1].slots))
            if recalls and self.chance(RECALLED):
                kind, slots = self.rng.choice(recalls)
                asides[position] = render(self.rng, kind, slots, slots.get("a", ""))
        while pauses and len(self.told) + len(asides) < target:
            position = pauses.pop()
            if position not in asides:
                asides[position] = self._aside(self.told[position - 1])
        text: list[str] = []
        for position, told in enumerate(self.told):
            if position in asides:
                text.append(asides[position])
            text.append(told.sentence)
        return " ".join(text)

    def _aside(self, before: Told) -> str:
        """A sentence that changes nothing, after another."""
        kind, subject = self.rng.choice(("scene", "scene", "feel", "feel_he")), before.subject
        if subject is None and (kind == "feel_he" or before.latest is None):
            kind = "scene"
        slots = {"a": before.latest} if kind == "feel" else {}
        return render(self.rng, kind, slots, subject or "")

    def _echo(self) -> None:
        """Somebody says, sees or remembers a fact of the story: not the one that is asked for."""
        facts: list[tuple[str, dict[str, str]]] = []
        for thing, (place, phrase) in self.where.items():
            if thing == self.asked_about and self.kind in ("where_object", "who_has", "thinks"):
                continue
            knowing = [name for name in self.people if self.belief.get((name, thing)) == phrase]
            facts += [("thinks", {"a": name, "o": thing, "loc": phrase}) for name in knowing]
            facts += [
                ("see", {"a": name, "o": thing, "loc": phrase}) for name in self.people if self.place[name] == place
            ]
            facts += [
                ("tells", {"a": name, "b": other, "o": thing, "loc": phrase})
                for other in knowing
                for name in self.people
                if name != other and self.place[name] == self.place[other]
            ]
        for thing, name in self.holder.items():
            if not (thing == self.asked_about and self.kind == "who_has"):
                facts.append(("holds", {"a": name, "o": thing}))
        if facts:
            kind, slots = self.rng.choice(facts)
            self.say(kind, **slots)
