"""dsv3 grade: run readers' notebooks, each in a process of its own, and say which exercises are right."""

from __future__ import annotations

import argparse
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console

from dsv3_mini.commands.flags import number, whole
from dsv3_mini.course.grade.find import CHECKS, find_notebooks, with_checks
from dsv3_mini.course.grade.report import print_report, to_csv, to_json
from dsv3_mini.course.grade.results import Graded, Submission
from dsv3_mini.course.grade.supervise import Limits, grade
from dsv3_mini.errors import UserError
from dsv3_mini.files import write_text

WIDTH = 140  # of the tables where they are not written to a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    usual = Limits()
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="with NN_topic.ipynb, or with a folder a person")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write one line an exercise")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything, notes and resources too")
    time = parser.add_mutually_exclusive_group()
    time.add_argument(
        "--seconds", type=number(1), default=usual.seconds, help=f"time of a notebook (default: {usual.seconds:g})"
    )
    time.add_argument("--minutes", type=number(0.1), help="the same, in minutes")
    parser.add_argument(
        "--cell-seconds",
        type=number(1),
        default=usual.cell_seconds,
        help=f"time of one cell; the rest goes on (default: {usual.cell_seconds:g})",
    )
    parser.add_argument(
        "--memory",
        metavar="GB",
        type=number(0.5),
        default=usual.memory,
        help=f"memory of a notebook (default: {usual.memory:g})",
    )
    parser.add_argument("--jobs", type=whole(1, 64), default=1, help="notebooks at a time (default: 1)")
    parser.add_argument(
        "--checks",
        metavar="MODULE",
        default=CHECKS,
        help=f"checker modules, for lessons of your own (default: {CHECKS})",
    )


def run(args: argparse.Namespace) -> int:
    for file in (args.csv, args.json):  # now, not after an hour of grading
        if file and not file.resolve().parent.is_dir():
            raise UserError(f"{file}: there is no folder {file.parent} to write it to")
    limits = Limits(60 * args.minutes if args.minutes else args.seconds, args.cell_seconds, args.memory)
    found, passed_over = find_notebooks(args.folder)
    found, without = with_checks(found, args.checks)
    if not found:
        raise UserError(f"{args.folder}: no checks for {', '.join(without)}: there is nothing to grade")
    graded = _all(found, args.checks, limits, args.jobs)
    if args.csv:
        write_text(args.csv, to_csv(graded))
    if args.json:
        write_text(args.json, to_json(graded, limits, [*passed_over, *without]))
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    print_report(graded, console)
    for names, why in ((passed_over, "not named NN_topic.ipynb"), (without, "no exercises to grade")):
        if names:
            console.print(f"Passed over, {why}: {', '.join(names)}", markup=False, highlight=False)
    return 0


def _all(found: list[Submission], checks: str, limits: Limits, jobs: int) -> list[Graded]:
    """Each notebook's results, in the order found."""
    stop = threading.Event()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(grade, s, checks.format(number=s.number), limits, stop) for s in found]
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                one = future.result()
                if sys.stderr.isatty():
                    name = f"{one.submission.person} {one.submission.lesson}"
                    print(f"{count} of {len(found)}: {name}, {one.points} of {one.of} points", file=sys.stderr)
        except BaseException:  # Ctrl-C, for one
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
