"""The syllabus, lessons/README.md, written from what the lessons' sources say about themselves."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3_mini.course.source import TRACKS, Lesson

ABOUT_TRACKS = {
    "half-day": "a workshop of half a day: see the whole, build the heart of it",
    "two-days": "two days: every component by hand",
    "term": "a term: everything, with the exercises that take an evening",
}


def syllabus(lessons: Sequence[Lesson]) -> str:
    """The page, in Markdown."""
    rows = [
        "| lesson | minutes | after | exercises | what you will have built |",
        "|---|---|---|---|---|",
        *(_row(lesson) for lesson in lessons),
    ]
    tracks = [_track(name, lessons) for name in TRACKS]
    return "\n".join(
        [
            "# The lessons",
            "",
            "<!-- written by `make notebooks` from the headers of solutions/*.py -->",
            "",
            "Open a lesson, read, run, fill in the blanks. A blank that is left blank never stops the rest. Every lesson can be",
            "entered first: what it needs from the ones before comes from the package. Answers are in `solutions/`.",
            "",
            *rows,
            "",
            "## Tracks",
            "",
            "Minutes are those of reading, running and solving, without breaks. `python -m dsv3_mini.course.build --track NAME --out FOLDER`",
            "writes a track's notebooks, without the cells that only a longer track has.",
            "",
            "| track | minutes | lessons |",
            "|---|---|---|",
            *tracks,
            "",
        ]
    )


def _row(lesson: Lesson) -> str:
    after = ", ".join(name[:2] for name in lesson.after) or "nothing"
    exercises = ", ".join(f"{e.title} {'●' * e.difficulty}" for e in lesson.exercises)
    return f"| [{lesson.name[:2]} {lesson.title}]({lesson.name}.ipynb) | {lesson.minutes} | {after} | {exercises} | {lesson.builds} |"


def _track(name: str, lessons: Sequence[Lesson]) -> str:
    own = [lesson for lesson in lessons if name in lesson.tracks]
    numbers = ", ".join(lesson.name[:2] for lesson in own)
    return f"| {name}: {ABOUT_TRACKS[name]} | {sum(lesson.minutes for lesson in own)} | {numbers} |"
