"""The comparisons of the second study, as docs/second_study.md declares them.

Every one is an estimate with a value for each seed. Its interval is Student's over the seeds, and
so wide that all comparisons of a part hold at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.studies.arms import CLEAN, parse_arm
from benchmarks.studies.decided import (
    Best,
    Candidate,
    best_of_forms,
    choose,
    difference,
    rewards_of,
)
from benchmarks.studies.evaluation import tie_rate, tilt
from benchmarks.studies.results import Estimate, Results, Row, verdict

COMPARISONS = 3
"""Those of a part that are to hold at once."""
BETA = 0.2
"""Beta of the objective of part 3."""
KL_RANGE = (0.5, 8.0)
"""Where part 2 compares rewards at equal KL, nats."""
STOPPING_WINS = 0.45
"""SPO replaces early stopping if it wins more than this against DPO's best step."""
REWARD_LOSS = -0.03
"""SPO(0.025) may have so much less reward than DPO(0.1), if its KL is smaller."""
NEAR_BEST = 0.05
"""Part 4 counts the arms whose reward is within this of the best."""

Tables = dict[str, list[Row]]
"""The rows of CSV files, by name."""


def row_of(question: str, measure: str, estimate: Estimate, **further: Any) -> Row:
    """A comparison: what was found, and its joint interval."""
    low, high = estimate.interval(COMPARISONS)
    found = {"estimate": estimate.mean, "standard_error": estimate.error, "low": low, "high": high}
    return {"question": question, "measure": measure, **found, **further}


# ------------------------------------------------------------------------------------ parts 1 and 2


def best(results: Results, form: str) -> Best:
    """A loss at its best beta after the last step."""
    return best_of_forms(results, [form], CLEAN)


def edges(results: Results, form: str) -> list[str]:
    """The ends of a loss's grid, "lowest" or "highest" beta, that are the best for some seed."""
    grid, chosen = results.sorted_arms(form, CLEAN), best(results, form).chosen
    ends = {"lowest": grid[0].title, "highest": grid[-1].title}
    return [end for end, title in ends.items() if title in {each.title for each in chosen}]


def wins_row(question: str, ours: Best, theirs: Best, **further: Any) -> Row:
    """A win rate, with both policies and the share of ties."""
    both = zip(ours.rewards, theirs.rewards, strict=True)
    further = {"ties": fmean(tie_rate(*each) for each in both), **further}
    named = {"ours": ours.title, "theirs": theirs.title}
    return row_of(question, "win rate", ours.wins_over(theirs), **named, **further)


def at_equal_kl(results: Results, low: float = 0.0, high: float = math.inf) -> Estimate:
    """Reward of SPO less that of DPO at equal KL, from the arms whose KL is in a range.

    It is the coefficient of "SPO" in the regression reward ~ seed + log KL + (log KL)^2 + SPO. The
    values are the jackknife's pseudo-values over the seeds, so its error is clustered by seed. nan
    without both losses and two seeds in the range.
    """
    found = [
        (seed, math.log(found["kl"]), found["reward"], arm.form == "spo")
        for arm, each in results.arms.items()
        for seed, found in zip(results.part.all_seeds, each, strict=True)
        if low < found["kl"] < high
    ]
    points = pd.DataFrame(found, columns=["seed", "log_kl", "reward", "spo"])

    def coefficient(kept: pd.DataFrame) -> float:
        log_kl = kept["log_kl"]
        columns = (kept["spo"], log_kl, log_kl**2, pd.get_dummies(kept["seed"]))
        fit = np.linalg.lstsq(np.column_stack(columns).astype(float), kept["reward"], rcond=None)
        return float(fit[0][0])

    seeds = points["seed"].unique()
    if len(seeds) < 2 or points["spo"].nunique() < 2:
        return Estimate((math.nan,))
    whole, number = coefficient(points), len(seeds)
    without = (coefficient(points[points["seed"] != seed]) for seed in seeds)
    return Estimate(tuple(number * whole - (number - 1) * each for each in without))


def equal_kl_row(question: str, estimate: Estimate) -> Row:
    """The third comparison of both parts."""
    return row_of(question, "reward", estimate, verdict=verdict(estimate, COMPARISONS, even=0.0))


def reward_rows(results: Results) -> list[Row]:
    """The reward of every answer by which a policy was judged; `step` is empty after the last."""
    return [
        {"policy": str(arm), "seed": seed, "step": judged.get("step"), "opening": opening}
        | {"rewards": " ".join(f"{reward:g}" for reward in rewards)}
        for arm, found in results.arms.items()
        for seed, each in zip(results.part.all_seeds, found, strict=True)
        for judged in (*each["judgements"], each)
        for opening, rewards in enumerate(judged["rewards"])
    ]


def of_matched(results: Results) -> Tables:
    """Part 1: each loss at its best beta, SPO(beta) against DPO(4 beta), reward at equal KL."""
    spo, dpo = best(results, "spo"), best(results, "dpo")
    question = "1. SPO against DPO, each at its best beta"
    judged = verdict(spo.wins_over(dpo), COMPARISONS)
    first = wins_row(question, spo, dpo, at_edge=edge_text(results), verdict=judged)
    matched = [each for each in results.comparisons if each.theirs.beta > 2 * each.ours.beta]
    wins = Estimate(tuple(map(fmean, zip(*(each.wins.values for each in matched), strict=True))))
    ties = fmean(
        tie_rate(*both)
        for each in matched
        for both in zip(*(rewards_of(results.of(arm)) for arm in each[:2]), strict=True)
    )
    question = "2. SPO(beta) against DPO(4 beta), mean over the betas"
    judged = verdict(wins, COMPARISONS)
    second = row_of(question, "win rate", wins, ties=ties, verdict=judged)
    third = equal_kl_row("3. SPO less DPO at equal KL", at_equal_kl(results))
    return {"decided": [first, second, third], "rewards": reward_rows(results)}


def edge_text(results: Results) -> str:
    """Which chosen betas are at an edge of their grid."""
    return ", ".join(f"{form} {end}" for form in ("spo", "dpo") for end in edges(results, form))


def of_overtrained(results: Results) -> Tables:
    """Part 2: each loss at its best beta, early stopping, SPO(0.025) and DPO(0.1), equal KL."""
    spo, last, stopped = best(results, "spo"), best(results, "dpo"), best_step(results)
    at_edge = edge_text(results)

    def first(question: str, dpo: Best, judged: str) -> Row:
        judged = "open" if at_edge else judged
        return wins_row(f"1. {question}", spo, dpo, at_edge=at_edge, verdict=judged)

    lasts = spo.wins_over(stopped).interval(COMPARISONS)[0] > STOPPING_WINS
    found = [
        first(
            "SPO against DPO at the last step, each at its best beta",
            last,
            verdict(spo.wins_over(last), COMPARISONS),
        ),
        first(
            "SPO at the last step against DPO at its best step",
            stopped,
            "replaces early stopping" if lasts else "not shown to replace early stopping",
        ),
        *closer_rows(results),
        equal_kl_row("3. SPO less DPO at equal KL", at_equal_kl(results, *KL_RANGE)),
    ]
    return {"decided": found, "rewards": reward_rows(results)}


def best_step(results: Results) -> Best:
    """DPO at its best beta and step: the other seeds choose both."""
    candidates = []
    for arm in results.sorted_arms("dpo", CLEAN):
        found = results.of(arm)
        candidates.append(Candidate(f"{arm.title} at the last step", rewards_of(found)))
        for judged in zip(*(each["judgements"] for each in found), strict=False):
            title = f"{arm.title} after {judged[0]['step']} steps"
            candidates.append(Candidate(title, rewards_of(judged)))
    return choose(candidates)


def closer_rows(results: Results) -> Iterator[Row]:
    """Whether SPO(0.025) stays closer than DPO(0.1) and keeps its reward; both have to hold."""
    ours, theirs = parse_arm("spo:0.025"), parse_arm("dpo:0.1")
    question = "2. SPO(0.025) less DPO(0.1)"

    def less(key: str) -> Estimate:
        return difference(results.estimate(ours, key).values, results.estimate(theirs, key).values)

    # A KL of independent answers that is not above 0 has no logarithm: nan, so nothing is shown.
    kl = difference(
        *(
            [math.log(kl) if kl > 0.0 else math.nan for kl in results.estimate(arm, "kl").values]
            for arm in (ours, theirs)
        )
    )
    closer = kl.interval(COMPARISONS)[1] < 0.0
    yield row_of(question, "log KL", kl, verdict="holds" if closer else "not shown")
    kept = less("reward").interval(COMPARISONS)[0] > REWARD_LOSS
    yield row_of(question, "reward", less("reward"), verdict="holds" if kept else "not shown")


# ------------------------------------------------------------------------------------------ part 3


def objective(found: dict[str, Any]) -> float:
    """J = reward - beta * KL of a judged policy."""
    return float(found["reward"] - BETA * found["kl"])


def optimum(reference: dict[str, Any]) -> float:
    """The greatest J of any policy, from the rewards of the reference's own answers."""
    limit = tilt(np.array(reference["rewards"]), BETA)
    return limit.reward - BETA * limit.kl


def of_on_policy(results: Results) -> Tables:
    """Part 3: known gaps against DPO, at beta and at its best, and against weights alone."""
    # `Candidate` chooses by the mean of a seed's values: here that is J.
    scored = {
        arm: Candidate(arm.title, tuple(np.array([objective(each)]) for each in found))
        for arm, found in results.arms.items()
    }

    def best_of(form: str) -> Best:
        return choose(each for arm, each in scored.items() if arm.form == form)

    def row(question: str, ours: Best, theirs: Best, says: str = "better") -> Row:
        gain = difference(ours.reward.values, theirs.reward.values)
        judged = verdict(gain, COMPARISONS, even=0.0).replace("better", says)
        named = {"ours": ours.title, "theirs": theirs.title, "verdict": judged}
        return row_of(question, "J", gain, **named)

    squared, known, weights = (
        best_of(form) for form in ("squared-gap", "spo-gap-weighted-below0", "spo-weighted-below0")
    )
    (given,) = (each for arm, each in scored.items() if (arm.form, arm.beta) == ("dpo", BETA))
    dpo = Best((given,) * len(results.part.all_seeds))
    found = [
        row("1. squared with known gaps less DPO(0.2)", squared, dpo),
        row(
            "2. squared with known gaps less DPO at its best beta", squared, best_of("dpo"), "helps"
        ),
        row(
            "3. SPO with known gaps less SPO with weights alone",
            known,
            weights,
            "is the target, not the weights",
        ),
    ]
    return {"decided": found, "objective": objective_rows(results)}


def objective_rows(results: Results) -> list[Row]:
    """J of every policy, and the share that it has of what the optimum has over the reference."""
    rows = []
    for arm, found in results.arms.items():
        seeds = zip(results.part.all_seeds, found, results.references, strict=True)
        for seed, each, reference in seeds:
            start, greatest = objective(reference), optimum(reference)
            for judged in (*each["judgements"], each):
                j = objective(judged)
                row: Row = {"policy": str(arm), "seed": seed, "step": judged.get("step"), "j": j}
                row |= {"reference": start, "optimum": greatest}
                rows.append(row | {"attained": (j - start) / (greatest - start)})
    return rows


# ------------------------------------------------------------------------------------------ part 4


def of_road(results: Results) -> Tables:
    """Part 4: reward and KL over learning rates and betas, and the share that works, by loss."""
    road = pd.DataFrame(
        {
            "form": arm.form,
            "rate": arm.rate or results.part.stage.lr,
            "beta": arm.beta,
            "reward": results.estimate(arm, "reward").mean,
            "kl": results.estimate(arm, "kl").mean,
            # Of a stopped run the policy before the failure is judged, so its reward is finite.
            "finite": all(
                each["stopped_at"] is None and math.isfinite(each["reward"]) for each in found
            ),
        }
        for arm, found in results.arms.items()
    )
    greatest = road["reward"][road["finite"]].max()
    road["near_best"] = road["finite"] & (road["reward"] >= greatest - NEAR_BEST)
    shares = road.groupby("form", sort=False)[["finite", "near_best"]].mean().reset_index()
    return {"road": road.to_dict("records"), "shares": shares.to_dict("records")}
