"""Runs the jobs of an experiment in worker processes, and only those not finished before."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event

import torch
from tqdm import tqdm

from benchmarks.alignment.store import Store
from benchmarks.alignment.training import StepHook

REFRESH_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A part of an experiment.

    Attributes:
      name: under which its result will be found in the store.
      steps: of training, for the progress bar.
      function: called with the store and a hook for its steps; it writes the result.
      needs: the names of the jobs that must be finished before.
    """

    name: str
    steps: int
    function: Callable[[Store, StepHook], None]
    needs: tuple[str, ...] = ()


class StoppedError(Exception):
    """The user has asked to stop; raised inside a worker."""


class Worker:
    """What a worker process shares with the one that the user started."""

    steps: Synchronized[int]
    stop: Event

    @classmethod
    def start(cls, steps: Synchronized[int], stop: Event) -> None:
        """Prepares a worker process: one thread, and ended by its parent alone."""
        torch.set_num_threads(1)
        cls.steps, cls.stop = steps, stop
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=cls._end_with_parent, daemon=True).start()

    @classmethod
    def count(cls) -> None:
        """The hook of every training step."""
        if cls.stop.is_set():
            raise StoppedError
        with cls.steps.get_lock():
            cls.steps.value += 1

    @classmethod
    def run(cls, job: Job, store: Store) -> float:
        """Runs a job; returns the seconds of processor time that it took."""
        start = time.process_time()
        job.function(store, cls.count)
        return time.process_time() - start

    @staticmethod
    def _end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)


def run_jobs(jobs: Sequence[Job], store: Store, workers: int) -> float:
    """Runs what is not finished, in the order given where nothing is waited for.

    Args:
      jobs: all jobs of the experiment.
      store: where results go.
      workers: processes at work.

    Returns:
      Seconds of processor time that the jobs took.
    """
    finished = {job.name for job in jobs if store.has(job.name)}
    waiting = [job for job in jobs if job.name not in finished]
    if not waiting:
        return 0.0
    context = multiprocessing.get_context("spawn")
    steps, stop = context.Value("q", 0), context.Event()
    total = sum(job.steps for job in jobs)
    before = total - sum(job.steps for job in waiting)
    with (
        ProcessPoolExecutor(workers, context, Worker.start, (steps, stop)) as pool,
        tqdm(total=total, initial=before, unit="step", smoothing=0.05) as bar,
    ):

        def show() -> None:
            bar.update(before + steps.value - bar.n)

        try:
            return _hand_out(waiting, finished, store, workers, pool, show)
        finally:
            stop.set()  # the jobs in hand end at their next step


def _hand_out(
    waiting: list[Job],
    finished: set[str],
    store: Store,
    workers: int,
    pool: ProcessPoolExecutor,
    show: Callable[[], object],
) -> float:
    """Keeps the workers busy, each with the first job that can be done."""
    seconds = 0.0
    running: dict[Future[float], str] = {}
    while waiting or running:
        ready = [job for job in waiting if finished.issuperset(job.needs)]
        for job in ready[: workers - len(running)]:
            waiting.remove(job)
            running[pool.submit(Worker.run, job, store)] = job.name
        for future in wait(running, REFRESH_SECONDS, FIRST_COMPLETED).done:
            seconds += future.result()
            finished.add(running.pop(future))
        show()
    return seconds
