"""One way on one problem in this process, which `Apart` keeps between the calls."""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.fused_problem import Problem, max_error, random_problem, real_problem
from benchmarks.fused_ways import FLOOR, FLOOR_ROWS, WAYS, Step, Way, floor
from benchmarks.gauges import CardGauge, HostGauge, Timed, gauge_of
from benchmarks.real_head import RealHead

SETTLE_SECONDS = 0.05
"""The other process's threads spin for a moment after its turn, so a turn starts later."""


@dataclass(frozen=True)
class Cell:
    """What is measured: a way, on a shape, with a trained or a frozen head.

    `real_head` is a file of `benchmarks.real_head`, whose shape the others state; "" for random
    numbers.
    """

    way: str
    pairs: int
    tokens: int
    width: int
    vocab: int
    dtype: str
    device: str
    frozen: bool
    ignored: float = 0.0
    real_head: str = ""


@dataclass
class _Bench:
    """What this process holds between calls."""

    way: Way
    step: Step
    problem: Problem
    gauge: HostGauge | CardGauge


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


def set_up(cell: Cell, threads: int) -> str:
    """Load the way, build the problem, and do a tiny one, so that every library is loaded.

    Args:
      cell: what is measured.
      threads: how many the CPU's operations use.

    Returns:
      What the way's row in the table should say.

    Raises:
      UnavailableError: the way cannot run here.
      ModuleNotFoundError: its package is not installed.
    """
    torch.set_num_threads(threads)
    way = WAYS[cell.way]
    step = way.load()
    problem = _problem_of(cell)
    if not way.takes_reference:
        problem = problem.without_reference()
    _benches[:] = [_Bench(way, step, problem, gauge_of(cell.device))]
    step(problem.tiny())
    problem.clear()
    if cell.way == FLOOR:
        return _choose_height(_benches[0])
    return way.note


def timed() -> Timed:
    """Forward and backward once."""
    (bench,) = _benches
    bench.problem.clear()
    time.sleep(SETTLE_SECONDS)
    return bench.gauge.timed(lambda: bench.step(bench.problem))


def growth_mib() -> float | None:
    """How much memory forward and backward add at most, gradients included. Call this first."""
    (bench,) = _benches
    bench.problem.clear()
    bench.gauge.reset()
    bench.step(bench.problem)
    return bench.gauge.growth_mib()


def error() -> float:
    """The largest error of loss and gradients against full logits in float64. Slow."""
    (bench,) = _benches
    bench.problem.clear()
    loss = bench.step(bench.problem).item()
    return max_error(bench.problem, loss, bench.way.formula)


def _problem_of(cell: Cell) -> Problem:
    dtype = getattr(torch, cell.dtype)
    if cell.real_head:
        head = RealHead.load(Path(cell.real_head))
        return real_problem(head, dtype=dtype, device=cell.device, frozen=cell.frozen)
    return random_problem(
        cell.pairs,
        cell.tokens,
        cell.width,
        cell.vocab,
        dtype=dtype,
        device=cell.device,
        frozen=cell.frozen,
        ignored=cell.ignored,
    )


def _choose_height(bench: _Bench) -> str:
    """Let the floor use the height of its tiles that is fastest here."""
    count = bench.problem.labels.numel()
    heights = [rows for rows in FLOOR_ROWS if rows is None or rows < count]

    def seconds(rows: int | None) -> float:
        step = floor(rows)
        return min(bench.gauge.timed(lambda: step(bench.problem)).seconds for _ in range(3))

    seconds(heights[0])  # the first products of a process are slow
    rows = min(heights, key=seconds)
    bench.step = floor(rows)
    return f"tiles of {rows or 'all'} rows"
