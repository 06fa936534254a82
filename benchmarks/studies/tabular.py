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
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.optimize import brentq
from scipy.special import expit, log_softmax

from benchmarks import record
from spoloss import DPO, SPO, MarginLoss, Squared, pair_grad

Array = np.ndarray

BETAS = (0.1, 0.3, 1.0, 3.0)
LEARNING_RATE = 0.05
PROBABILITIES = (0.6, 0.8, 0.9, 0.99)


# -------------------------------------------------------------------------------------- the world


@dataclass(frozen=True)
class Size:
    """How large a study is; the default is the published one."""

    prompts: int = 32
    responses: int = 40
    pairs: int = 400
    steps: int = 400
    seeds: int = 5


@dataclass(frozen=True)
class World:
    """Log-probabilities of the reference, nats, and rewards, both [prompts, responses]."""

    reference: Array
    reward: Array

    def optimum(self, beta: float) -> Array:
        """Equation 1's optimal policy, log-probabilities."""
        return self.tilted(self.reward, beta)

    def tilted(self, implicit: Array, beta: float) -> Array:
        """The policy whose implicit reward beta * log(pi / pi_ref) is this, up to a constant."""
        return log_softmax(self.reference + implicit / beta, axis=-1)


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses as places in a flattened table, with how much each pair counts."""

    chosen: Array
    rejected: Array
    weights: Array


def draw_world(size: Size, rng: np.random.Generator) -> World:
    """A random reference and a random reward."""
    shape = (size.prompts, size.responses)
    return World(log_softmax(rng.normal(size=shape), axis=-1), rng.normal(size=shape))


def draw_pairs(world: World, count: int, rng: np.random.Generator) -> Array:
    """For each prompt `count` pairs of different responses from the reference, as flat places."""
    prompts, responses = world.reference.shape
    drawn = []
    for prompt in range(prompts):
        p = np.exp(world.reference[prompt])
        both = rng.choice(responses, size=(4 * count, 2), p=p / p.sum())
        while (both[:, 0] != both[:, 1]).sum() < count:
            both = np.concatenate([both, rng.choice(responses, size=(count, 2), p=p / p.sum())])
        both = both[both[:, 0] != both[:, 1]][:count]
        drawn.append(prompt * responses + both)
    return np.concatenate(drawn)


def label(world: World, both: Array, rng: np.random.Generator, *, noisy: bool) -> Pairs:
    """Put the winner of each pair first, and count equal pairs once, with a weight."""
    gap = world.reward.flat[both[:, 0]] - world.reward.flat[both[:, 1]]
    first_wins = rng.random(len(gap)) < expit(gap) if noisy else gap > 0
    ordered = np.where(first_wins[:, None], both, both[:, ::-1])
    unique, counts = np.unique(ordered, axis=0, return_counts=True)
    return Pairs(unique[:, 0], unique[:, 1], counts / len(both))


def every_pair(world: World, *, noisy: bool) -> Pairs:
    """All ordered pairs, weighted as endlessly many draws and labels would."""
    prompts, responses = world.reference.shape
    first, second = np.nonzero(~np.eye(responses, dtype=bool))
    p = np.exp(world.reference)
    gap = world.reward[:, first] - world.reward[:, second]
    wins = expit(gap) if noisy else (gap > 0).astype(float)
    weights = p[:, first] * p[:, second] * wins / prompts
    start = np.arange(prompts)[:, None] * responses
    return Pairs((start + first).ravel(), (start + second).ravel(), weights.ravel())


def kl(p: Array, q: Array) -> float:
    """KL(p || q) of log-probabilities, nats, averaged over prompts."""
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


# ------------------------------------------------------------------------------------ the methods


@dataclass(frozen=True)
class Method:
    """A loss as it is used: what it is told of the gap, and where endless pairs lead it.

    Attributes:
      name: as the tables print it.
      loss: the loss of the margin.
      beta: the loss's beta, from equation 1's and the pairs' known gaps.
      limit: the implicit reward beta * log(pi / pi_ref) at its minimum over endless pairs, from the
        world and whether labels are noisy; None where the loss has no minimum.
      reweigh: the pairs as this method counts them, from the pairs and the rewards.
    """

    name: str
    loss: MarginLoss
    beta: Callable[[float, Array], Any]
    limit: Callable[[World, bool], Array | None]
    reweigh: Callable[[Pairs, Array], Pairs] = lambda pairs, _: pairs

    def gradient(self, world: World, pairs: Pairs, beta: float) -> Callable[[Array], Array]:
        """The gradient of the mean loss by a table of log-probabilities, up to normalisation."""
        reward, reference = world.reward.ravel(), world.reference.ravel()
        pairs = self.reweigh(pairs, reward)
        chosen, rejected = pairs.chosen, pairs.rejected
        betas = self.beta(beta, reward[chosen] - reward[rejected])

        def gradient(policy: Array) -> Array:
            flat = policy.ravel()
            tables = (flat[chosen], flat[rejected], reference[chosen], reference[rejected])
            grad = pair_grad(self.loss, *tables, beta=betas, weights=pairs.weights, reduction="sum")
            # The normaliser of a softmax cancels from every margin: this is the scores' gradient.
            by_chosen = np.bincount(chosen, grad.policy_chosen, flat.size)
            by_rejected = np.bincount(rejected, grad.policy_rejected, flat.size)
            return (by_chosen + by_rejected).reshape(policy.shape)

        return gradient


def soften(pairs: Pairs, reward: Array) -> Pairs:
    """Each pair in both orders, weighted by the probabilities of Bradley-Terry."""
    right = expit(reward[pairs.chosen] - reward[pairs.rejected])
    return Pairs(
        np.concatenate([pairs.chosen, pairs.rejected]),
        np.concatenate([pairs.rejected, pairs.chosen]),
        np.concatenate([pairs.weights * right, pairs.weights * (1.0 - right)]),
    )


def weigh_by_gap(pairs: Pairs, reward: Array) -> Pairs:
    """Each pair by its squared gap, which evens out the curvature of SPO with known gaps."""
    gap = reward[pairs.chosen] - reward[pairs.rejected]
    return replace(pairs, weights=pairs.weights * gap**2)


def spo_limit(world: World, noisy: bool) -> Array:
    """SPO's minimum over endless pairs, at beta = 1; by x alone it is the same for every beta."""
    gradient = SPO_METHOD.gradient(world, every_pair(world, noisy=noisy), 1.0)
    # Over all pairs the curvature by a response's score goes like the response's probability.
    scale = np.exp(world.reference) / len(world.reference)
    implicit = np.zeros_like(world.reference)
    for _ in range(5000):
        step = 0.5 * gradient(world.reference + implicit) / scale
        implicit -= step
        if np.abs(step).max() < 1e-10:
            return implicit
    raise ArithmeticError("SPO's minimum over endless pairs: expected convergence in 5000 steps")


def ipo_limit(world: World, noisy: bool) -> Array:
    """IPO's minimum over endless pairs: the probability of winning against the reference."""
    gap = world.reward[:, :, None] - world.reward[:, None, :]
    wins = expit(gap) if noisy else (np.sign(gap) + 1.0) / 2.0
    return np.einsum("pij,pj->pi", wins, np.exp(world.reference))


def plain(beta: float, _: Array) -> float:
    """The beta of equation 1."""
    return beta


def per_gap(beta: float, gap: Array) -> Array:
    """A known gap is a beta per pair."""
    return beta / gap


def reward_itself(world: World, _: bool) -> Array:
    """The optimum's implicit reward."""
    return world.reward


SPO_METHOD = Method("SPO(beta)", SPO(), plain, spo_limit)
UNKNOWN_GAP = (
    Method("DPO(beta)", DPO(), plain, lambda w, noisy: w.reward if noisy else None),
    Method(
        "DPO(4 beta)",
        DPO(),
        lambda beta, _: 4.0 * beta,
        lambda w, noisy: w.reward / 4.0 if noisy else None,
    ),
    Method("IPO(beta)", Squared(), lambda beta, _: 2.0 * beta, ipo_limit),
    SPO_METHOD,
)
KNOWN_GAP = (
    Method("DPO, soft labels s(gap)", DPO(), plain, reward_itself, soften),
    Method("SPO, known gap", SPO(), per_gap, reward_itself),
    Method(
        "SPO, known gap, weighted, guarded",
        SPO(linear_below=0.0),
        per_gap,
        reward_itself,
        weigh_by_gap,
    ),
    Method("squared, known gap", Squared(), per_gap, reward_itself),
)


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
        world = draw_world(size, rng)
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
