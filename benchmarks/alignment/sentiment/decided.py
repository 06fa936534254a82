"""The comparisons that were decided before any run, each loss at its own best setting.

What is best is chosen by the rewards of one half of the answers and compared on the other half: an
arm that was lucky on the answers by which it was chosen has no luck left on those that count. Each
half does both in turn, so that every answer counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.alignment.evaluation import win_rate
from benchmarks.alignment.report import Row
from benchmarks.alignment.results import Estimate, Results, verdict, win_interval

HALVES = (slice(0, None, 2), slice(1, None, 2))
"""The answers to every prompt with an even and those with an odd number."""


@dataclass(frozen=True)
class Candidate:
    """A policy that can be chosen.

    Attributes:
      title: how it is named.
      rewards: of its answers, [P, n] for every seed.
    """

    title: str
    rewards: tuple[np.ndarray, ...]

    def merit(self, half: slice) -> float:
        """The mean reward of one half of the answers; a broken policy's is the lowest."""
        mean = float(np.mean([rewards[:, half].mean() for rewards in self.rewards]))
        return -math.inf if math.isnan(mean) else mean


@dataclass(frozen=True)
class Best:
    """The best of a group, chosen by one half of the answers for the comparison on the other.

    Attributes:
      chosen: by the first half, and by the second.
    """

    chosen: tuple[Candidate, Candidate]

    @property
    def title(self) -> str:
        """The policy's name; both names where the halves disagree."""
        return " or ".join(dict.fromkeys(candidate.title for candidate in self.chosen))

    @property
    def counted(self) -> tuple[tuple[np.ndarray, ...], ...]:
        """The rewards that count: for each half, those of the policy that the other one chose."""
        by_first, by_second = self.chosen
        return (
            tuple(rewards[:, HALVES[0]] for rewards in by_second.rewards),
            tuple(rewards[:, HALVES[1]] for rewards in by_first.rewards),
        )

    @property
    def reward(self) -> Estimate:
        """The mean reward."""
        seeds = zip(*self.counted, strict=True)
        return Estimate(tuple(float(np.mean([half.mean() for half in seed])) for seed in seeds))

    def wins_over(self, other: Best) -> Estimate:
        """Win rate, in [0, 1]."""
        halves = [
            [win_rate(a, b) for a, b in zip(ours, theirs, strict=True)]
            for ours, theirs in zip(self.counted, other.counted, strict=True)
        ]
        return Estimate(tuple(float(np.mean(seed)) for seed in zip(*halves, strict=True)))


@dataclass(frozen=True)
class Decided:
    """A comparison of two groups, each by its best.

    Attributes:
      question: what is compared.
      ours: the best of the first group; None where no arm of it is finished.
      theirs: the best of the second, None as well.
    """

    question: str
    ours: Best | None
    theirs: Best | None

    @property
    def is_run(self) -> bool:
        """Whether both groups have a policy."""
        return self.ours is not None and self.theirs is not None

    def row(self, comparisons: int) -> Row:
        """What was found, with the verdict of an interval that holds for so many at once."""
        assert self.ours is not None
        assert self.theirs is not None
        wins = self.ours.wins_over(self.theirs)
        row: Row = {"question": self.question, "ours": self.ours.title, "theirs": self.theirs.title}
        for name, best in (("our", self.ours), ("their", self.theirs)):
            row |= {f"{name}_reward": best.reward.mean, f"{name}_reward_error": best.reward.error}
        row |= {"win_rate": wins.mean, "standard_error": wins.error}
        if not math.isnan(wins.error):
            low, high = win_interval(wins, comparisons)
            row |= {"low": low, "high": high, "verdict": verdict(wins, comparisons)}
        return row

    def sentence(self, comparisons: int) -> str:
        """The row in words."""
        if self.ours is None or self.theirs is None:
            return f"{self.question}: not run yet."
        row = self.row(comparisons)
        text = (
            f"{self.question}: {self.ours.title} (reward {self.ours.reward.text(3)}) wins "
            f"{self.ours.wins_over(self.theirs).text(1, 100.0)} % over {self.theirs.title} "
            f"({self.theirs.reward.text(3)})"
        )
        if "verdict" not in row:
            return f"{text}; one seed, no verdict."
        return (
            f"{text}; {100 * row['low']:.1f} to {100 * row['high']:.1f} with all {comparisons}: "
            f"{row['verdict']}."
        )


def decided_comparisons(results: Results) -> list[Decided]:
    """Those of a part of the study; the quick run has none."""
    return list(DECIDED[results.part.name](results)) if results.part.name in DECIDED else []


def best_of_forms(results: Results, forms: Iterable[str], labels: str) -> Best | None:
    """The best arm of some forms after its last step."""
    return choose(
        candidate
        for arm in results.arms
        if arm.form in forms and arm.labels == labels
        for candidate in [Candidate(arm.title, rewards_of(results.of(arm)))]
    )


def choose(candidates: Iterable[Candidate]) -> Best | None:
    """The one of the greatest merit, by each half of the answers; None where there is none."""
    found = list(candidates)
    if not found:
        return None
    first, second = HALVES
    return Best((best_by(found, first), best_by(found, second)))


def best_by(candidates: Sequence[Candidate], half: slice) -> Candidate:
    """The one of the greatest merit by one half of the answers."""
    return max(candidates, key=lambda each: each.merit(half))


def rewards_of(found: Sequence[dict[str, object]]) -> tuple[np.ndarray, ...]:
    """The rewards of every seed."""
    return tuple(np.array(each["rewards"], dtype=float) for each in found)


def decided_of_sweep(results: Results) -> Iterator[Decided]:
    """(a), beside SPO(beta) against DPO(beta) and DPO(4 beta), which every report has."""
    dpo = best_of_forms(results, ["dpo"], "clean")
    for name, forms in (
        ("SPO", ["spo"]),
        ("SPO with linear_below=0", ["spo-below0"]),
        ("squared", ["squared"]),
    ):
        question = f"(a) {name} against DPO, each at its best beta"
        yield Decided(question, best_of_forms(results, forms, "clean"), dpo)


def decided_of_overtraining(results: Results) -> Iterator[Decided]:
    """(b): SPO at its last step, against DPO at its last and at its best."""
    spo = best_of_forms(results, ["spo"], "clean")
    last = best_of_forms(results, ["dpo"], "clean")
    yield Decided("(b) over-trained SPO against over-trained DPO, each at its best beta", spo, last)
    stopped = choose(
        Candidate(
            f"{arm.title} after {results.of(arm)[0]['judgements'][i]['step']} steps",
            rewards_of([found["judgements"][i] for found in results.of(arm)]),
        )
        for arm in results.arms
        if arm.form == "dpo"
        for i in range(min(len(found["judgements"]) for found in results.of(arm)))
    )
    yield Decided("(b) over-trained SPO against DPO stopped at its best step", spo, stopped)


def decided_of_flips(results: Results) -> Iterator[Decided]:
    """(c): with 20 and 40 % of the labels exchanged."""
    for labels in results.labels:
        dpo = best_of_forms(results, ["dpo"], labels)
        for name, forms in (("SPO", ["spo", "spo-below0"]), ("squared", ["squared"])):
            question = f"(c) {labels}: {name} against DPO, each at its best beta"
            yield Decided(question, best_of_forms(results, forms, labels), dpo)


def decided_of_gaps(results: Results) -> Iterator[Decided]:
    """(d): losses that know the gap against those that do not."""
    dpo, spo, squared = (
        best_of_forms(results, [form], "clean") for form in ("dpo", "spo", "squared")
    )
    known_spo = best_of_forms(results, ["spo-gap", "spo-gap-weighted-below0"], "clean")
    known_squared = best_of_forms(results, ["squared-gap"], "clean")
    yield Decided("(d) SPO with known gaps against DPO", known_spo, dpo)
    yield Decided("(d) SPO with known gaps against SPO without", known_spo, spo)
    yield Decided("(d) squared with known gaps against DPO", known_squared, dpo)
    yield Decided("(d) squared with known gaps against squared without", known_squared, squared)


DECIDED = {
    "sweep": decided_of_sweep,
    "overtraining": decided_of_overtraining,
    "flips": decided_of_flips,
    "gaps": decided_of_gaps,
}
