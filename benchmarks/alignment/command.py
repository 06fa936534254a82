"""What the command lines share: reading options, refusing bad input, running and reporting."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.alignment.errors import InputError
from benchmarks.alignment.runner import Job, run_jobs
from benchmarks.alignment.store import Store, open_store


@dataclass(frozen=True)
class Plan:
    """An experiment to carry out.

    Attributes:
      settings: what its results folder is known by.
      jobs: its parts.
      report: writes and returns what is found, once all parts are finished.
      output: the results folder.
      workers: processes at work.
    """

    settings: dict[str, Any]
    jobs: list[Job]
    report: Callable[[Store], str]
    output: Path
    workers: int


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one sentence, like any other refusal."""

    def error(self, message: str) -> NoReturn:
        """Refuses the command line."""
        raise InputError(message)


def command_line(program: str, description: str, output: str) -> Parser:
    """The options that every experiment has."""
    parser = Parser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"default: {output}")
    parser.add_argument("--workers", type=int, default=2, help="processes at work; default: 2")
    return parser


def at_least_one(name: str, number: int) -> int:
    """A number of things, of which there must be one.

    Raises:
      InputError: there is none.
    """
    if number < 1:
        raise InputError(f"{name}: expected at least 1, got {number}")
    return number


def carry_out(program: str, plan: Callable[[], Plan]) -> int:
    """Runs an experiment and prints its report; returns the exit code, 2 for bad input."""
    try:
        planned = plan()
        store = open_store(planned.output, planned.settings)
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    try:
        seconds = run_jobs(planned.jobs, store, planned.workers)
    except KeyboardInterrupt:
        print(f"{program}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{seconds:.0f} s of processor time in this run's workers", file=sys.stderr)
    print(planned.report(store))
    return 0
