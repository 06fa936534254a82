"""Does a loss find equation 1's optimal policy? An exact study, where that policy is known.

    python -m benchmarks.studies tabular              results/tabular.csv, half a minute
    python -m benchmarks.studies tabular --quick      one seed; no file

A prompt has 40 possible responses, so a policy is a table of 40 log-probabilities, and equation 1
is solved by pi* = pi_ref * e^(r / beta) / Z. Reference and reward are random. Pairs are drawn from
the reference and labelled by the reward (clean) or by Bradley-Terry (noisy: the better response
wins with probability s(gap)); each loss then trains a softmax policy on them with Adam. What comes
out is measured by KL(pi* || pi) in nats, averaged over prompts. Columns of the file, means over
seeds with standard errors:

    diverged     seeds whose training diverged; kl is then empty
    kl           after training
    kl_change    its change in the last quarter of the steps
    kl_endless   at the loss's minimum over endlessly many pairs; empty where it has none

A known gap is a known order too, so the methods that are given it see no noise. All gradients are
spoloss's own, in NumPy.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import methodcaller

import numpy as np
import pandas as pd
import torch
from scipy.special import log_softmax

from benchmarks import record
from benchmarks.studies.tabular_methods import (
    KNOWN_GAP,
    UNKNOWN_GAP,
    Array,
    draw_pairs,
    draw_world,
    kl,
    label,
)

BETAS = (0.1, 0.3, 1.0, 3.0)
LEARNING_RATE = 0.05


@dataclass(frozen=True)
class Size:
    """How large a study is; the default is the published one."""

    prompts: int = 32
    responses: int = 40
    pairs: int = 400
    steps: int = 400
    seeds: int = 5


def study(size: Size, betas: Sequence[float] = BETAS) -> pd.DataFrame:
    """Trains every method at every beta on clean and on noisy labels; a row for each."""
    found = []
    for seed in range(size.seeds):
        rng = np.random.default_rng(seed)
        world = draw_world((size.prompts, size.responses), rng)
        both = draw_pairs(world, size.pairs, rng)
        for labels, methods in (("clean", UNKNOWN_GAP + KNOWN_GAP), ("noisy", UNKNOWN_GAP)):
            pairs = label(world, both, rng, noisy=labels == "noisy")
            for beta in betas:
                distance = kl(world.optimum(beta), world.reference)
                found.append((labels, beta, "no training", distance, 0.0, math.nan))
            for method in methods:
                limit = method.limit(world, labels == "noisy")
                for beta in betas:
                    gradient, optimum = method.gradient(world, pairs, beta), world.optimum(beta)
                    stops = size.steps - size.steps // 4, size.steps
                    early, late = (
                        kl(optimum, policy) for policy in adam(gradient, world.reference, stops)
                    )
                    endless = math.nan if limit is None else kl(optimum, world.tilted(limit, beta))
                    found.append((labels, beta, method.name, late, late - early, endless))
    key, measures = ["labels", "beta", "method"], ["kl", "kl_change", "kl_endless"]
    seeds = pd.DataFrame(found, columns=[*key, *measures]).groupby(key, sort=False)
    mean, error = methodcaller("mean", skipna=False), methodcaller("sem", skipna=False)
    return seeds.agg(
        diverged=("kl", lambda kl: kl.isna().sum()),
        kl=("kl", mean),
        kl_error=("kl", error),
        kl_change=("kl_change", mean),
        kl_endless=("kl_endless", mean),
        kl_endless_error=("kl_endless", error),
    ).reset_index()


def adam(gradient: Callable[[Array], Array], start: Array, stops: Sequence[int]) -> list[Array]:
    """Adam from a table of log-probabilities on; returns the tables after so many steps each.

    They are nan if a gradient is not finite.
    """
    scores = torch.tensor(start)
    optimizer = torch.optim.Adam([scores], lr=LEARNING_RATE)
    seen = []
    for step in range(1, stops[-1] + 1):
        slope = gradient(scores.numpy())
        if not np.isfinite(slope).all():
            return [np.full_like(start, math.nan) for _ in stops]
        scores.grad = torch.from_numpy(slope)
        optimizer.step()
        if step in stops:
            seen.append(log_softmax(scores.numpy(), axis=-1))
    return seen


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study, prints its table, and writes it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies tabular",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one seed; no file")
    quick = parser.parse_args(argv).quick
    table = study(Size(seeds=1) if quick else Size())
    print(table.to_string(index=False, float_format="{:.3f}".format, na_rep="-"))
    if not quick:
        title = record.machine("numpy", "torch", "spoloss")
        record.write(record.RESULTS / "tabular.csv", title, table.to_dict("records"))
