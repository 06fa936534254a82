"""Does a loss find equation 1's optimal policy? An exact study, where that policy is known.

    python -m benchmarks.tabular                              prints its tables, half a minute
    python -m benchmarks.tabular --output benchmarks/results  also writes tabular*.csv, tabular.png

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
import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import machine as describe
from spoloss import DPO, SPO, MarginLoss, Squared, pair_grad

Array = np.ndarray

BETAS = (0.1, 0.3, 1.0, 3.0)
LEARNING_RATE = 0.05
PROBABILITIES = (0.6, 0.8, 0.9, 0.99)
ANSWERS = (3, 8, 32)
MOVING = 0.05
"""A KL that changed by more than this share in the last quarter of the steps is marked."""


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
        return normalised(self.reference + implicit / beta)


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses as places in a flattened table, with how much each pair counts."""

    chosen: Array
    rejected: Array
    weights: Array


def draw_world(size: Size, rng: np.random.Generator) -> World:
    """A random reference and a random reward."""
    shape = (size.prompts, size.responses)
    return World(normalised(rng.normal(size=shape)), rng.normal(size=shape))


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
    first_wins = rng.random(len(gap)) < logistic(gap) if noisy else gap > 0
    ordered = np.where(first_wins[:, None], both, both[:, ::-1])
    unique, counts = np.unique(ordered, axis=0, return_counts=True)
    return Pairs(unique[:, 0], unique[:, 1], counts / len(both))


def every_pair(world: World, *, noisy: bool) -> Pairs:
    """All ordered pairs, weighted as endlessly many draws and labels would."""
    prompts, responses = world.reference.shape
    first, second = np.nonzero(~np.eye(responses, dtype=bool))
    p = np.exp(world.reference)
    gap = world.reward[:, first] - world.reward[:, second]
    wins = logistic(gap) if noisy else (gap > 0).astype(float)
    weights = p[:, first] * p[:, second] * wins / prompts
    start = np.arange(prompts)[:, None] * responses
    return Pairs((start + first).ravel(), (start + second).ravel(), weights.ravel())


def normalised(scores: Array) -> Array:
    """Log-softmax over the last axis."""
    top = scores.max(axis=-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))


def logistic(x: Array) -> Array:
    """1 / (1 + e^(-x))."""
    return np.exp(-np.logaddexp(0.0, -x))


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
    right = logistic(reward[pairs.chosen] - reward[pairs.rejected])
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
    wins = logistic(gap) if noisy else (np.sign(gap) + 1.0) / 2.0
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
class Row:
    """One method at one beta on one kind of labels: means over seeds, standard errors.

    kl_change is the KL's change in the last quarter of the steps; kl_endless is inf where the loss
    has no minimum. Where any seed diverged, what training gave is nan.
    """

    labels: str
    beta: float
    method: str
    diverged: int
    kl: float
    kl_error: float
    kl_change: float
    regret: float
    regret_error: float
    kl_endless: float
    kl_endless_error: float


@dataclass(frozen=True)
class Outcome:
    """What one seed gives for one row, in the row's terms."""

    kl: float
    kl_change: float
    regret: float
    kl_endless: float


def study(size: Size, betas: Sequence[float] = BETAS) -> list[Row]:
    """Train every method at every beta on clean and on noisy labels."""
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
    scores, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    seen = []
    for step in range(1, stops[-1] + 1):
        slope = gradient(scores)
        if not np.isfinite(slope).all():
            return [np.full_like(start, math.nan) for _ in stops]
        first += 0.1 * (slope - first)
        second += 0.001 * (slope * slope - second)
        unbiased = np.sqrt(second / (1.0 - 0.999**step)) + 1e-8
        scores -= LEARNING_RATE * first / (1.0 - 0.9**step) / unbiased
        if step in stops:
            seen.append(normalised(scores))
    return seen


def summarise(labels: str, beta: float, method: str, outcomes: list[Outcome]) -> Row:
    """Mean and standard error over seeds."""

    def over_seeds(values: Iterable[float]) -> tuple[float, float]:
        values = np.array(list(values))
        if not np.isfinite(values).all() or len(values) == 1:
            return float(values.mean()), math.nan
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))

    return Row(
        labels,
        beta,
        method,
        sum(math.isnan(outcome.kl) for outcome in outcomes),
        *over_seeds(outcome.kl for outcome in outcomes),
        over_seeds(outcome.kl_change for outcome in outcomes)[0],
        *over_seeds(outcome.regret for outcome in outcomes),
        *over_seeds(outcome.kl_endless for outcome in outcomes),
    )


# -------------------------------------------------------------------------- where the minima lie


@dataclass(frozen=True)
class Margin:
    """An implicit reward margin x at the minimum of a loss, by closed form and by descent."""

    case: str
    method: str
    closed_form: float
    found: float


def flipped_labels(probability: float) -> list[Margin]:
    """Two answers, the better one labelled so with a probability: where each loss rests."""
    log_odds = math.log(probability / (1.0 - probability))
    closed = {
        "DPO": (DPO(), log_odds),
        "SPO": (SPO(), root(lambda x: 2.0 * x + 2.0 * math.atanh(x) - log_odds, 0.0, 1 - 1e-15)),
        "squared": (Squared(), 2.0 * probability - 1.0),
    }

    def slope(loss: MarginLoss, x: float) -> float:
        right, wrong = (float(loss.slope(np.array([h]), 1.0)[0]) for h in (x, -x))
        return probability * right - (1.0 - probability) * wrong

    case = f"2 answers, right with probability {probability:g}"
    return [
        Margin(case, name, x, root(lambda x, loss=loss: slope(loss, x), 0.0, 50.0))
        for name, (loss, x) in closed.items()
    ]


def ranked_answers(count: int) -> Array:
    """The margins x of all pairs of K ranked answers at SPO's minimum, best pairing first."""
    first, second = np.triu_indices(count, 1)
    scores = np.zeros(count)
    for _ in range(100_000):
        slope = SPO().slope(scores[first] - scores[second], 1.0)
        change = np.bincount(first, slope, count) - np.bincount(second, slope, count)
        scores -= change / count
        if np.abs(change).max() < 1e-13 * count:
            return scores[first] - scores[second]
    raise ArithmeticError(f"{count} ranked answers: expected convergence in 100,000 steps")


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """The root of an increasing function, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2.0
        low, high = (middle, high) if function(middle) < 0.0 else (low, middle)
    return (low + high) / 2.0


# ------------------------------------------------------------------------------------- what it says


def print_study(rows: list[Row], measure: str, title: str) -> None:
    """One table of a measure: methods down, betas across."""
    betas = sorted({row.beta for row in rows})
    for labels in dict.fromkeys(row.labels for row in rows):
        print(f"\n{title}, {labels} labels")
        print(f"{'':34}" + "".join(f"{f'beta = {beta:g}':>19}" for beta in betas))
        ours = [row for row in rows if row.labels == labels]
        for method in dict.fromkeys(row.method for row in ours):
            cells = [cell(row, measure) for row in ours if row.method == method]
            print(f"{method:34}" + "".join(f"{text:>19}" for text in cells))


def cell(row: Row, measure: str) -> str:
    """A mean with its standard error; a star where training was still on its way."""
    value, error = getattr(row, measure), getattr(row, f"{measure}_error")
    moving = measure != "kl_endless" and abs(row.kl_change) > MOVING * row.kl
    if math.isinf(value):
        return "no minimum "
    if math.isnan(value):
        return f"{row.diverged} diverged "
    spread = "" if math.isnan(error) else f" ± {error:.3f}"
    return f"{value:.3f}{spread}{'*' if moving else ' '}"


def print_margins(margins: list[Margin]) -> None:
    """The closed forms of the minima beside what descent finds."""
    print("\nImplicit reward margin x at the minimum, by closed form and by the loss's own slope")
    for margin in margins:
        print(f"{margin.case:44}{margin.method:10}{margin.closed_form:9.4f}{margin.found:9.4f}")


def print_ranks() -> None:
    """How far the pairs of K ranked answers are from x = 1 at SPO's minimum."""
    print("\nSPO on K ranked answers, all against all: x of the pairs at the minimum")
    for count in ANSWERS:
        x = ranked_answers(count)
        spread = f"mean {x.mean():.2f}, sd {x.std():.2f}"
        print(f"K = {count:<4}{spread}, smallest {x.min():.3f}, largest {x.max():.3f}")


def write_rows(path: Path, rows: Sequence[Row] | Sequence[Margin]) -> None:
    """A CSV file that says where it was computed."""
    with path.open("w", newline="") as file:
        file.write(f"# {describe('numpy', 'spoloss')}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            shown = {k: f"{v:.5g}" for k, v in values.items() if isinstance(v, float)}
            writer.writerow(values | shown)


def draw(rows: list[Row], path: Path) -> None:
    """KL over beta for both kinds of labels, and the margins at which noisy labels rest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.4), layout="constrained")
    clean, noisy, margins = figure.subplots(1, 3)
    methods = list(dict.fromkeys(row.method for row in rows))
    for axes, labels in ((clean, "clean"), (noisy, "noisy")):
        for number, method in enumerate(methods):
            ours = [row for row in rows if (row.labels, row.method) == (labels, method)]
            style = {"color": f"C{number}", "linestyle": ":" if number == 0 else "-", "marker": "o"}
            errors = [row.kl_error for row in ours]
            betas = [row.beta for row in ours]
            if ours:
                axes.errorbar(betas, [row.kl for row in ours], errors, label=method, **style)
        axes.set(xscale="log", yscale="log", ylim=(1e-3, 10.0))
        axes.set(xlabel="beta", ylabel="KL(pi* || pi), nats")
        axes.set_title(f"After training, {labels} labels")
        axes.grid(alpha=0.3)
    figure.legend(*clean.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    p = np.linspace(0.5, 0.995, 100)[1:]
    for name in ("DPO", "SPO", "squared"):
        x = [{m.method: m.found for m in flipped_labels(float(q))}[name] for q in p]
        margins.plot(p, x, label=name)
    margins.set(xlabel="probability that a label is right", ylabel="x at the minimum")
    margins.set_title("Where noisy labels lead")
    margins.legend()
    margins.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, print its tables, and write them where asked."""
    parser = argparse.ArgumentParser(prog="tabular", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=Size().seeds, help="default: 5")
    parser.add_argument("--output", type=Path, help="a folder for tabular*.csv and tabular.png")
    arguments = parser.parse_args(argv)
    output = arguments.output
    if output is not None and output.exists() and not output.is_dir():
        parser.error(f"--output {output}: expected a folder, got a file")
    rows = study(Size(seeds=arguments.seeds))
    margins = [margin for p in PROBABILITIES for margin in flipped_labels(p)]
    print_study(rows, "kl", "KL(pi* || pi), nats, after training")
    print_study(rows, "regret", "Regret in equation 1, units of reward, after training")
    print("* the KL still changed by more than 5 % in the last quarter of the steps")
    print_study(rows, "kl_endless", "KL(pi* || pi), nats, at the minimum over endless pairs")
    print_margins(margins)
    print_ranks()
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_rows(output / "tabular.csv", rows)
        write_rows(output / "tabular_margins.csv", margins)
        draw(rows, output / "tabular.png")


if __name__ == "__main__":
    main()
