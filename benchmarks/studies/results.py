"""A part of a run, read back from the store: its policies, intervals, the best of a group."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.studies.arms import Arm
from benchmarks.studies.evaluation import win_rate
from benchmarks.studies.experiment import Part
from benchmarks.studies.foundation import foundation_name
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


def verdict(interval: Interval, even: float = 0.5, better: str = "better") -> str:
    """What the interval of a win rate, or of a difference whose `even` is 0, says."""
    low, high = interval
    return better if low > even else "worse" if high < even else "not distinguishable"


class Results:
    """What a part of an experiment has left in its store."""

    def __init__(self, part: Part, store: Store) -> None:
        self.part = part
        self.references = [store.read(foundation_name(seed)) for seed in part.seeds]
        self.arms = {
            arm: [store.read(part.result_name(arm, seed)) for seed in part.seeds]
            for arm in part.arms
        }

    def sorted_arms(self, form: str) -> list[Arm]:
        """The arms of a form, by beta."""
        return sorted((arm for arm in self.arms if arm.form == form), key=lambda arm: arm.beta)

    def of(self, policy: Policy) -> list[dict[str, Any]]:
        """What was found of a policy, seed by seed."""
        return self.references if policy is None else self.arms[policy]

    def estimate(self, policy: Policy, key: str) -> Estimate:
        """A figure that every seed's result holds under a key."""
        return Estimate(tuple(float(found[key]) for found in self.of(policy)))


def name_of(policy: Policy) -> str:
    """How a table names a policy."""
    return "reference" if policy is None else str(policy)


def rewards_of(found: Sequence[dict[str, Any]]) -> tuple[np.ndarray, ...]:
    """The rewards of every seed, [P, n] each."""
    return tuple(np.array(each["rewards"], dtype=float) for each in found)


def difference(ours: Iterable[float], theirs: Iterable[float]) -> Estimate:
    """The first less the second, seed by seed."""
    return Estimate(tuple(a - b for a, b in zip(ours, theirs, strict=True)))


# ----------------------------------------------------------------------------- the best of a group


@dataclass(frozen=True)
class Candidate:
    """A policy that can be chosen.

    Attributes:
      title: how it is named.
      rewards: of its answers, [P, n] for every seed.
    """

    title: str
    rewards: tuple[np.ndarray, ...]

    def merit(self, seeds: Iterable[int]) -> float:
        """The mean reward in some seeds; -inf if the policy is broken in one of them."""
        mean = float(np.mean([self.rewards[seed].mean() for seed in seeds]))
        return -math.inf if math.isnan(mean) else mean


@dataclass(frozen=True)
class Best:
    """The best of a group of policies.

    Attributes:
      chosen: for each seed, the candidate of the greatest mean reward in the other seeds.
    """

    chosen: tuple[Candidate, ...]

    @property
    def title(self) -> str:
        """The name of the policy; all names where the seeds disagree."""
        return " or ".join(dict.fromkeys(candidate.title for candidate in self.chosen))

    @property
    def rewards(self) -> tuple[np.ndarray, ...]:
        """The rewards in each seed of the candidate that was chosen for it."""
        return tuple(candidate.rewards[seed] for seed, candidate in enumerate(self.chosen))

    @property
    def reward(self) -> Estimate:
        """The mean reward."""
        return Estimate(tuple(float(rewards.mean()) for rewards in self.rewards))

    def wins_over(self, other: Best) -> Estimate:
        """Win rate, in [0, 1]."""
        both = zip(self.rewards, other.rewards, strict=True)
        return Estimate(tuple(win_rate(ours, theirs) for ours, theirs in both))


def choose(candidates: Iterable[Candidate]) -> Best:
    """The best of the candidates in the other seeds, or in the only one."""
    found = list(candidates)
    seeds = range(len(found[0].rewards))
    others = [[other for other in seeds if other != seed] or [seed] for seed in seeds]
    return Best(tuple(max(found, key=lambda each: each.merit(rest)) for rest in others))


def best_of(results: Results, form: str) -> Best:
    """A loss at its best beta after the last step: the other seeds choose it."""
    arms = results.sorted_arms(form)
    return choose(Candidate(arm.title, rewards_of(results.of(arm))) for arm in arms)
