"""The plots: what happens in a story, as calls of a `Teller`, and the questions that each plot can end with."""

from __future__ import annotations

from collections.abc import Callable

from dsv3_mini.data import lexicon
from dsv3_mini.data.story_grammar import QUESTIONS
from dsv3_mini.data.story_world import Teller


def _fetch(t: Teller) -> None:
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
    if t.kind == "where_person" and t.chance(0.5):
        t.go(t.rng.choice((a, b)), t.new_place())


def _gift(t: Teller) -> None:
    """A thing is brought to somebody and given away."""
    a, b = t.cast(2)
    here, there = t.new_place(), t.new_place()
    t.open((a, here), (b, there))
    thing = t.has(a)
    if t.chance(0.4):
        t.say("wants", a=b, o=thing)
    t.go(a, there)
    t.hand(a, thing, b)
    if t.kind != "who_has" and t.chance(0.4):
        t.say("thanks", a=b, b=a)
    if t.kind == "where_object" or (t.kind not in ("who_has",) and t.chance(0.4)):
        t.put(b, thing) if t.chance(0.4) else t.carry_put(b, thing, t.new_place())
    elif t.chance(0.5):
        t.go(b, t.new_place())


def _chain(t: Teller) -> None:
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


def _belief(t: Teller) -> None:
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


def _vow(t: Teller) -> None:
    """Promises, each somebody's own."""
    a, b = t.cast(2)
    here = t.new_place()
    t.open((a, here), (b, here))
    if t.chance(0.5):
        t.say("bond", a=a, b=b)
    thing = t.has(t.rng.choice((a, b))) if t.kind == "colour" or t.chance(0.4) else None
    t.promise(a, b)
    if t.chance(0.25):
        t.promise(b, a)
    if thing and t.chance(0.5):
        giver = t.holder[thing]
        t.hand(giver, thing, b if giver == a else a)
    t.go(t.rng.choice((a, b)), t.new_place())
    if t.chance(0.3):
        t.go(b if a in t.moved else a, t.new_place())


def _trade(t: Teller) -> None:
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


def _loss(t: Teller) -> None:
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


def _theft(t: Teller) -> None:
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


def _errand(t: Teller) -> None:
    """Somebody is asked to take a thing somewhere, and does."""
    a, b = t.cast(2)
    here, there = t.new_place(), t.new_place()
    t.open((a, here), (b, here))
    thing = t.has(a)
    t.say("asks", a=a, b=b, o=thing, to=there)
    t.hand(a, thing, b)
    t.carry_put(b, thing, there)
    if t.kind == "where_person" and t.chance(0.5):
        t.go(t.rng.choice((a, b)), t.new_place())


def _tidy(t: Teller) -> None:
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


def _search(t: Teller) -> None:
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


def _walks(t: Teller) -> None:
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


def _shop(t: Teller) -> None:
    """A thing is sold."""
    a, b = t.cast(2)
    here = t.new_place()
    t.open((a, here), (b, t.new_place()))
    thing = t.has(a, t.rng.choice(("has", "makes")))
    other = t.has(b) if t.chance(0.4) else None
    t.go(b, here)
    t.say("wants", a=b, o=thing)
    t.hand(a, thing, b, "sell")
    if t.kind != "who_has" or t.chance(0.3):
        t.go(b, t.new_place())
    if other and t.kind != "who_has" and t.chance(0.5):
        t.put(b, other)


def _loan(t: Teller) -> None:
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


def _craft(t: Teller) -> None:
    """Somebody makes or finds a thing and gives it to somebody who comes by."""
    a, b = t.cast(2)
    here = t.new_place()
    t.open((a, here), (b, t.new_place()))
    thing = t.has(a, "makes")
    t.go(b, here)
    t.hand(a, thing, b)
    if t.kind != "who_has":
        t.say("thanks", a=b, b=a)
    if t.chance(0.5) and t.kind != "who_has":
        t.put(b, thing)
    elif t.chance(0.5):
        t.go(b, t.new_place())


def _pair(t: Teller) -> None:
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
    if t.kind == "where_person":
        t.go(t.rng.choice((a, b)), t.new_place())


def _alone(t: Teller) -> None:
    """One person, one thing, a few steps."""
    (a,) = t.cast(1)
    t.open((a, t.new_place()))
    if t.kind == "where_person" and t.chance(0.5):
        t.go(a, t.new_place())
    thing = t.has(a, t.rng.choice(("has", "has", "makes")))
    if t.kind == "where_person":
        t.go(a, t.new_place())
    if t.kind == "where_object" or t.chance(0.4):
        t.carry_put(a, thing, t.new_place()) if t.chance(0.5) else t.put(a, thing)
    elif t.chance(0.4):
        t.go(a, t.new_place())


def _treasure(t: Teller) -> None:
    """One person finds a thing, takes it, and perhaps loses it again."""
    (a,) = t.cast(1)
    here, there = t.new_place(), t.new_place()
    t.open((a, here))
    thing = t.sees_new(a)
    if t.kind not in ("where_object", "colour", "material") or t.chance(0.7):
        t.take_and_go(a, thing, there)
        if t.kind == "where_object":
            t.lose(a, thing) if t.chance(0.3) else t.put(a, thing)


def _together(t: Teller) -> None:
    """Two people, one thing, given where they are."""
    a, b = t.cast(2)
    here = t.new_place()
    t.open((a, here), (b, here))
    thing = t.has(a)
    if t.kind == "who_has" and t.chance(0.3):
        return
    t.hand(a, thing, b)
    if t.kind == "where_object":
        t.put(b, thing)


_PLOTS: dict[Callable[[Teller], None], tuple[str, ...]] = {
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
    _alone: ("where_object", "where_person", "colour", "material", "who_is"),
    _treasure: ("where_object", "where_person", "colour", "material"),
    _together: ("where_object", "who_has", "who_gave", "what_received", "colour", "material", "who_is"),
}
_SHORT = (_alone, _treasure, _together)  # told five times as often as the others
PLOTS_BY_KIND = {
    kind: [plot for plot, kinds in _PLOTS.items() if kind in kinds for _ in range(5 if plot in _SHORT else 1)]
    for kind in QUESTIONS
}
