"""From the measurements of `bench_fused` to the rows of its table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from benchmarks.fused_ways import FLOOR, FULL
from benchmarks.fused_worker import Cell
from benchmarks.gauges import Timed


@dataclass(frozen=True)
class Turn:
    """One repetition of a way, and the floor's repetition beside it."""

    way: Timed
    floor: Timed


@dataclass(frozen=True)
class Found:
    """What was measured of one cell.

    Attributes:
      turns: of each round.
      memory_mib: growth of peak memory in each fresh process.
      error: against float64; None where that was not computed.
      note: what the row in the table should say.
      missing: why nothing was found, if so.
    """

    turns: list[Turn] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    error: float | None = None
    note: str = ""
    missing: str = ""

    def of_floor(self, quantile: float = 0.5) -> float | None:
        """A quantile over the rounds of the time over that of the floor beside it."""
        if not self.turns:
            return None
        return float(
            np.quantile([turn.way.seconds / turn.floor.seconds for turn in self.turns], quantile)
        )


@dataclass(frozen=True)
class Row:
    """One line of the table; None where there is nothing to say.

    Attributes:
      cell: what the row is about.
      seconds: the median over the rounds.
      of_floor: the median of the time over that of the floor with the same labels.
      of_floor_low: its lower quartile.
      of_floor_high: its upper quartile.
      of_full_logits: `of_floor` over that of full logits.
      of_nothing_ignored: time over that of the same way without ignored labels.
      memory_mib: the median growth of peak memory over the processes.
      memory_of_full_logits: the same over that of full logits.
      max_error: against float64.
      rounds: how many.
      others: the median share of the cores that other processes took.
      note: what else to know.
    """

    cell: Cell
    seconds: float | None
    of_floor: float | None
    of_floor_low: float | None
    of_floor_high: float | None
    of_full_logits: float | None
    of_nothing_ignored: float | None
    memory_mib: float | None
    memory_of_full_logits: float | None
    max_error: float | None
    rounds: int
    others: float | None
    note: str

    def as_dict(self) -> dict[str, Any]:
        """Column -> value, those of the cell first."""
        cell = {name: getattr(self.cell, name) for name in KEY}
        return cell | {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cell"}


KEY = tuple(f.name for f in fields(Cell) if f.name != "real_head")
"""The columns that tell what a row is about."""


def make_rows(found: dict[Cell, Found], beside: Cell) -> list[Row]:
    """The rows of a group.

    Args:
      found: what was measured of each cell.
      beside: the floor whose repetitions stand beside all others.
    """
    return [_row(cell, found, beside) for cell in found]


def _row(cell: Cell, found: dict[Cell, Found], beside: Cell) -> Row:
    mine, nothing = found[cell], Found()
    full = found.get(replace(cell, way=FULL), nothing)
    unmasked = found.get(replace(cell, ignored=0.0), nothing) if cell.ignored else nothing
    # The floor beside has work for each label of its own problem, not of a problem that ignores
    # more: there the two floors were measured against each other.
    floor = 1.0
    if cell.ignored != beside.ignored:
        floor = found.get(replace(cell, way=FLOOR), nothing).of_floor()
    return Row(
        cell,
        seconds=_median([turn.way.seconds for turn in mine.turns]),
        of_floor=_ratio(mine.of_floor(), floor),
        of_floor_low=_ratio(mine.of_floor(0.25), floor),
        of_floor_high=_ratio(mine.of_floor(0.75), floor),
        of_full_logits=_ratio(mine.of_floor(), full.of_floor()),
        of_nothing_ignored=_ratio(mine.of_floor(), unmasked.of_floor()),
        memory_mib=_median(mine.memory_mib),
        memory_of_full_logits=_ratio(_median(mine.memory_mib), _median(full.memory_mib)),
        max_error=mine.error,
        rounds=len(mine.turns),
        others=_median([turn.way.others for turn in mine.turns]),
        note="; ".join(text for text in (mine.note, mine.missing) if text),
    )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(ours: float | None, other: float | None) -> float | None:
    return None if ours is None or other is None else ours / other


PRINTED = {
    "seconds": ("seconds", "{:.3f}"),
    "of_floor": ("x floor", "{:.3f}"),
    "of_floor_low": ("low", "{:.3f}"),
    "of_floor_high": ("high", "{:.3f}"),
    "of_full_logits": ("x full logits", "{:.2f}"),
    "of_nothing_ignored": ("x none ignored", "{:.2f}"),
    "memory_mib": ("MiB", "{:.0f}"),
    "memory_of_full_logits": ("MiB x full logits", "{:.3f}"),
    "max_error": ("max error", "{:.0e}"),
    "others": ("others", "{:.0%}"),
}
"""What is printed: the head of a column and the form of its numbers."""


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows of one group, at once: a run is long and may be watched through a pipe."""
    for title in dict.fromkeys(title_of(row.cell) for row in rows):
        heads = "".join(f"{head:>{_width(head)}}" for head, _ in PRINTED.values())
        print(f"\n{title}\n{'':<24}{heads}  note")
        for row in rows:
            if title_of(row.cell) == title:
                print(f"{row.cell.way:<24}{_numbers(row)}  {row.note}".rstrip(), flush=True)


def title_of(cell: Cell) -> str:
    """The problem and the head of a cell in words."""
    head = "frozen" if cell.frozen else "trained"
    ignored = f", {cell.ignored:.0%} of the labels ignored" if cell.ignored else ""
    size = f"D = {cell.width}, V = {cell.vocab}, {cell.dtype}"
    return f"{cell.pairs} pairs of 2 x {cell.tokens} tokens, {size}, head {head}{ignored}"


def _numbers(row: Row) -> str:
    texts = []
    for name, (head, form) in PRINTED.items():
        value = getattr(row, name)
        texts.append(f"{'-' if value is None else form.format(value):>{_width(head)}}")
    return "".join(texts)


def _width(head: str) -> int:
    return max(len(head), 6) + 2
