"""A process of its own for what `benchmarks.fused` measures, and the gauges of time and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import turns
from benchmarks.fused_problem import Problem, max_error, random_problem, real_problem
from benchmarks.fused_ways import FLOOR_ROWS, WAYS, Step, Way, floor
from benchmarks.record import Others
from benchmarks.turns import FLOOR, Timed

SETTLE_SECONDS = 0.05
"""The other process's threads spin for a moment after its turn, so a turn starts later."""
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """What is measured: a way, on a shape, with a trained or a frozen head."""

    way: str
    pairs: int
    tokens: int
    width: int
    vocab: int
    dtype: str
    device: str
    frozen: bool


class Apart:
    """A fresh process that calls functions by name, and keeps what they leave in their modules.

    An exception in the process is raised here; if the process dies, BrokenProcessPool is.
    """

    def __init__(self) -> None:
        # Forked from a server that has imported torch and done nothing else: as clean as a new
        # interpreter, without its seconds of start-up.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self._pool = ProcessPoolExecutor(1, context)

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def start(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Call `function(*args)` in the process; its result comes later."""
        return self._pool.submit(function, *args)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """What `function(*args)` returns in the process."""
        return self.start(function, *args).result()


# ------------------------------------------------------------------------------------- the gauges


class HostGauge:
    """Time of the CPU, memory by the peak that Linux keeps for a process.

    With one thread, time is the processor's of this process, which other processes hardly disturb;
    with several, where waiting takes processor time as well, it is the clock's.
    """

    def reset(self) -> None:
        """Forget the peak so far, so that growth counts from what is held now."""
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            # Freed memory that the C library keeps would hide that much growth.
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._status("VmRSS")

    def growth_mib(self) -> float | None:
        """The peak since the reset minus what was held then; None where the system keeps none."""
        peak = self._status("VmHWM")
        return None if peak is None or self._before is None else (peak - self._before) / 1024

    def timed(self, call: Callable[[], object]) -> Timed:
        """How long one call takes."""
        one = torch.get_num_threads() == 1
        return turns.timed(call, time.process_time if one else time.perf_counter)

    @staticmethod
    def _status(name: str) -> int | None:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(name):
                    return int(line.split()[1])
        return None


class CardGauge:
    """Time by CUDA's events, memory by PyTorch's allocator."""

    def reset(self) -> None:
        """Forget the peak so far, so that growth counts from what is held now."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def growth_mib(self) -> float:
        """The peak since the reset minus what was held then."""
        return (torch.cuda.max_memory_allocated() - self._before) / 2**20

    def timed(self, call: Callable[[], object]) -> Timed:
        """How long one call takes on the GPU, after one that reserves the memory."""
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with Others() as others:
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
        return Timed(start.elapsed_time(end) / 1e3, others.share)


# ------------------------------------------------------------------------ called in the process


@dataclass
class _Bench:
    """What this process holds between calls."""

    way: Way
    step: Step
    problem: Problem
    gauge: HostGauge | CardGauge

    def solve(self) -> Tensor:
        """Forward and backward once; returns the loss."""
        self.problem.clear()
        return self.step(self.problem)


_benches: list[_Bench] = []


def use_checkout(path: Path) -> None:
    """Import spoloss from this checkout and not from where it is installed.

    Raises:
      RuntimeError: it comes from elsewhere.
    """
    sys.path.insert(0, str(path))
    found = Path(str(importlib.import_module("spoloss").__file__))
    if not found.is_relative_to(path.resolve()) and not found.is_relative_to(path):
        raise RuntimeError(f"expected spoloss from {path}, got {found}")


def set_up(cell: Cell, threads: int, states: Path | None = None) -> str:
    """Load the way, build the problem, and do a tiny one, so that every library is loaded.

    Args:
      cell: what is measured.
      threads: how many the CPU's operations use.
      states: a file of `write_states`, whose shape the cell states; None for random numbers.

    Returns:
      What the way's row in the table should say.

    Raises:
      UnavailableError: the way cannot run here.
      ModuleNotFoundError: its package is not installed.
    """
    torch.set_num_threads(threads)
    way = WAYS[cell.way]
    step = way.load()
    problem = _problem_of(cell, states)
    problem.weight.requires_grad_(not cell.frozen)
    if not way.takes_reference:
        problem = problem.without_reference()
    gauge = CardGauge() if cell.device == "cuda" else HostGauge()
    _benches[:] = [_Bench(way, step, problem, gauge)]
    step(problem.tiny())
    problem.clear()
    return _choose_height(_benches[0]) if cell.way == FLOOR else way.note


def timed() -> Timed:
    """Forward and backward once."""
    (bench,) = _benches
    bench.problem.clear()
    time.sleep(SETTLE_SECONDS)
    took = bench.gauge.timed(bench.solve)
    _release()
    return took


def growth_mib() -> float | None:
    """How much memory forward and backward add at most, gradients included. Call this first."""
    (bench,) = _benches
    bench.problem.clear()
    bench.gauge.reset()
    bench.solve()
    growth = bench.gauge.growth_mib()
    _release()
    return growth


def error() -> float:
    """The largest error of loss and gradients against full logits in float64. Slow."""
    (bench,) = _benches
    found = max_error(bench.problem, bench.solve().item(), bench.way.formula)
    _release()
    return found


def _release() -> None:
    """A process that waits for its turn holds no more of a GPU than its problem."""
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use


def _problem_of(cell: Cell, states: Path | None) -> Problem:
    kind = {"dtype": getattr(torch, cell.dtype), "device": cell.device}
    if states is not None:
        return real_problem(states, **kind)
    return random_problem(cell.pairs, cell.tokens, cell.width, cell.vocab, **kind)


def _choose_height(bench: _Bench) -> str:
    """Let the floor use the height of its tiles that is fastest here."""
    count = bench.problem.labels.numel()
    heights = [rows for rows in FLOOR_ROWS if rows is None or rows < count]

    def seconds(rows: int | None) -> float:
        bench.step = floor(rows)
        return bench.gauge.timed(bench.solve).seconds

    seconds(heights[0])  # the first products of a process are slow
    rows = min(heights, key=seconds)
    bench.step = floor(rows)
    return f"tiles of {rows or 'all'} rows"
