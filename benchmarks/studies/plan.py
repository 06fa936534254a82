"""Runs a planned part of a study, whose arms may depend on what its first runs find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.studies.experiment import Part, run_parts
from benchmarks.studies.foundation import Foundation
from benchmarks.studies.report import report
from benchmarks.studies.results import Results, Tables
from benchmarks.studies.store import Store, open_store

Read = Callable[[Part], Results | None]
"""Gives the results of a part; None before all of it is finished."""


@dataclass(frozen=True)
class Plan:
    """What is run and reported together.

    Attributes:
      parts: as they are planned; all are reported in a folder with the name of the first.
      tables: further CSV files, from the results of the first.
      settle: the parts to run, from the planned ones and from the results so far. It is asked
        again when these are run, until it names no unfinished one.
    """

    parts: tuple[Part, ...]
    tables: Callable[[Results], Tables]
    settle: Callable[[tuple[Part, ...], Read], tuple[Part, ...]] = lambda parts, _: parts


def run_plan(plan: Plan, foundation: Foundation, store: Store, workers: int) -> None:
    """Runs what is not finished of a plan, then reports it; nothing is reported before.

    The settings of the folder name what was settled beside what was planned.

    Args:
      plan: the plan.
      foundation: what its arms start from.
      store: where results go.
      workers: processes at work.
    """

    def read(part: Part) -> Results | None:
        names = (part.result_name(arm, seed) for arm in part.arms for seed in part.seeds)
        return Results(part, store) if all(map(store.has, names)) else None

    parts = plan.settle(plan.parts, read)
    while not all(map(read, parts)):
        run_parts(parts, foundation, store, workers)
        parts = plan.settle(plan.parts, read)
    settled = [part for part in parts if part not in plan.parts]
    open_store(store.folder, {f"{part.name}, settled": part.settings() for part in settled})
    results = [Results(part, store) for part in parts]
    folder = store.folder / parts[0].name
    report(results, folder, foundation.settings()["model"], plan.tables(results[0]))
