"""A part of a run, read back from the store: its policies, intervals, the best of a group.

A measure has a value for every seed. What is computed of them is nan if one of them is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from benchmarks.studies.arms import Arm
from benchmarks.studies.experiment import Part
from benchmarks.studies.foundation import foundation_name
from benchmarks.studies.store import Store

LEVEL = 0.95

Interval = tuple[float, float]
"""The low end and the high end."""
Tables = dict[str, list[dict[str, Any]]]
"""The rows of CSV files, by name."""
Rewards = Sequence[np.ndarray]
"""Of a policy's answers, [P, n] for every seed."""


class Results:
    """What a part of an experiment has left in its store.

    Attributes:
      part: the part.
      references: what was found of the reference, seed by seed.
      arms: the same of every arm.
    """

    def __init__(self, part: Part, store: Store) -> None:
        self.part = part
        self.references = [store.read(foundation_name(seed)) for seed in part.seeds]
        self.arms = {
            arm: [store.read(part.result_name(arm, seed)) for seed in part.seeds]
            for arm in part.arms
        }

    def policies(self) -> dict[str, list[dict[str, Any]]]:
        """What was found of every policy, by the name that tables give it."""
        return {"reference": self.references, **{str(arm): each for arm, each in self.arms.items()}}

    def sorted_arms(self, form: str) -> list[Arm]:
        """The arms of a form, by beta."""
        return sorted((arm for arm in self.arms if arm.form == form), key=lambda arm: arm.beta)

    def values(self, arm: Arm, key: str) -> pd.Series:
        """A measure of an arm."""
        return pd.Series([float(found[key]) for found in self.arms[arm]])

    def rewards(self, arm: Arm) -> Rewards:
        """The rewards of an arm."""
        return [np.array(found["rewards"], dtype=float) for found in self.arms[arm]]


def interval(values: pd.Series, comparisons: int) -> Interval:
    """Student's interval, so wide that all of so many comparisons hold at once with 95 %."""
    tail = (1.0 - LEVEL) / (2 * comparisons)
    half = float(student.ppf(1.0 - tail, len(values) - 1)) * values.sem(skipna=False)
    return values.mean(skipna=False) - half, values.mean(skipna=False) + half


def verdict(interval: Interval, even: float = 0.5, better: str = "better") -> str:
    """What the interval of a win rate, or of a difference whose `even` is 0, says."""
    low, high = interval
    return better if low > even else "worse" if high < even else "not distinguishable"


@dataclass(frozen=True)
class Best:
    """The best of a group of policies, which each seed's other seeds choose.

    Attributes:
      titles: the policy that is chosen for each seed.
      rewards: those that it has in that seed.
    """

    titles: Sequence[str]
    rewards: Rewards

    @property
    def title(self) -> str:
        """The name of the policy; all names where the seeds disagree."""
        return " or ".join(dict.fromkeys(self.titles))


def choose(candidates: Mapping[str, Rewards]) -> Best:
    """The best of some policies: for each seed, that of the greatest mean reward in the others.

    A policy that is broken in one of them is the last choice.

    Args:
      candidates: their rewards, by title.
    """
    means = {title: [each.mean() for each in rewards] for title, rewards in candidates.items()}
    merits = pd.DataFrame(means).fillna(-math.inf)
    titles = [merits.drop(index=seed).mean().idxmax() for seed in merits.index]
    return Best(titles, [candidates[title][seed] for seed, title in enumerate(titles)])


def best_of(results: Results, form: str) -> Best:
    """A loss at its best beta after the last step."""
    return choose({arm.title: results.rewards(arm) for arm in results.sorted_arms(form)})
