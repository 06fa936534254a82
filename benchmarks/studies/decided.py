"""The comparisons that were written down before the runs, each loss at its own best setting.

For each seed, the other seeds choose the best setting. So a setting that was lucky in a seed, in
its training or in the answers that were drawn, has no advantage there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.studies.evaluation import win_rate
from benchmarks.studies.results import Estimate, Results, Row, verdict, win_interval


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


def decided_rows(results: Results) -> list[Row]:
    """The comparisons that were planned for a part."""
    questions = list(DECIDED[results.part.name](results))
    return [
        {"question": question, **compared(ours, theirs, len(questions))}
        for question, ours, theirs in questions
    ]


def compared(ours: Best, theirs: Best, comparisons: int) -> Row:
    """What was found, with the verdict of an interval that holds for so many at once."""
    wins = ours.wins_over(theirs)
    row: Row = {"ours": ours.title, "theirs": theirs.title}
    for name, best in (("our", ours), ("their", theirs)):
        row |= {f"{name}_reward": best.reward.mean, f"{name}_reward_error": best.reward.error}
    row |= {"win_rate": wins.mean, "standard_error": wins.error}
    if not math.isnan(wins.error):
        low, high = win_interval(wins, comparisons)
        row |= {"low": low, "high": high, "verdict": verdict((low, high))}
    return row


def gains(results: Results) -> list[Row]:
    """How much more reward than the reference each loss gets on clean labels, at its best."""
    reference = results.estimate(None, "reward").values
    rows: list[Row] = []
    for form in dict.fromkeys(arm.form for arm in results.arms if arm.labels == "clean"):
        best = best_of_forms(results, [form], "clean")
        gain = difference(best.reward.values, reference)
        found = {"best": best.title, "gain": gain.mean, "standard_error": gain.error}
        rows.append({"form": form, **found})
    return rows


def difference(ours: Iterable[float], theirs: Iterable[float]) -> Estimate:
    """The first less the second, seed by seed."""
    return Estimate(tuple(a - b for a, b in zip(ours, theirs, strict=True)))


def best_of_forms(results: Results, forms: Iterable[str], labels: str) -> Best:
    """The best arm of some forms after its last step."""
    return choose(
        Candidate(arm.title, rewards_of(results.of(arm)))
        for arm in results.arms
        if arm.form in forms and arm.labels == labels
    )


def choose(candidates: Iterable[Candidate]) -> Best:
    """The best of the candidates in the other seeds, or in the only one."""
    found = list(candidates)
    seeds = range(len(found[0].rewards))
    others = [[other for other in seeds if other != seed] or [seed] for seed in seeds]
    return Best(tuple(max(found, key=lambda each: each.merit(rest)) for rest in others))


def rewards_of(found: Sequence[dict[str, object]]) -> tuple[np.ndarray, ...]:
    """The rewards of every seed."""
    return tuple(np.array(each["rewards"], dtype=float) for each in found)


Question = tuple[str, Best, Best]
"""What is compared, and the best of both groups."""


def of_clean_labels(results: Results) -> Iterator[Question]:
    """Beside SPO(beta) against DPO(beta) and DPO(4 beta), which every report has.

    A run of a few arms can lack a loss, or DPO.
    """
    names = {"spo": "SPO", "spo-below0": "SPO with linear_below=0", "squared": "squared"}
    present = {arm.form for arm in results.arms if arm.labels == "clean"}
    for form, name in names.items():
        if {form, "dpo"} <= present:
            ours, theirs = (best_of_forms(results, [each], "clean") for each in (form, "dpo"))
            yield f"{name} against DPO, each at its best beta", ours, theirs


def of_sweep(results: Results) -> Iterator[Question]:
    """(a) of the study on SmolLM2."""
    for question, *both in of_clean_labels(results):
        yield f"(a) {question}", *both


def of_overtraining(results: Results) -> Iterator[Question]:
    """(b): SPO at its last step, against DPO at its last and at its best."""
    spo = best_of_forms(results, ["spo"], "clean")
    last = best_of_forms(results, ["dpo"], "clean")
    yield "(b) over-trained SPO against over-trained DPO, each at its best beta", spo, last
    stopped = choose(
        Candidate(
            f"{arm.title} after {results.of(arm)[0]['judgements'][i]['step']} steps",
            rewards_of([found["judgements"][i] for found in results.of(arm)]),
        )
        for arm in results.arms
        if arm.form == "dpo"
        for i in range(min(len(found["judgements"]) for found in results.of(arm)))
    )
    yield "(b) over-trained SPO against DPO stopped at its best step", spo, stopped


def of_flips(results: Results) -> Iterator[Question]:
    """(c): with 20 and 40 % of the labels exchanged."""
    for labels in results.labels:
        dpo = best_of_forms(results, ["dpo"], labels)
        for name, forms in (
            ("SPO, with or without linear_below=0,", ["spo", "spo-below0"]),
            ("squared", ["squared"]),
        ):
            question = f"(c) {labels}: {name} against DPO, each at its best beta"
            yield question, best_of_forms(results, forms, labels), dpo


def of_gaps(results: Results) -> Iterator[Question]:
    """(d): losses that know the gap against those that do not."""
    dpo, spo, squared = (
        best_of_forms(results, [form], "clean") for form in ("dpo", "spo", "squared")
    )
    known_spo = best_of_forms(results, ["spo-gap", "spo-gap-weighted-below0"], "clean")
    known_squared = best_of_forms(results, ["squared-gap"], "clean")
    yield "(d) SPO with known gaps against DPO", known_spo, dpo
    yield "(d) SPO with known gaps against SPO without", known_spo, spo
    yield "(d) squared with known gaps against DPO", known_squared, dpo
    yield "(d) squared with known gaps against squared without", known_squared, squared


DECIDED: dict[str, Callable[[Results], Iterator[Question]]] = {
    "preference": of_clean_labels,
    "sweep": of_sweep,
    "overtraining": of_overtraining,
    "flips": of_flips,
    "gaps": of_gaps,
}
