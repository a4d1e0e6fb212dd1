"""Little stories in which things move and people remember, each with one question that has one right answer.

`generate_story(seed, index)` is a pure function: it picks a kind of question, a plot that can raise it, people, places
and things, and then plays the plot in a small simulated world. Nobody gives what they do not hold or is in two places,
and everybody remembers a thing where they last saw it, so a question about a belief has an answer too. The sentences
are in `story_grammar.py`, the words in `lexicon.py`; `story_judge.py` reads stories back.

Simplifications: people notice only what happens while they are present, arriving somewhere shows them nothing, and a
hiding place ("under the bench") belongs to the place where it was first used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dsv3_mini.data import lexicon
from dsv3_mini.data.story_grammar import QUESTIONS, TEMPLATES

TRAIN_SEED = 0
HELD_OUT_SEED = 1

# How often each kind of question is asked, in percent.
QUESTION_SHARES = {
    "where_object": 22,
    "who_has": 14,
    "where_person": 13,
    "who_gave": 8,
    "what_received": 8,
    "promised": 8,
    "colour": 5,
    "material": 5,
    "who_is": 6,
    "thinks": 11,
}
assert sum(QUESTION_SHARES.values()) == 100

MIN_SENTENCES, MAX_SENTENCES = 7, 10  # without question and answer; a plot's own sentences may ask for one more
MIN_WORDS = 54  # of those sentences


@dataclass(frozen=True)
class Story:
    """`text` is the whole document, from the opening to the answer; `kind` is a key of `QUESTION_SHARES`."""

    text: str
    question: str
    answer: str
    kind: str


def generate_story(seed: int, index: int) -> Story:
    """Story number `index` of the stream `seed`: the same arguments always give the same story."""
    rng = random.Random(f"stories-{seed}-{index}")
    kind = rng.choices(_KINDS, _SHARES)[0]
    teller = _Teller(rng, kind)
    rng.choice(_PLOTS_BY_KIND[kind])(teller)
    question, answer = teller.ask()
    body = teller.finish()
    return Story(f"{body}\nQuestion: {question}\nAnswer: {answer}", question, answer, kind)


def prompt_of(story: Story) -> str:
    """The text up to and including "Answer:"; the answer follows after a space."""
    return story.text[: -len(story.answer) - 1]


def is_right(story: Story, answer_text: str) -> bool:
    """Whether the first line of what follows the prompt is exactly the answer."""
    return answer_text.strip().split("\n", 1)[0].strip() == story.answer


def samples(count: int, seed: int = TRAIN_SEED) -> Iterator[Story]:
    """The first `count` stories of a stream."""
    return (generate_story(seed, index) for index in range(count))


# ---- sentences -------------------------------------------------------------------------------------------------------


def _split(pattern: str) -> tuple[str, ...]:
    """ "{a} felt {feeling}." -> ("", "a", " felt ", "feeling", "."): literal and slot in turn."""
    return tuple(re.split(r"\{(\w+)\}", pattern))


_BY_KIND: dict[str, list[tuple[str, ...]]] = {}
for _template in TEMPLATES:
    _BY_KIND.setdefault(_template.kind, []).append(_split(_template.pattern))

_GIRLS = frozenset(lexicon.GIRLS)
_INDOORS = frozenset(lexicon.INDOOR_PLACES)
_PRONOUNS = {"he": ("she", "he"), "his": ("her", "his"), "He": ("She", "He")}
_CROWDS = frozenset({"open_both", "go_both", "bond", "talk"})  # their subject is no single person


def _render(rng: random.Random, kind: str, slots: dict[str, str], subject: str) -> str:
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
    word = rng.choice(words)
    while word in drawn:
        word = rng.choice(words)
    drawn.add(word)
    if with_article:
        word = f"{lexicon.article(word)} {word}"
        word = word.capitalize() if head == "An" else word
    return word


# ---- the world -------------------------------------------------------------------------------------------------------


@dataclass
class _Teller:
    """The world of one story, and the sentences told about it so far."""

    rng: random.Random
    kind: str
    told: list[tuple[str, str | None, int]] = field(default_factory=list)  # sentence, its subject, people known by then
    people: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)  # person -> place
    moved: set[str] = field(default_factory=set)
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

    # ---- casting

    def cast(self, count: int) -> list[str]:
        """People whose names begin with different letters."""
        names: list[str] = []
        while len(names) < count:
            name = self.rng.choice(lexicon.GIRLS if self.chance(0.5) else lexicon.BOYS)
            if all(name[0] != other[0] for other in names):
                names.append(name)
        return names

    def new_place(self) -> str:
        while True:
            place = self.rng.choice(lexicon.INDOOR_PLACES if self.chance(0.55) else lexicon.OUTDOOR_PLACES)
            if place not in self.used:
                self.used.add(place)
                return place

    def new_spot(self, place: str) -> str:
        while True:
            spot = self.rng.choice(lexicon.INDOOR_SPOTS if place in _INDOORS else lexicon.OUTDOOR_SPOTS)
            noun = spot.rsplit(" ", 1)[1]
            if noun not in self.used:
                self.used.add(noun)
                return spot

    def new_thing(self) -> tuple[str, str]:
        """A thing that the story does not have yet, and its introduction: ("lantern", "a copper lantern")."""
        thing, materials = self.rng.choice(_MADE_THINGS if self.kind == "material" else _THINGS)
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
        adjective = self.rng.choice(adjectives)
        self.adjective[thing] = adjective
        return thing, f"{lexicon.article(adjective)} {adjective} {thing}"

    # ---- telling

    def say(self, kind: str, **slots: str) -> None:
        subject = slots.get("a")
        sentence = _render(self.rng, kind, slots, subject or "")
        self.told.append((sentence, None if kind in _CROWDS else subject, len(self.people)))

    def open(self, *arrivals: tuple[str, str]) -> None:
        """The opening sentence, and one for everybody else who is somewhere when the story begins."""
        jobs = self.rng.sample(lexicon.JOBS, len(arrivals))
        wanted = 0.75 if self.kind == "who_is" else 0.12
        with_job = [self.chance(wanted) for _ in arrivals]
        if self.kind == "who_is" and not any(with_job):
            with_job[self.rng.randrange(len(arrivals))] = True
        together = len(arrivals) > 1 and arrivals[0][1] == arrivals[1][1] and not any(with_job[:2]) and self.chance(0.8)
        for number, ((name, place), job) in enumerate(zip(arrivals, jobs, strict=True)):
            self.people.append(name)
            self.place[name] = place
            if together and number < 2:
                if number == 1:
                    self.say("open_both", a=arrivals[0][0], b=name, at=lexicon.at(place))
                continue
            if with_job[number] and self.chance(0.7):
                self.jobs[job] = name
                kind, slots = "meet_job" if number else "open_job", {"an_job": f"{lexicon.article(job)} {job}"}
            else:
                kind, slots = "meet" if number else "open", {}
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

    def go(self, name: str, place: str) -> None:
        self.place[name] = place
        self.moved.add(name)
        self.say("go", a=name, to=place)

    def go_both(self, a: str, b: str, place: str) -> None:
        self.place[a] = self.place[b] = place
        self.moved |= {a, b}
        self.say("go_both", a=a, b=b, to=place)

    def take(self, name: str, thing: str) -> None:
        self._grasp(thing, name)
        self.say("take", a=name, o=thing)

    def take_and_go(self, name: str, thing: str, place: str) -> None:
        """Picks a thing up and walks, in one sentence or in two."""
        if self.chance(0.5):
            self._grasp(thing, name)
            self.place[name] = place
            self.moved.add(name)
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
        self.moved.add(name)
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
        thief = self.rng.choice(lexicon.THIEVES)
        phrase = f"{lexicon.article(thief)} {thief}"
        self._lay(thing, place, lexicon.at(place))
        self.say("thief", an_animal=phrase, An_animal=phrase.capitalize(), o=thing, at=lexicon.at(place))

    def promise(self, name: str, other: str | None = None) -> None:
        task = self.rng.choice(lexicon.TASKS)
        if task in self.promises.values():
            return self.promise(name, other)
        self.promises[name] = task
        if other and self.chance(0.4):
            self.say("promise_to", a=name, b=other, task=task)
        else:
            self.say("promise", a=name, task=task)

    # ---- the question, and the end

    def ask(self) -> tuple[str, str]:
        """The question of this story's kind, and its answer."""
        slots, answer = self.rng.choice(list(self._questions()))
        self.asked_about = slots.get("o")
        return self.rng.choice(QUESTIONS[self.kind]).format(**slots), answer

    def _questions(self) -> Iterator[tuple[dict[str, str], str]]:
        match self.kind:
            case "where_object":
                yield from (({"o": thing}, phrase) for thing, (_, phrase) in self.where.items())
            case "who_has":
                yield from (({"o": thing}, name) for thing, name in self.holder.items())
            case "where_person":
                yield from (({"a": name}, f"to the {self.place[name]}") for name in self.people if name in self.moved)
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
                    ({"a": giver, "b": receiver}, f"the {thing}")
                    for giver, thing, receiver in self.received
                    if pairs.count((giver, receiver)) == 1
                )
            case "promised":
                yield from (({"a": name}, task) for name, task in self.promises.items())
            case "colour" | "material":
                yield from (({"o": thing}, adjective) for thing, adjective in self.adjective.items())
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
        if self.chance(0.7):
            self._echo()
        pauses = list(range(1, len(self.told) + 1))
        self.rng.shuffle(pauses)
        self.say("end", a=self.rng.choice(self.people))
        asides: dict[int, str] = {}
        target = self.rng.randint(MIN_SENTENCES, MAX_SENTENCES)
        words = sum(sentence.count(" ") + 1 for sentence, _, _ in self.told)
        while pauses and (len(self.told) + len(asides) < target or words < MIN_WORDS):
            position = pauses.pop()
            asides[position] = self._aside(*self.told[position - 1][1:])
            words += asides[position].count(" ") + 1
        text: list[str] = []
        for position, (sentence, _, _) in enumerate(self.told):
            if position in asides:
                text.append(asides[position])
            text.append(sentence)
        return " ".join(text)

    def _aside(self, subject: str | None, known: int) -> str:
        """A sentence that changes nothing, after a sentence about `subject`."""
        kind = self.rng.choice(("scene", "scene", "feel", "feel_he"))
        if kind == "feel":
            subject = self.rng.choice(self.people[:known])
        elif kind == "feel_he" and subject is None:
            kind = "scene"
        slots = {"a": subject} if kind == "feel" else {}
        return _render(self.rng, kind, slots, subject or "")

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


_THINGS: list[tuple[str, list[str] | None]] = [
    (thing, materials) for things, materials in lexicon.OBJECT_GROUPS for thing in things
] + [(thing, None) for thing in lexicon.FOODS]
_MADE_THINGS = [(thing, materials) for thing, materials in _THINGS if materials]


# ---- plots -----------------------------------------------------------------------------------------------------------


def _fetch(t: _Teller) -> None:
    """Somebody finds a thing and carries it away; somebody else walks about."""
    a, b = t.cast(2)
    here, there = t.new_place(), t.new_place()
    t.open((a, here), (b, t.new_place()))
    thing = t.sees_new(a)
    if t.chance(0.3):
        t.go(b, t.new_place())
    t.take_and_go(a, thing, there)
    if t.kind == "where_object" or t.chance(0.6):
        t.put(a, thing)
        if t.chance(0.5):
            t.go(a, t.new_place())
    if b not in t.moved and t.chance(0.4):
        t.go(b, t.new_place())


def _gift(t: _Teller) -> None:
    """A thing is brought to somebody and given away."""
    a, b = t.cast(2)
    here, there = t.new_place(), t.new_place()
    t.open((a, here), (b, there))
    thing = t.has(a)
    if t.chance(0.4):
        t.say("wants", a=b, o=thing)
    t.go(a, there)
    t.hand(a, thing, b)
    if t.chance(0.4):
        t.say("thanks", a=b, b=a)
    if t.kind == "where_object" or (t.kind not in ("who_has",) and t.chance(0.4)):
        t.put(b, thing) if t.chance(0.4) else t.carry_put(b, thing, t.new_place())
    elif t.chance(0.5):
        t.go(b, t.new_place())


def _chain(t: _Teller) -> None:
    """A thing goes from hand to hand."""
    a, b, c = t.cast(3)
    here, there = t.new_place(), t.new_place()
    t.open((a, here), (b, here), (c, there))
    thing = t.has(a)
    t.hand(a, thing, b)
    if t.chance(0.8) or t.kind == "who_gave":
        t.go(b, there)
        t.hand(b, thing, c)
        if t.chance(0.2):
            t.hand(c, thing, b, "back")


def _belief(t: _Teller) -> None:
    """A thing is moved while somebody is away, or looks on: where do they think it is?"""
    a, b = t.cast(2)
    here = t.new_place()
    t.open((a, here), (b, here))
    thing = t.has(a)
    t.put(a, thing, spot=True)
    version = t.rng.random()
    if version < 0.45:
        leaver, mover = a, b
    elif version < 0.7:
        leaver, mover = b, a
    else:
        mover, watcher = (b, a) if t.chance(0.7) else (a, b)
        t.shift(mover, thing)
        t.say("watches", a=watcher, b=mover)
        if t.chance(0.6):
            t.go(watcher, t.new_place())
        t.suspects = [watcher]
        return
    t.go(leaver, t.new_place())
    t.shift(mover, thing)
    if t.chance(0.7):
        t.say("misses", a=leaver)
    t.suspects = [leaver] if t.chance(0.8) else [mover]
    if t.chance(0.3):
        t.go(mover, t.new_place())


def _vow(t: _Teller) -> None:
    """Promises, each somebody's own."""
    a, b = t.cast(2)
    here = t.new_place()
    t.open((a, here), (b, here))
    if t.chance(0.5):
        t.say("bond", a=a, b=b)
    thing = t.has(t.rng.choice((a, b))) if t.kind == "colour" or t.chance(0.4) else None
    t.promise(a, b)
    if t.chance(0.7):
        t.promise(b, a)
    if thing and t.chance(0.5):
        giver = t.holder[thing]
        t.hand(giver, thing, b if giver == a else a)
    t.go(t.rng.choice((a, b)), t.new_place())
    if t.chance(0.3):
        t.go(b if a in t.moved else a, t.new_place())


def _trade(t: _Teller) -> None:
    """Two people, two things, one swap."""
    a, b = t.cast(2)
    here, there = t.new_place(), t.new_place()
    t.open((a, here), (b, there))
    thing = t.has(a)
    other = t.has(b)
    t.go(a, there)
    t.trade(a, thing, b, other)
    if t.kind == "where_object" or (t.kind != "who_has" and t.chance(0.4)):
        t.carry_put(a, other, t.new_place()) if t.chance(0.5) else t.put(a, other)
    elif t.chance(0.4):
        t.go(a, t.new_place())


def _loss(t: _Teller) -> None:
    """A thing is lost, and perhaps found and given back."""
    a, b = t.cast(2)
    lost_at = t.new_place()
    t.open((a, t.new_place()), (b, t.new_place()))
    thing = t.has(a)
    t.go(a, lost_at)
    t.lose(a, thing)
    if t.chance(0.5):
        t.go(a, t.new_place())
    if t.kind == "where_object" and t.chance(0.7):
        if t.chance(0.6):
            t.say("seeks", a=a, o=thing)
        return
    t.go(b, lost_at)
    t.find(b, thing)
    if t.kind == "where_object":
        t.put(b, thing)
    elif t.kind == "who_gave" or t.chance(0.5):
        if t.place[a] != t.place[b]:
            t.go(b, t.place[a])
        t.hand(b, thing, a, "back")


def _theft(t: _Teller) -> None:
    """An animal carries a thing off."""
    a, b = t.cast(2)
    here, there = t.new_place(), t.new_place()
    t.open((a, here), (b, there))
    thing = t.has(a)
    t.put(a, thing)
    if t.chance(0.4):
        t.go(a, t.new_place())
    t.stolen(thing, there)
    if t.chance(0.4):
        t.say("seeks", a=a, o=thing)
    if t.kind == "who_has" or t.chance(0.3):
        t.find(b, thing)
        if t.kind == "where_object":
            t.put(b, thing)


def _errand(t: _Teller) -> None:
    """Somebody is asked to take a thing somewhere, and does."""
    a, b = t.cast(2)
    here, there = t.new_place(), t.new_place()
    t.open((a, here), (b, here))
    thing = t.has(a)
    t.say("asks", a=a, b=b, o=thing, to=there)
    t.hand(a, thing, b)
    t.carry_put(b, thing, there)
    if t.chance(0.5):
        t.go(t.rng.choice((a, b)), t.new_place())


def _tidy(t: _Teller) -> None:
    """Two things, two places."""
    a, b = t.cast(2)
    here = t.new_place()
    t.open((a, here), (b, here if t.chance(0.5) else t.new_place()))
    things = [(a, t.has(a))]
    things.append((b, t.has(b)) if t.chance(0.5) else (a, t.has(a)))
    t.rng.shuffle(things)
    for name, thing in things:
        t.put(name, thing) if t.chance(0.6) else t.carry_put(name, thing, t.new_place())
    if t.chance(0.3):
        name, thing = t.rng.choice(things)
        if t.where[thing][0] == t.place[name]:
            t.shift(name, thing)


def _search(t: _Teller) -> None:
    """Somebody looks for a thing in the wrong place, then in the right one."""
    a, b = t.cast(2)
    here, wrong = t.new_place(), t.new_place()
    t.open((b, here), (a, t.new_place()))
    thing = t.has(b)
    t.put(b, thing)
    if t.chance(0.5):
        t.go(b, t.new_place())
    t.say("seeks", a=a, o=thing)
    t.go(a, wrong)
    t.say("not_here", a=a, o=thing, at=lexicon.at(wrong))
    t.go(a, here)
    t.find(a, thing)
    if t.kind == "where_object":
        t.put(a, thing) if t.chance(0.5) else t.carry_put(a, thing, t.new_place())


def _walks(t: _Teller) -> None:
    """Three people go their ways."""
    names = t.cast(3)
    first = t.new_place()
    t.open(*((name, first if number < 2 and t.chance(0.5) else t.new_place()) for number, name in enumerate(names)))
    moves = names + t.rng.sample(names, 1)
    t.rng.shuffle(moves)
    for name in moves[: t.rng.randint(2, 4)]:
        t.go(name, t.new_place())
    if t.chance(0.4):
        a, b = t.rng.sample(names, 2)
        t.go_both(a, b, t.new_place()) if t.place[a] == t.place[b] else t.go(a, t.place[b])


def _shop(t: _Teller) -> None:
    """A thing is sold."""
    a, b = t.cast(2)
    here = t.new_place()
    t.open((a, here), (b, t.new_place()))
    thing = t.has(a, t.rng.choice(("has", "makes")))
    other = t.has(b) if t.chance(0.4) else None
    t.go(b, here)
    t.say("wants", a=b, o=thing)
    t.hand(a, thing, b, "sell")
    t.go(b, t.new_place())
    if other and t.kind != "who_has" and t.chance(0.5):
        t.put(b, other)


def _loan(t: _Teller) -> None:
    """A thing is lent, and put away or given back."""
    a, b = t.cast(2)
    here = t.new_place()
    t.open((a, here), (b, here))
    thing = t.has(a)
    if t.chance(0.5):
        t.say("wants", a=b, o=thing)
    t.hand(a, thing, b, "lend")
    t.go(b, t.new_place())
    if t.kind == "where_object" or (t.kind == "where_person" and t.chance(0.5)):
        t.put(b, thing)
    elif t.kind == "who_gave" or t.chance(0.5):
        t.go(b, here)
        t.hand(b, thing, a, "back")


def _craft(t: _Teller) -> None:
    """Somebody makes or finds a thing and gives it to somebody who comes by."""
    a, b = t.cast(2)
    here = t.new_place()
    t.open((a, here), (b, t.new_place()))
    thing = t.has(a, "makes")
    t.go(b, here)
    t.hand(a, thing, b)
    t.say("thanks", a=b, b=a)
    if t.chance(0.5) and t.kind != "who_has":
        t.put(b, thing)
    elif t.chance(0.5):
        t.go(b, t.new_place())


def _pair(t: _Teller) -> None:
    """A thing lies about, two people come by together, and one of them takes it."""
    a, b = t.cast(2)
    here, there = t.new_place(), t.new_place()
    t.open((a, here), (b, here))
    thing = t.lies(there)
    t.go_both(a, b, there)
    taker, other = t.rng.sample((a, b), 2)
    t.take(taker, thing)
    if t.chance(0.4):
        t.say("talk", a=a, b=b)
    if t.kind == "where_object" or (t.kind != "who_has" and t.chance(0.4)):
        t.carry_put(taker, thing, t.new_place()) if t.chance(0.5) else t.put(taker, thing)
    elif t.chance(0.6):
        t.hand(taker, thing, other)
    if t.kind == "where_person" or t.chance(0.3):
        t.go(t.rng.choice((a, b)), t.new_place())


_PLOTS: dict[Callable[[_Teller], None], tuple[str, ...]] = {
    _fetch: ("where_object", "where_person", "colour", "material", "who_is"),
    _gift: ("where_object", "who_has", "who_gave", "what_received", "where_person", "colour", "material", "who_is"),
    _chain: ("who_has", "who_gave", "what_received", "colour", "material"),
    _belief: ("thinks",),
    _vow: ("promised",),
    _trade: ("where_object", "who_has", "what_received", "colour"),
    _loss: ("where_object", "who_has", "who_gave"),
    _theft: ("where_object", "who_has"),
    _errand: ("where_object", "where_person", "who_is", "who_gave"),
    _tidy: ("where_object", "colour", "material"),
    _search: ("where_object", "where_person", "who_has"),
    _walks: ("where_person", "who_is"),
    _shop: ("who_has", "what_received", "where_person"),
    _loan: ("who_has", "who_gave", "where_object", "what_received"),
    _craft: ("who_has", "who_gave", "who_is", "material", "what_received"),
    _pair: ("where_object", "who_has", "where_person"),
}
_PLOTS_BY_KIND = {kind: [plot for plot, kinds in _PLOTS.items() if kind in kinds] for kind in QUESTION_SHARES}
_KINDS, _SHARES = list(QUESTION_SHARES), list(QUESTION_SHARES.values())
