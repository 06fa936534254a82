"""The world of the tabular study, its pairs, and the losses as they are used on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import expit, log_softmax

from spoloss import DPO, SPO, MarginLoss, Squared, pair_grad

Array = np.ndarray


# -------------------------------------------------------------------------------------- the world


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


def draw_world(shape: tuple[int, int], rng: np.random.Generator) -> World:
    """A random reference and a random reward of so many prompts and responses."""
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
      beta: the loss's beta, from equation 1's and the pairs' known gaps; the default is the first.
      limit: the implicit reward beta * log(pi / pi_ref) at its minimum over endless pairs, from the
        world and whether labels are noisy; None where the loss has no minimum. The default is the
        optimum's, which is the reward itself.
      reweigh: the pairs as this method counts them, from the pairs and the rewards.
    """

    name: str
    loss: MarginLoss
    beta: Callable[[float, Array], Any] = lambda beta, _: beta
    limit: Callable[[World, bool], Array | None] = lambda world, _: world.reward
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


def per_gap(beta: float, gap: Array) -> Array:
    """A known gap is a beta per pair."""
    return beta / gap


SPO_METHOD = Method("SPO(beta)", SPO(), limit=spo_limit)
UNKNOWN_GAP = (
    Method("DPO(beta)", DPO(), limit=lambda w, noisy: w.reward if noisy else None),
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
    Method("DPO, soft labels s(gap)", DPO(), reweigh=soften),
    Method("SPO, known gap", SPO(), per_gap),
    Method(
        "SPO, known gap, weighted, guarded", SPO(linear_below=0.0), per_gap, reweigh=weigh_by_gap
    ),
    Method("squared, known gap", Squared(), per_gap),
)
