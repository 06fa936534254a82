"""A part of a run, read back from the store: its policies, their win rates, means and intervals."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from benchmarks.studies.arms import LABELS, Arm
from benchmarks.studies.evaluation import win_rate
from benchmarks.studies.experiment import Foundation, Part, foundation_name
from benchmarks.studies.store import Store

LEVEL = 0.95

Interval = tuple[float, float]
"""The low end and the high end."""
Row = dict[str, Any]
Policy = Arm | None
"""An arm, or None for the reference that all arms start from."""


@dataclass(frozen=True)
class Estimate:
    """A figure, once for every seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """The standard error of the mean; nan with one seed, or where a value is nan."""
        if len(self.values) == 1 or math.isnan(self.mean):
            return math.nan
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    def interval(self, comparisons: int) -> Interval:
        """Student's interval, so wide that all of so many comparisons hold at once with 95 %."""
        tail = (1.0 - LEVEL) / (2 * comparisons)
        half = float(student.ppf(1.0 - tail, len(self.values) - 1)) * self.error
        return self.mean - half, self.mean + half


class Comparison(NamedTuple):
    """An SPO arm against a DPO arm, and the win rate of the first over the second."""

    ours: Arm
    theirs: Arm
    wins: Estimate


def win_interval(wins: Estimate, comparisons: int) -> Interval:
    """The interval of a win rate, which cannot leave [0, 1]."""
    low, high = wins.interval(comparisons)
    return max(low, 0.0), min(high, 1.0)


def verdict(interval: Interval, even: float = 0.5, better: str = "better") -> str:
    """What the interval of a win rate, or of a difference whose `even` is 0, says."""
    low, high = interval
    return better if low > even else "worse" if high < even else "not distinguishable"


class Results:
    """What a part of a protocol has left in its store."""

    def __init__(self, foundation: Foundation, part: Part, store: Store) -> None:
        self.foundation, self.part = foundation, part
        seeds = part.all_seeds
        self.references = [store.read(foundation_name(seed)) for seed in seeds]
        self.arms = {
            arm: [store.read(part.result_name(arm, seed)) for seed in seeds] for arm in part.arms
        }
        self._wins: dict[tuple[Policy, Policy], Estimate] = {}

    @property
    def labels(self) -> list[str]:
        """The kinds of labels that have arms."""
        return [labels for labels in LABELS if any(arm.labels == labels for arm in self.arms)]

    def name(self, policy: Policy) -> str:
        """How a table names a policy: an arm as the command line does."""
        return self.foundation.reference_name if policy is None else str(policy)

    def sorted_arms(self, form: str, labels: str) -> list[Arm]:
        """The arms of a form on one kind of labels, by beta."""
        found = [arm for arm in self.arms if (arm.form, arm.labels) == (form, labels)]
        return sorted(found, key=lambda arm: arm.beta)

    def of(self, policy: Policy) -> list[dict[str, Any]]:
        """What was found of a policy, seed by seed."""
        return self.references if policy is None else self.arms[policy]

    def estimate(self, policy: Policy, key: str) -> Estimate:
        """A figure that every seed's result holds under a key."""
        return Estimate(tuple(float(found[key]) for found in self.of(policy)))

    def wins(self, ours: Policy, theirs: Policy) -> Estimate:
        """Win rate of a policy over another, in [0, 1]."""
        if (ours, theirs) not in self._wins:
            pairs = zip(self.of(ours), self.of(theirs), strict=True)
            rates = tuple(rewards_win_rate(a, b) for a, b in pairs)
            self._wins[ours, theirs] = Estimate(rates)
        return self._wins[ours, theirs]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every SPO of equation 6 against the DPO of its own beta and that of four times it."""
        return [
            Comparison(ours, theirs, self.wins(ours, theirs))
            for ours in self.arms
            if ours.form == "spo"
            for factor in (1, 4)
            for theirs in self.arms
            if theirs == replace(ours, form="dpo", beta=float(f"{factor * ours.beta:.12g}"))
        ]


def rewards_win_rate(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Win rate between two policies of which all rewards are kept."""
    return win_rate(np.array(ours["rewards"]), np.array(theirs["rewards"]))
