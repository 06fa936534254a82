"""Does a loss find equation 1's optimal policy? An exact study, where that policy is known.

    python -m benchmarks.studies tabular              results/tabular.csv and .png, half a minute
    python -m benchmarks.studies tabular --quick      one seed; the tables alone

A prompt has 40 possible responses, so a policy is a table of 40 log-probabilities, and equation 1
is solved by pi* = pi_ref * e^(r / beta) / Z. Reference and reward are random. Pairs are drawn from
the reference and labelled by the reward (clean) or by Bradley-Terry (noisy: the better response
wins with probability s(gap)); each loss then trains a softmax policy on them with Adam. Two
measures of what comes out, both 0 at pi* alone:

    KL      KL(pi* || pi), nats, averaged over prompts
    regret  what pi lacks in equation 1's objective, beta * KL(pi || pi*), in units of reward

and one of what the loss asks for: the KL at its minimum over endlessly many pairs. Every number is
a mean over seeds with its standard error. A known gap is a known order too, so the methods that
are given it see no noise. All gradients are spoloss's own, in NumPy.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.optimize import brentq
from scipy.special import log_softmax

from benchmarks import record
from benchmarks.studies.tabular_methods import (
    KNOWN_GAP,
    UNKNOWN_GAP,
    Array,
    Method,
    Pairs,
    World,
    draw_pairs,
    draw_world,
    kl,
    label,
)
from spoloss import DPO, SPO, MarginLoss, Squared

BETAS = (0.1, 0.3, 1.0, 3.0)
LEARNING_RATE = 0.05
PROBABILITIES = (0.6, 0.8, 0.9, 0.99)


@dataclass(frozen=True)
class Size:
    """How large a study is; the default is the published one."""

    prompts: int = 32
    responses: int = 40
    pairs: int = 400
    steps: int = 400
    seeds: int = 5


# -------------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class Outcome:
    """What one seed gives for one method at one beta on one kind of labels.

    Attributes:
      kl: KL(pi* || pi), nats; nan where training diverged.
      kl_change: its change in the last quarter of the steps.
      regret: what pi lacks in equation 1, in units of reward.
      kl_endless: the KL at the loss's minimum over endless pairs; inf where it has none.
    """

    kl: float
    kl_change: float
    regret: float
    kl_endless: float


def study(size: Size, betas: Sequence[float] = BETAS) -> list[dict[str, Any]]:
    """Train every method at every beta on clean and on noisy labels; a row for each."""
    outcomes: dict[tuple[str, float, str], list[Outcome]] = {}
    for seed in range(size.seeds):
        rng = np.random.default_rng(seed)
        world = draw_world((size.prompts, size.responses), rng)
        both = draw_pairs(world, size.pairs, rng)
        for labels, methods in (("clean", UNKNOWN_GAP + KNOWN_GAP), ("noisy", UNKNOWN_GAP)):
            pairs = label(world, both, rng, noisy=labels == "noisy")
            for beta in betas:
                still = untrained(world, beta)
                outcomes.setdefault((labels, beta, "no training"), []).append(still)
            for method in methods:
                limit = method.limit(world, labels == "noisy")
                for beta in betas:
                    outcome = train(method, beta, world, pairs, limit, size.steps)
                    outcomes.setdefault((labels, beta, method.name), []).append(outcome)
    return [summarise(*key, outcomes[key]) for key in outcomes]


def untrained(world: World, beta: float) -> Outcome:
    """The reference itself."""
    optimum = world.optimum(beta)
    distance = kl(optimum, world.reference)
    return Outcome(distance, 0.0, beta * kl(world.reference, optimum), distance)


def train(
    method: Method, beta: float, world: World, pairs: Pairs, limit: Array | None, steps: int
) -> Outcome:
    """Train a softmax policy from the reference on, and measure it."""
    optimum = world.optimum(beta)
    gradient = method.gradient(world, pairs, beta)
    early, policy = adam(gradient, world.reference, (steps - steps // 4, steps))
    distance = kl(optimum, policy)
    return Outcome(
        kl=distance,
        kl_change=distance - kl(optimum, early),
        regret=beta * kl(policy, optimum),
        kl_endless=math.inf if limit is None else kl(optimum, world.tilted(limit, beta)),
    )


def adam(gradient: Callable[[Array], Array], start: Array, stops: Sequence[int]) -> list[Array]:
    """Adam from a table of log-probabilities on; returns the tables after so many steps each."""
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


def summarise(labels: str, beta: float, method: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """Means over seeds and standard errors; nan where any seed diverged."""
    seeds = pd.DataFrame(map(asdict, outcomes))
    with np.errstate(invalid="ignore"):  # a loss without a minimum is infinitely far away
        mean, error = seeds.mean(skipna=False), seeds.sem(skipna=False)
    return {
        "labels": labels,
        "beta": beta,
        "method": method,
        "diverged": int(seeds["kl"].isna().sum()),
        "kl": mean["kl"],
        "kl_error": error["kl"],
        "kl_change": mean["kl_change"],
        "regret": mean["regret"],
        "regret_error": error["regret"],
        "kl_endless": mean["kl_endless"],
        "kl_endless_error": error["kl_endless"],
    }


# -------------------------------------------------------------------------- where the minima lie


def flipped_labels(probability: float) -> dict[str, tuple[float, float]]:
    """Two answers, the better one labelled so with a probability: where each loss rests.

    Returns:
      The implicit reward margin x at the minimum, by closed form and by the loss's own slope.
    """
    log_odds = math.log(probability / (1.0 - probability))
    closed = {
        "DPO": (DPO(), log_odds),
        "SPO": (SPO(), brentq(lambda x: 2.0 * x + 2.0 * math.atanh(x) - log_odds, 0.0, 1 - 1e-15)),
        "squared": (Squared(), 2.0 * probability - 1.0),
    }

    def slope(loss: MarginLoss, x: float) -> float:
        right, wrong = (float(loss.slope(np.array([h]), 1.0)[0]) for h in (x, -x))
        return probability * right - (1.0 - probability) * wrong

    return {
        name: (x, brentq(lambda x, loss=loss: slope(loss, x), 0.0, 50.0))
        for name, (loss, x) in closed.items()
    }


# ------------------------------------------------------------------------------------ what it says


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Every measure by method and beta, and where the minima lie."""
    table = pd.DataFrame(rows).pivot_table(
        index=["labels", "method"],
        columns="beta",
        values=["kl", "regret", "kl_endless"],
        sort=False,
    )
    print(table.to_string(float_format="{:.3f}".format, na_rep="diverged"))
    print("\nx at the minimum, labels right with a probability: closed form, by the loss's slope")
    for p in PROBABILITIES:
        margins = (f"{name} {x:.4f} {found:.4f}" for name, (x, found) in flipped_labels(p).items())
        print(f"{p:g}: {', '.join(margins)}")


def draw(rows: list[dict[str, Any]]) -> Figure:
    """KL over beta for both kinds of labels, and the margins at which noisy labels rest."""
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    clean, noisy, margins = figure.subplots(1, 3)
    frame = pd.DataFrame(rows)
    for axes, labels in ((clean, "clean"), (noisy, "noisy")):
        for number, method in enumerate(frame["method"].unique()):
            ours = frame[(frame["labels"] == labels) & (frame["method"] == method)]
            style = {"color": f"C{number}", "linestyle": ":" if number == 0 else "-", "marker": "o"}
            if len(ours):
                axes.errorbar(ours["beta"], ours["kl"], ours["kl_error"], label=method, **style)
        axes.set(xscale="log", yscale="log", ylim=(1e-3, 10.0))
        axes.set(xlabel="beta", ylabel="KL(pi* || pi), nats")
        axes.set_title(f"After training, {labels} labels")
        axes.grid(alpha=0.3)
    figure.legend(*clean.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    p = np.linspace(0.5, 0.995, 100)[1:]
    for name in flipped_labels(0.9):
        margins.plot(p, [flipped_labels(float(q))[name][1] for q in p], label=name)
    margins.set(xlabel="probability that a label is right", ylabel="x at the minimum")
    margins.set_title("Where noisy labels lead")
    margins.legend()
    margins.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, print its tables, and write them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies tabular", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one seed; no file")
    quick = parser.parse_args(argv).quick
    rows = study(Size(seeds=1) if quick else Size())
    print_tables(rows)
    if not quick:
        record.write(record.RESULTS / "tabular.csv", record.machine("numpy", "spoloss"), rows)
        draw(rows).savefig(record.RESULTS / "tabular.png")
