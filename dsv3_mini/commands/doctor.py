"""dsv3 doctor: what the machine has, and what to do about what is missing."""

from __future__ import annotations

import argparse

from dsv3_mini.doctor import examine, healthy, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> int:
    findings = examine()
    print(report(findings))
    return 0 if healthy(findings) else 2
