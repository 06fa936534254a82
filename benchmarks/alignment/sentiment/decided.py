"""The comparisons that were written down before the runs, each loss at its own best setting.

For each seed, the other seeds choose the best setting. So a setting that was lucky in a seed, in
its training or in the answers that were drawn, has no advantage there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.alignment.evaluation import win_rate
from benchmarks.alignment.report import Row
from benchmarks.alignment.results import Estimate, Results, verdict, win_interval


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
            reason = "one seed" if len(self.ours.chosen) == 1 else "a policy has broken down"
            return f"{text}; {reason}: no verdict."
        return (
            f"{text}; 95 % interval for all {comparisons} comparisons: {100 * row['low']:.1f} to "
            f"{100 * row['high']:.1f} %: {row['verdict']}."
        )


def gains(results: Results) -> list[Row]:
    """How much more reward than the reference each loss gets on clean labels, at its best."""
    reference = results.estimate(None, "reward").values
    rows: list[Row] = []
    for form in dict.fromkeys(arm.form for arm in results.arms):
        best = best_of_forms(results, [form], "clean")
        if best is not None:
            both = zip(best.reward.values, reference, strict=True)
            gain = Estimate(tuple(ours - theirs for ours, theirs in both))
            rows.append(
                {"form": form, "best": best.title, "gain": gain.mean, "standard_error": gain.error}
            )
    return rows


def decided_comparisons(results: Results) -> list[Decided]:
    """The comparisons that were planned for a part; the quick run has none."""
    return list(DECIDED[results.part.name](results)) if results.part.name in DECIDED else []


def best_of_forms(results: Results, forms: Iterable[str], labels: str) -> Best | None:
    """The best arm of some forms after its last step."""
    return choose(
        Candidate(arm.title, rewards_of(results.of(arm)))
        for arm in results.arms
        if arm.form in forms and arm.labels == labels
    )


def choose(candidates: Iterable[Candidate]) -> Best | None:
    """The best of the candidates; None where there is none."""
    found = list(candidates)
    if not found:
        return None
    seeds = range(len(found[0].rewards))
    return Best(tuple(best_without(found, seed, seeds) for seed in seeds))


def best_without(candidates: Sequence[Candidate], seed: int, seeds: Sequence[int]) -> Candidate:
    """The candidate of the greatest merit in all seeds but one, or in the only one."""
    others = [other for other in seeds if other != seed] or list(seeds)
    return max(candidates, key=lambda candidate: candidate.merit(others))


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
        groups = (
            ("SPO, with or without linear_below=0,", ["spo", "spo-below0"]),
            ("squared", ["squared"]),
        )
        for name, forms in groups:
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
