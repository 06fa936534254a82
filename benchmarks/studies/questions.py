"""Planned comparisons whose intervals hold at once, and the files that they are recomputed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.studies.arms import Arm
from benchmarks.studies.results import Best, Results, interval

WIN_RATE = "win rate"
"""The measure whose intervals end at 0 and 1."""


class Question(NamedTuple):
    """A comparison of a part, before its intervals are known: they depend on how many there are.

    Attributes:
      text: what is compared.
      measures: what was found, by measure.
      says: the verdict, from the interval of each measure.
      further: further columns.
    """

    text: str
    measures: dict[str, pd.Series]
    says: Callable[..., str]
    further: dict[str, Any]


def decide(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """A row for every measure of a part's comparisons, with intervals that all hold at once.

    A comparison with a nan is "broken".
    """
    number = sum(len(question.measures) for question in questions)
    rows = []
    for text, measures, says, further in questions:
        ends = {measure: interval(values, number) for measure, values in measures.items()}
        broken = any(math.isnan(low) for low, _ in ends.values())
        judged = "broken" if broken else says(*ends.values())
        for measure, values in measures.items():
            low, high = ends[measure]
            if measure == WIN_RATE:
                low, high = max(low, 0.0), min(high, 1.0)
            row = {"question": text, "measure": measure, "estimate": values.mean(skipna=False)}
            row |= {"standard_error": values.sem(skipna=False), "low": low, "high": high}
            rows.append({**row, **further, "verdict": judged})
    return rows


def ends(grid: Sequence[Arm], *chosen: Best) -> list[str]:
    """The ends of a grid, "lowest" or "highest" beta, that are chosen for some seed."""
    titles = [title for best in chosen for title in best.titles]
    # The title of a policy on the way is that of its arm with the step behind it.
    return [
        end
        for end, arm in (("lowest", grid[0]), ("highest", grid[-1]))
        if any(title.startswith(arm.title) for title in titles)
    ]


def completion_rows(results: Results, *measures: str) -> list[dict[str, Any]]:
    """Measures of every completion that judged a policy; `step` is empty after the last."""
    return [
        {"policy": policy, "seed": seed, "step": judged.get("step"), "opening": i}
        | {key: " ".join(f"{value:.4g}" for value in judged[key][i]) for key in measures}
        for policy, found in results.policies().items()
        for seed, each in zip(results.part.seeds, found, strict=True)
        for judged in (*each.get("judgements", ()), each)
        for i in range(len(judged["rewards"]))
    ]
