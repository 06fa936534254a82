"""A part of a run, read back from the store: its policies, their win rates, means and intervals."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.alignment.arms import LABELS, Arm
from benchmarks.alignment.evaluation import win_rate
from benchmarks.alignment.experiment import Foundation, foundation_name
from benchmarks.alignment.protocol import Part
from benchmarks.alignment.store import Store

LEVEL = 0.95

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

    def interval(self, comparisons: int) -> tuple[float, float]:
        """Student's interval, so wide that all of so many comparisons hold at once with 95 %."""
        tail = (1.0 - LEVEL) / (2 * comparisons)
        half = t_quantile(1.0 - tail, len(self.values) - 1) * self.error
        return self.mean - half, self.mean + half

    def text(self, digits: int, factor: float = 1.0) -> str:
        """The mean ± its standard error, or the one value there is."""
        mean = f"{factor * self.mean:.{digits}f}"
        return mean if math.isnan(self.error) else f"{mean} ± {factor * self.error:.{digits}f}"


@dataclass(frozen=True)
class Comparison:
    """SPO against a DPO.

    Attributes:
      ours: the SPO arm.
      theirs: the DPO arm.
      wins: win rate of ours over theirs.
    """

    ours: Arm
    theirs: Arm
    wins: Estimate


def win_interval(wins: Estimate, comparisons: int) -> tuple[float, float]:
    """The interval of a win rate, which cannot leave [0, 1]."""
    low, high = wins.interval(comparisons)
    return max(low, 0.0), min(high, 1.0)


def verdict(wins: Estimate, comparisons: int) -> str:
    """What the interval of a win rate says when all of so many comparisons are to hold at once."""
    low, high = win_interval(wins, comparisons)
    return "better" if low > 0.5 else "worse" if high < 0.5 else "not distinguishable"


class Results:
    """What a part of a protocol has left in its store."""

    def __init__(self, foundation: Foundation[Any], part: Part, store: Store) -> None:
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

    def policies(self, labels: str) -> list[Policy]:
        """The reference and the arms of one kind of labels."""
        return [None, *(arm for arm in self.arms if arm.labels == labels)]

    def title(self, policy: Policy) -> str:
        """How a table names a policy."""
        return self.foundation.reference_title if policy is None else policy.title

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
            if theirs == Arm("dpo", float(f"{factor * ours.beta:.12g}"), ours.labels)
        ]

    def best(self, form: str, labels: str) -> Arm | None:
        """The arm of a form that has the greatest reward."""
        arms = [arm for arm in self.arms if (arm.form, arm.labels) == (form, labels)]
        return max(arms, key=lambda arm: self.estimate(arm, "reward").mean, default=None)


def rewards_win_rate(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Win rate between two policies of which all rewards are kept."""
    return win_rate(np.array(ours["rewards"]), np.array(theirs["rewards"]))


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile above 1/2 of Student's t distribution.

    With t = sqrt(freedom) * tan(a), its density is proportional to cos(a)^(freedom - 1), which
    is smooth up to pi/2: a sum over a fine grid is all it takes.
    """
    angles = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    share = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    angle = np.interp(2.0 * probability - 1.0, share / share[-1], angles)
    return float(math.sqrt(freedom) * np.tan(angle))
