"""From what a worker wrote, and how it ended, to the outcomes of a notebook. No process in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv3_mini.course.grade.results import Graded, Outcome, Submission, clean


def verdict(
    submission: Submission, events: Sequence[Mapping[str, Any]], ended: str, seconds: float, memory: int
) -> Graded:
    """Args: events in the order written (worker.py lists them); ended, why the worker did not get to its end ("killed{where}: ..."), or nothing."""
    names: list[str] = []
    outcomes: dict[str, Outcome] = {}
    notes: list[str] = []
    guards: dict[str, str] = {}
    failed, doing = "", ""
    for event in events:
        match event["event"]:
            case "exercises":
                names = [str(name) for name in event["names"]]
            case "ready":
                guards = dict(event["guards"])
            case "cell":
                doing = f"in cell {event['number']}"
            case "ran":
                if event["error"] and ": Refused: " not in event["error"]:  # that is told already
                    notes.append(clean(event["error"]))
                doing = ""
            case "refused":
                notes.append(clean(f"refused {doing}: {event['text']}" if doing else f"refused: {event['text']}"))
            case "check":
                doing = f"when {event['name']} was checked"
            case "result":
                lines = tuple(clean(line) for line in event["lines"])
                outcomes[event["name"]] = Outcome(event["name"], event["state"], lines)
                doing = ""
            case "failed":
                failed = event["text"]
    why = failed or ended.format(where=f" {doing}" if doing else "")
    if why and not names:
        names = ["(all)"]
    if why:
        notes.append(clean(why))
    lost = Outcome("", "not run", (clean(why or "it was not checked"),))
    return Graded(
        submission,
        tuple(outcomes.get(name, Outcome(name, lost.state, lost.lines)) for name in names),
        tuple(dict.fromkeys(notes)),
        round(seconds, 1),
        memory,
        guards,
    )
