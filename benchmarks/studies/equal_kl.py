"""Reward at equal KL: a regression over policies that differ in loss, beta and seed."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from benchmarks.studies.results import Results


def points_within(results: Results, low: float, high: float) -> pd.DataFrame:
    """Seed, log KL, reward and whether the loss is SPO, of every policy whose KL is in a range."""
    found = [
        (seed, math.log(found["kl"]), found["reward"], arm.form == "spo")
        for arm, each in results.arms.items()
        for seed, found in zip(results.part.seeds, each, strict=True)
        if low < found["kl"] < high
    ]
    return pd.DataFrame(found, columns=["seed", "log_kl", "reward", "spo"])


def spo_effect(points: pd.DataFrame) -> pd.Series:
    """Reward of SPO less that of DPO at equal KL, for every seed.

    It is the coefficient of "SPO" in the regression reward ~ seed + log KL + (log KL)^2 + SPO. The
    values are the jackknife's pseudo-values over the seeds, so its error is clustered by seed. nan
    if the points of all seeds, or of all but one, do not determine the coefficient.
    """
    seeds = points["seed"].unique()
    whole, number = coefficient(points), len(seeds)
    without = np.array([coefficient(points[points["seed"] != seed]) for seed in seeds])
    return pd.Series(number * whole - (number - 1) * without)


def coefficient(points: pd.DataFrame) -> float:
    """That of "SPO" in the least-squares fit; nan where many fits are equally good."""
    log_kl = points["log_kl"]
    columns = (points["spo"], log_kl, log_kl**2, pd.get_dummies(points["seed"]))
    design = np.column_stack(columns).astype(float)
    fit, _, rank, _ = np.linalg.lstsq(design, points["reward"].astype(float), rcond=None)
    return float(fit[0]) if rank == design.shape[1] else math.nan
