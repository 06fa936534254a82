"""Planned comparisons whose intervals hold at once, and the files that they are recomputed from.

Every estimate has a value for each seed, and its interval is Student's over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.studies.arms import Arm
from benchmarks.studies.results import Best, Estimate, Results, Row, name_of


class Question(NamedTuple):
    """A comparison of a part, before its intervals are known: they depend on how many there are.

    Attributes:
      text: what is compared.
      estimates: what was found, by measure.
      says: the verdict, from the interval (low, high) of each measure.
      further: further columns.
    """

    text: str
    estimates: dict[str, Estimate]
    says: Callable[..., str]
    further: Row


def decide(questions: Sequence[Question]) -> list[Row]:
    """A row for every measure of a part's comparisons, with intervals that all hold at once.

    A comparison with a nan is "broken".
    """
    number = sum(len(question.estimates) for question in questions)
    rows: list[Row] = []
    for question in questions:
        found = question.estimates
        intervals = {measure: each.interval(number) for measure, each in found.items()}
        broken = any(math.isnan(low) for low, _ in intervals.values())
        judged = "broken" if broken else question.says(*intervals.values())
        for measure, (low, high) in intervals.items():
            row: Row = {"question": question.text, "measure": measure}
            row |= {"estimate": found[measure].mean, "standard_error": found[measure].error}
            rows.append({**row, "low": low, "high": high, **question.further, "verdict": judged})
    return rows


def ends(grid: Sequence[Arm], *chosen: Best) -> list[str]:
    """The ends of a grid, "lowest" or "highest" beta, that are chosen for some seed."""
    titles = [each.title for best in chosen for each in best.chosen]
    # The title of a policy on the way is that of its arm with the step behind it.
    return [
        end
        for end, arm in (("lowest", grid[0]), ("highest", grid[-1]))
        if any(title.startswith(arm.title) for title in titles)
    ]


def completion_rows(results: Results, *measures: str) -> list[Row]:
    """Measures of every completion that judged a policy; `step` is empty after the last."""
    return [
        {"policy": name_of(policy), "seed": seed, "step": judged.get("step"), "opening": i}
        | {key: " ".join(f"{value:.4g}" for value in judged[key][i]) for key in measures}
        for policy in (None, *results.arms)
        for seed, found in zip(results.part.seeds, results.of(policy), strict=True)
        for judged in (*found.get("judgements", ()), found)
        for i in range(len(judged["rewards"]))
    ]
