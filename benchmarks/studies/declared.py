"""The comparisons of the second study, as docs/second_study.md declares them.

Parts 1 to 3 ask questions; part 4 is a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logsumexp

from benchmarks.studies.arms import Arm
from benchmarks.studies.equal_kl import points_within, spo_effect
from benchmarks.studies.evaluation import tie_rate, win_rate
from benchmarks.studies.questions import WIN_RATE, Question, completion_rows, decide, ends
from benchmarks.studies.results import (
    Best,
    Interval,
    Results,
    Rewards,
    Tables,
    best_of,
    choose,
    verdict,
)

DPO_FACTOR = 4.0
"""SPO(beta) is matched with DPO at so many times beta."""
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


# ------------------------------------------------------------------------------------ parts 1 and 2


def of_matched(results: Results) -> Tables:
    """Part 1: each loss at its best beta, SPO(beta) against DPO(4 beta), reward at equal KL."""
    spo, dpo = best_of(results, "spo"), best_of(results, "dpo")
    matched = [
        seed_by_seed(results.rewards(ours), results.rewards(theirs))
        for ours in results.sorted_arms("spo")
        for theirs in results.sorted_arms("dpo")
        if math.isclose(theirs.beta, DPO_FACTOR * ours.beta)
    ]
    mean = sum(matched) / len(matched)
    questions = [
        wins("1. SPO against DPO, each at its best beta", spo, dpo, verdict, edge_text(results)),
        Question(
            "2. SPO(beta) against DPO(4 beta), mean over the betas",
            {WIN_RATE: mean["wins"]},
            verdict,
            {"ties": mean["ties"].mean()},
        ),
        at_equal_kl(results),
    ]
    return {"decided": decide(questions), "rewards": completion_rows(results, "rewards")}


def of_overtrained(results: Results) -> Tables:
    """Part 2: each loss at its best beta, early stopping, SPO(0.025) and DPO(0.1), equal KL."""
    spo, at_edge = best_of(results, "spo"), edge_text(results)

    def first(text: str, dpo: Best, says: Callable[..., str]) -> Question:
        return wins(f"1. {text}", spo, dpo, (lambda _: "open") if at_edge else says, at_edge)

    def stopping(interval: Interval) -> str:
        lasts = interval[0] > STOPPING_WINS
        return "replaces early stopping" if lasts else "not shown to replace early stopping"

    questions = [
        first(
            "SPO against DPO at the last step, each at its best beta",
            best_of(results, "dpo"),
            verdict,
        ),
        first("SPO at the last step against DPO at its best step", best_step(results), stopping),
        closer(results),
        at_equal_kl(results, *KL_RANGE),
    ]
    return {"decided": decide(questions), "rewards": completion_rows(results, "rewards")}


def wins(text: str, ours: Best, theirs: Best, says: Callable[..., str], at_edge: str) -> Question:
    """A win rate, with both policies and the share of ties."""
    found = seed_by_seed(ours.rewards, theirs.rewards)
    further = {"ties": found["ties"].mean(), "ours": ours.title, "theirs": theirs.title}
    return Question(text, {WIN_RATE: found["wins"]}, says, {**further, "at_edge": at_edge})


def seed_by_seed(ours: Rewards, theirs: Rewards) -> pd.DataFrame:
    """The wins of ours over theirs and the ties, in [0, 1], a row for each seed."""
    both = zip(ours, theirs, strict=True)
    return pd.DataFrame([{"wins": win_rate(*each), "ties": tie_rate(*each)} for each in both])


def best_step(results: Results) -> Best:
    """DPO at its best beta and step: the other seeds choose both."""
    candidates: dict[str, Rewards] = {}
    for arm in results.sorted_arms("dpo"):
        candidates[f"{arm.title} at the last step"] = results.rewards(arm)
        # A step counts if all seeds reached it.
        for judged in zip(*(each["judgements"] for each in results.arms[arm]), strict=False):
            title = f"{arm.title} after {judged[0]['step']} steps"
            candidates[title] = [np.array(each["rewards"], dtype=float) for each in judged]
    return choose(candidates)


def edges(results: Results, form: str) -> list[str]:
    """The ends of a loss's grid that a comparison of parts 1 and 2 chooses for some seed."""
    stopped = [best_step(results)] if form == "dpo" else []
    return ends(results.sorted_arms(form), best_of(results, form), *stopped)


def edge_text(results: Results) -> str:
    """Which chosen betas of parts 1 and 2 are at an edge of their grid."""
    return ", ".join(f"{form} {end}" for form in ("spo", "dpo") for end in edges(results, form))


def at_equal_kl(results: Results, low: float = 0.0, high: float = math.inf) -> Question:
    """The third comparison of both parts, from the arms whose KL is in a range."""
    points = points_within(results, low, high)
    spo = int(points["spo"].sum())
    return Question(
        "3. SPO less DPO at equal KL",
        {"reward": spo_effect(points)},
        partial(verdict, even=0.0),
        {"spo_points": spo, "dpo_points": len(points) - spo},
    )


def closer(results: Results) -> Question:
    """Whether SPO(0.025) stays closer than DPO(0.1) and keeps its reward; both have to hold."""
    ours, theirs = Arm("spo", 0.025), Arm("dpo", 0.1)

    def log_kl(arm: Arm) -> pd.Series:
        # A KL of independent answers that is not above 0 has no logarithm.
        kl = results.values(arm, "kl")
        return np.log(kl.where(kl > 0.0))

    def says(kl: Interval, reward: Interval) -> str:
        return "holds" if kl[1] < 0.0 and reward[0] > REWARD_LOSS else "not shown"

    reward = results.values(ours, "reward") - results.values(theirs, "reward")
    measures = {"log KL": log_kl(ours) - log_kl(theirs), "reward": reward}
    return Question("2. SPO(0.025) less DPO(0.1)", measures, says, {})


# ------------------------------------------------------------------------------------------ part 3


def objective(found: dict[str, Any]) -> float:
    """J = reward - beta * KL of a judged policy."""
    return float(found["reward"] - BETA * found["kl"])


def optimum(reference: dict[str, Any]) -> float:
    """The greatest J of any policy, from the rewards of the reference's own answers."""
    rewards = np.array(reference["rewards"])
    return float(BETA * logsumexp(rewards / BETA, axis=1, b=1.0 / rewards.shape[1]).mean())


def of_on_policy(results: Results) -> Tables:
    """Part 3: known gaps against DPO, at beta and at its best, and against weights alone."""

    def most_j(form: str, *betas: float) -> Best:
        """By `choose`, for which a seed's J stands as the reward of one answer."""
        arms = (arm for arm in results.sorted_arms(form) if not betas or arm.beta in betas)
        return choose(
            {arm.title: [np.array([objective(each)]) for each in results.arms[arm]] for arm in arms}
        )

    squared, dpo = most_j("squared-gap"), most_j("dpo")
    betas = [f"dpo {end}" for end in ends(results.sorted_arms("dpo"), dpo)]
    gain = partial(gain_of, results)
    questions = [
        gain("1. squared with known gaps less DPO(0.2)", squared, most_j("dpo", BETA)),
        gain("2. squared with known gaps less DPO at its best beta", squared, dpo, "helps", betas),
        gain(
            "3. SPO with known gaps less SPO with weights alone",
            most_j("spo-gap-weighted-below0"),
            most_j("spo-weighted-below0"),
            "is the target, not the weights",
        ),
    ]
    return {
        "decided": decide(questions),
        "objective": objective_rows(results),
        "rewards": completion_rows(results, "rewards", "log_ratios"),
    }


def gain_of(
    results: Results,
    text: str,
    ours: Best,
    theirs: Best,
    better: str = "better",
    betas: Sequence[str] = (),
) -> Question:
    """A difference in J, with `betas` and learning rates at the edge of those tried."""
    titles = {*ours.titles, *theirs.titles}
    middle = results.part.stage.lr  # of the three that the pilot tries
    edge = [arm for arm in results.arms if arm.title in titles and arm.rate != middle]
    rates = dict.fromkeys(f"{arm.form} rate {arm.rate:g}" for arm in edge)
    further = {"ours": ours.title, "theirs": theirs.title, "at_edge": ", ".join((*betas, *rates))}
    gain = pd.Series(np.concatenate(ours.rewards) - np.concatenate(theirs.rewards))
    return Question(text, {"J": gain}, partial(verdict, even=0.0, better=better), further)


def objective_rows(results: Results) -> list[dict[str, Any]]:
    """J of every policy, and the share that it has of what the optimum has over the reference."""
    rows = []
    for arm, found in results.arms.items():
        seeds = zip(results.part.seeds, found, results.references, strict=True)
        for seed, each, reference in seeds:
            start, greatest = objective(reference), optimum(reference)
            for judged in (*each["judgements"], each):
                j = objective(judged)
                row = {"policy": str(arm), "seed": seed, "step": judged.get("step"), "j": j}
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
            "reward": results.values(arm, "reward").mean(skipna=False),
            "kl": results.values(arm, "kl").mean(skipna=False),
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
