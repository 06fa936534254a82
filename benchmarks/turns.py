"""Ways that take turns with the floor, and what a row says of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.record import Others

FLOOR = "matmul_floor"
HEADS = {"trained": False, "frozen": True}
SHAPES = ("4x256", "16x64", "2x1024", "1x4096")
"""Pairs x tokens per side; the most important come first."""
ROUNDS = 8
"""Each gives two ratios, one to either repetition of the floor beside it."""
CHECK_FLOP = {"cpu": 3e11, "cuda": 1e15}
"""A solution is checked against float64 where that takes at most so many operations."""


class Timed(NamedTuple):
    """What one repetition took.

    Attributes:
      seconds: of the clock that the benchmark chose.
      others: the share of the processor's cores that other processes took meanwhile.
    """

    seconds: float
    others: float


def timed(call: Callable[[], object], now: Callable[[], float] = time.perf_counter) -> Timed:
    """One repetition, by a clock."""
    with Others() as others:
        start = now()
        call()
        seconds = now() - start
    return Timed(seconds, others.share)


Turns = list[tuple[Timed, Timed]]
"""A way's repetitions, each with one of the floor beside it."""


def sizes(shape: str) -> tuple[int, int]:
    """Pairs and tokens of a shape such as 4x256."""
    try:
        pairs, tokens = map(int, shape.split("x"))
    except ValueError:
        raise SystemExit(f"--shapes: expected such as 4x256, got {shape}") from None
    return pairs, tokens


def check_flop(pairs: int, tokens: int, width: int, vocab: int) -> float:
    """Floating-point operations of a check: four products, since the logits are not kept."""
    return 4 * 2.0 * (2 * pairs * tokens) * width * vocab


def together(cells: Iterable[Any]) -> list[tuple[Any, list[Any]]]:
    """Cells of one problem and head in a group each, behind the cell of its floor."""
    groups = groupby(cells, key=lambda cell: replace(cell, way=FLOOR))
    return [(floor, list(group)) for floor, group in groups]


def take_turns(
    floor: Callable[[], Timed], ways: Mapping[str, Callable[[], Timed]], rounds: int
) -> dict[str, Turns]:
    """Repeat the ways in turn, odd rounds backwards, with the floor before and after each.

    A slow drift of the machine cancels in the ratios. The turns of the floor itself are each of its
    repetitions beside the next, with a way between them.
    """
    beside = [floor()]
    found: dict[str, Turns] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            took = ways[name]()
            beside.append(floor())
            found[name] += [(took, beside[-2]), (took, beside[-1])]
    return {FLOOR: list(pairwise(beside)), **found}


def summaries(turns: Mapping[str, Turns]) -> dict[str, dict[str, float]]:
    """Medians and quartiles of each way; `others` is the mean over all turns."""
    others = statistics.fmean(each.others for way in turns.values() for t in way for each in t)

    def summary(way: Turns) -> dict[str, float]:
        ratios = [one.seconds / floor.seconds for one, floor in way]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        return {
            "seconds": statistics.median(one.seconds for one, _ in way),
            "of_floor": middle,
            "of_floor_low": low,
            "of_floor_high": high,
            "ratios": len(ratios),
            "others": others,
        }

    return {name: summary(way) for name, way in turns.items()}


def paced(groups: Sequence[tuple[Any, list[Any]]]) -> Iterator[tuple[Any, list[Any]]]:
    """The groups of `together` one by one; after each, the time that the others need is printed."""

    def work(group: tuple[Any, list[Any]]) -> int:
        floor, cells = group
        return floor.pairs * floor.tokens * (2 if floor.frozen else 3) * len(cells)

    start, total, done = time.monotonic(), sum(map(work, groups)), 0
    for group in groups:
        yield group
        done += work(group)
        left = (time.monotonic() - start) * (total / done - 1.0)
        tqdm.write(f"about {left / 60:.0f} min left")
