"""Runs the jobs of an experiment in worker processes, and only those not finished before."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.studies.store import Store


@dataclass(frozen=True)
class Job:
    """A part of an experiment.

    Attributes:
      name: under which its result will be found in the store.
      function: called with the store; it writes the result.
      needs: the names of the jobs that must be finished before.
    """

    name: str
    function: Callable[[Store], None]
    needs: tuple[str, ...] = ()


def command_line(study: str, description: str, output: str) -> argparse.ArgumentParser:
    """The options that every experiment has.

    Args:
      study: its name.
      description: for --help.
      output: the default folder in words.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.studies {study}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"default: {output}")
    parser.add_argument(
        "--workers", type=at_least_one, default=2, help="processes at work; default: 2"
    )
    return parser


def at_least_one(text: str) -> int:
    """The whole number that an option needs, from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def run_jobs(jobs: Sequence[Job], store: Store, workers: int) -> None:
    """Runs what is not finished, in the order given where nothing is waited for.

    Every result is written whole or not at all, so an interrupted run goes on where it was.

    Args:
      jobs: all jobs of the experiment.
      store: where results go.
      workers: processes at work, one thread each.
    """
    finished = {job.name for job in jobs if store.has(job.name)}
    waiting = [job for job in jobs if job.name not in finished]
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")
    running: dict[Future[None], str] = {}
    with (
        ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool,
        tqdm(total=len(jobs), initial=len(finished), unit="job") as bar,
    ):
        while waiting or running:
            ready = [job for job in waiting if finished.issuperset(job.needs)]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(job.function, store)] = job.name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                finished.add(running.pop(future))
                bar.update()
