"""The grammar of the stories as data: every sentence that a story can hold, by kind.

A template is a sentence with slots. The generator fills them and the judge reads them back, so the language is written
down once; what a sentence *does* to the world is written twice, in `stories.py` and in `story_judge.py`, and the two
must agree.

Slots:
    a b c         people ("Mira"); the first person of a sentence is its subject
    he his He     pronouns of the subject; in a sentence without people, of the sentence before
    o q           things already introduced ("lantern", after "the")
    new New       a thing's introduction ("a copper lantern"), inside or at the start of a sentence
    at            where somebody is ("in the cellar"): each place has its own preposition
    to            the bare place ("the cellar"), after "to"
    spot          a hiding place ("under the bench")
    loc           either of at and spot
    task          what is promised ("feed the goats")
    spot_noun     what a hiding place is named after ("bench"), told before
    worker        a job that somebody in the story has ("baker")
    adj an_adj    what a thing was introduced as ("copper"), bare or with its article
    an_X An_X     a word of category X with its article
    X             a word of category X (`lexicon.CATEGORIES`)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """One sentence of the language: what it does (`kind`) and how it reads (`pattern`)."""

    kind: str
    pattern: str


_TIMES = (
    "One {weather} {daytime},",
    "On {an_weather} {daytime} in {month},",
    "One {daytime} in {season},",
    "It was {an_weather} {daytime}, and",
    "Last {weekday},",
    "Before {meal},",
    "After the {event},",
    "Long ago, on {an_weather} {daytime},",
)

# A newcomer is announced, as a thing is by its "a": a name that begins a sentence is always a known one.
_MEANWHILE = ("Meanwhile,", "At that time,")
_WAS = ("was", "was waiting", "was busy", "was resting")

# What happens: kind -> its sentences. Each kind has one meaning, whatever the wording.
_PLOT: dict[str, tuple[str, ...]] = {
    # people appear
    "meet": tuple(f"{while_} {{a}} {was} {{at}}." for while_ in _MEANWHILE for was in _WAS),
    "meet_job": tuple(f"{while_} {{a}}, {{an_job}}, {was} {{at}}." for while_ in _MEANWHILE for was in _WAS),
    "job": ("{a} was {an_job}.", "{a} worked as {an_job}.", "{a} had always been {an_job}."),
    # things appear
    "has": (
        "{a} had {new}.",
        "{a} was carrying {new}.",
        "{a} held {new} in {his} hands.",
        "{a} had {new} with {his} things.",
    ),
    "lies": ("There was {new} {at}.", "{New} was {at}.", "Somebody had left {new} {at}."),
    "sees_new": ("{a} saw {new} {spot}.", "{a} noticed {new} {spot}.", "{a} discovered {new} {spot}."),
    "makes": ("{a} made {new}.", "{a} {manner} made {new}.", "{a} bought {new}.", "{a} won {new} in a contest."),
    # people move
    "go": (
        "{a} {went} to the {to}.",
        "{a} {manner} {went} to the {to}.",
        "{a} {went} {manner} to the {to}.",
        "Then {a} {went} to the {to}.",
        "After that, {a} {went} to the {to}.",
        "Soon {a} {went} to the {to}.",
        "{a} said goodbye and {went} to the {to}.",
    ),
    "go_both": ("{a} and {b} {went} to the {to}.", "Then {a} and {b} {went} to the {to} together."),
    # people handle things
    "take": (
        "{a} picked up the {o}.",
        "{a} took the {o}.",
        "{a} grabbed the {o}.",
        "{a} {manner} took the {o}.",
        "{a} {manner} picked up the {o}.",
    ),
    "take_go": ("{a} took the {o} and {went} to the {to}.", "{a} picked up the {o} and {went} to the {to}."),
    "put": (
        "{a} put the {o} {loc}.",
        "{a} left the {o} {loc}.",
        "{a} {manner} put the {o} {loc}.",
        "{a} placed the {o} {loc}.",
        "Then {a} put the {o} {loc}.",
        "{a} dropped the {o} {loc}.",
    ),
    "hide": ("{a} hid the {o} {spot}.", "{a} {manner} hid the {o} {spot}.", "Then {a} hid the {o} {spot}."),
    "carry_put": (
        "{a} carried the {o} to the {to} and put it {spot}.",
        "{a} brought the {o} to the {to} and left it {spot}.",
        "{a} took the {o} to the {to} and hid it {spot}.",
    ),
    "shift": (
        "{a} took the {o} and put it {spot}.",
        "{a} found the {o} and hid it {spot}.",
        "{a} moved the {o} and left it {spot}.",
        "Then {a} took the {o} and hid it {spot}.",
    ),
    "give": (
        "{a} gave the {o} to {b}.",
        "{a} handed the {o} to {b}.",
        "{a} {manner} gave the {o} to {b}.",
        "Then {a} gave the {o} to {b}.",
        "{a} passed the {o} to {b}.",
    ),
    "back": ("{a} gave the {o} back to {b}.", "{a} {manner} gave the {o} back to {b}."),
    "sell": ("{a} sold the {o} to {b}.", "{a} sold the {o} to {b} for {number} coins."),
    "lend": ("{a} lent the {o} to {b}.", "{a} {manner} lent the {o} to {b}.", "{a} lent the {o} to {b} for a while."),
    "trade": (
        "{a} gave the {o} to {b} and got the {q} in return.",
        "{a} traded with {b} and gave the {o} for the {q}.",
    ),
    "lose": ("{a} lost the {o} {at}.", "Sadly, {a} lost the {o} {at}.", "By accident, {a} lost the {o} {at}."),
    "find": (
        "{a} found the {o} {loc}.",
        "{a} found the {o} {loc} and picked it up.",
        "At last, {a} found the {o} {loc}.",
        "Luckily, {a} found the {o} {loc}.",
    ),
    "thief": (
        "{An_animal} took the {o} and dropped it {at}.",
        "{An_animal} stole the {o} and left it {at}.",
        "Suddenly, {an_animal} took the {o} and dropped it {at}.",
    ),
    # people see, remember, ask, promise
    "see": ("{a} saw the {o} {loc}.", "{a} noticed the {o} {loc}.", "Later, {a} saw the {o} {loc}."),
    "thinks": (
        "{a} thought that the {o} was {loc}.",
        "{a} was sure that the {o} was {loc}.",
        "{a} remembered the {o} {loc}.",
    ),
    "tells": (
        "{a} asked where the {o} was, and {b} said that it was {loc}.",
        "{a} wanted the {o}, and {b} said that it was {loc}.",
    ),
    "holds": (
        "{a} still had the {o}.",
        "{a} looked at the {o} in {his} hands.",
        "{a} held the {o} {manner}.",
        "Now {a} had the {o}.",
    ),
    "watches": ("{a} watched {b}.", "{a} watched {b} {manner}.", "{a} saw what {b} did."),
    "misses": ("{a} did not see this.", "{a} was far away and saw nothing.", "{a} knew nothing about it."),
    "seeks": ("{a} looked for the {o}.", "{a} wanted to find the {o}.", "{a} looked everywhere for the {o}."),
    "not_here": ("The {o} was not {at}.", "{a} looked {at}, but the {o} was not there."),
    "asks": (
        "{a} asked {b} to bring the {o} to the {to}.",
        "{a} wanted {b} to take the {o} to the {to}.",
        "{a} told {b} to carry the {o} to the {to}.",
    ),
    "wants": ("{a} wanted the {o}.", "{a} liked the {o} very much.", "{a} needed the {o}.", "{a} asked for the {o}."),
    "promise": ("{a} promised to {task}.", "{a} {manner} promised to {task}.", "Then {a} promised to {task}."),
    "promise_to": ("{a} promised {b} to {task}.", "{a} made {b} a promise to {task}."),
    "thanks": ("{a} thanked {b}.", "{a} {manner} thanked {b}.", "{a} said thank you to {b}."),
    "talk": ("{a} and {b} talked about {topic}.", "{a} told {b} a story about {topic}."),
    # what comes back to a word just told: with it a small model learns to copy words of every sort, not names alone
    "place": ("The {to} was {street_mood}.", "It was {street_mood} {at}.", "The {to} smelled of {smell}."),
    "spot": ("The {spot_noun} looked {spot_look}.", "The {spot_noun} seemed {spot_look}."),
    "look": ("Nobody else had {an_adj} {o}.", "It was the only {adj} {o} for miles."),
    "plan": ("{a} wanted to {task} at once.", "{a} had to {task} soon."),
    "worker": ("The {worker} was {feeling}.", "The {worker} looked {feeling}."),
    # what changes nothing
    "bond": ("{a} and {b} were {bond_kind} {bonds}.", "{a} and {b} had been {bonds} for {number} years."),
    "feel": (
        "{a} felt {feeling}.",
        "{a} was {feeling}.",
        "{a} looked {feeling}.",
        "{a} {reaction}.",
        "{a} {reaction} {manner}.",
        "{a} loved {hobby}.",
        "{a} was good at {hobby}.",
        "{a} thought about {topic}.",
        "{a} ate some {dish}.",
        "{a} hummed {an_song_kind} {song}.",
    ),
    "feel_he": (
        "{He} felt {feeling}.",
        "{He} was {feeling}.",
        "{He} {reaction} {manner}.",
        "{He} had never been so {feeling}.",
        "{He} sang {an_song_kind} {song}.",
        "{He} dreamed of {topic}.",
    ),
    "scene": (
        "The {sky_thing} was {sky_look}.",
        "The {air_thing} was {air_feel}.",
        "The {street} was {street_mood}.",
        "It smelled of {smell}.",
        "It smelled of {smell} and {smell}.",
        "{An_animal} {animal_deed} {nearby}.",
        "Somewhere {an_animal} was {animal_doing}.",
        "{An_animal} was {animal_doing} {nearby}.",
        "The clock struck {number}.",
        "There were {number} {birds} in the sky.",
        "It was almost time for {meal}.",
    ),
    "end": (
        "In the end, everyone was {feeling}.",
        "In the end, {a} was {feeling}.",
        "In the end, {a} felt {feeling} and {feeling}.",
        "That evening, they all ate {dish} together.",
        "That evening, they ate {dish} and {dish}.",
        "It had been {an_day_kind} day.",
        "That night, {a} slept {manner}.",
        "That night, {a} dreamed of {topic}.",
        "It was a day that {a} always remembered.",
        "From then on, {a} loved {hobby}.",
    ),
}

_OPENINGS = {
    "open": "{a} was {at}.",
    "open_job": "{a}, {an_job}, was {at}.",
    "open_both": "{a} and {b} were {at}.",
    "open_alone": "{a} was alone {at}.",
    "open_job_alone": "{a}, {an_job}, was alone {at}.",
}

# Questions: kind -> its wording. `job` is asked with the word, `o` and `a` with what they name.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "where_object": ("Where is the {o}?",),
    "who_has": ("Who has the {o}?",),
    "where_person": ("Where did {a} go last?",),
    "who_gave": ("Who gave the {o} to {b}?",),
    "what_received": ("What did {b} get from {a}?",),
    "promised": ("What did {a} promise to do?",),
    "colour": ("What colour is the {o}?",),
    "material": ("What is the {o} made of?",),
    "who_is": ("Who is the {job}?",),
    "thinks": ("Where does {a} think the {o} is?",),
}

# Answers: kind -> the sentence that says it, with what was asked for in the slot `answer`.
ANSWERS: dict[str, str] = {
    "where_object": "The {o} is {answer}.",
    "who_has": "The {o} is with {answer}.",
    "where_person": "{a} went to the {answer}.",
    "who_gave": "{b} got the {o} from {answer}.",
    "what_received": "{b} got the {answer}.",
    "promised": "{a} promised to {answer}.",
    "colour": "The {o} is {answer}.",
    "material": "The {o} is made of {answer}.",
    "who_is": "The {job} is {answer}.",
    "thinks": "{a} thinks that the {o} is {answer}.",
}

OPENINGS = tuple(Template(kind, f"{time} {tail}") for kind, tail in _OPENINGS.items() for time in _TIMES)
PLOT = tuple(Template(kind, pattern) for kind, patterns in _PLOT.items() for pattern in patterns)
TEMPLATES = OPENINGS + PLOT
