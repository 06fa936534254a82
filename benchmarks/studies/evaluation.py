"""How good a policy is: win rates, margins, and the limits of what any loss can reach."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.studies.training import Pairs, Policy, pair_logps
from spoloss import log_ratio_margin, preference_metrics

QUANTILES = (0.1, 0.5, 0.9)
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
OPTIMUM_BETAS = (4.0, 2.0, 1.4, 1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15)
LEAST_EFFECTIVE_SAMPLES = 35.0
LEAST_SAMPLES_OF_EACH = 4
"""Of M texts, best of n is told for n up to M / 4."""


# -------------------------------------------------------------------------------------- win rates


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How often a text of ours has the greater reward, ties counted half.

    Args:
      ours: rewards [P, n] of n texts for each of P prompts.
      theirs: rewards [P, m] for the same prompts.

    Returns:
      The mean over prompts and over all pairs of texts of unequal number; nan if a reward is.
    """
    if np.isnan(ours).any() or np.isnan(theirs).any():
        return math.nan
    a, b = ours[:, :, None], theirs[:, None, :]
    wins = (a > b) + 0.5 * (a == b)
    return float(wins[:, unequal_numbers(ours, theirs)].mean())


def tie_rate(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How often two texts that a win rate compares have the same reward."""
    ties = ours[:, :, None] == theirs[:, None, :]
    return float(ties[:, unequal_numbers(ours, theirs)].mean())


def unequal_numbers(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """All pairs of texts but those of the same number, booleans [n, m]."""
    return ~np.eye(ours.shape[1], theirs.shape[1], dtype=bool)


# ---------------------------------------------------------------------------------------- margins


def measure_pairs(policy: Policy, pairs: Pairs, beta: float) -> dict[str, float]:
    """Implicit reward margins x = beta * h of pairs, and how far their log-probabilities moved."""
    pc, pr, rc, rr = (tensor.double() for tensor in pair_logps(policy, pairs))
    x = beta * log_ratio_margin(pc, pr, rc, rr)
    metrics = preference_metrics(pc, pr, rc, rr, beta=beta)
    low, median, high = torch.quantile(x, torch.tensor(QUANTILES, dtype=x.dtype)).tolist()
    return {
        "x_mean": metrics["rewards/margins"].item(),
        "x_sd": x.std().item(),
        "x_q10": low,
        "x_q50": median,
        "x_q90": high,
        "x_below_0": metrics["rewards/margins_below_0"].item(),
        "x_above_1": metrics["rewards/margins_above_1"].item(),
        "x_near_1": ((x - 1.0).abs() <= 0.1).double().mean().item(),
        "accuracy": metrics["rewards/accuracies"].item(),
        "dlogp_chosen": (metrics["logps/chosen"] - rc.mean()).item(),
        "dlogp_rejected": (metrics["logps/rejected"] - rr.mean()).item(),
    }


# ----------------------------------------------------------------------------------------- limits


class Limit(NamedTuple):
    """A point of a curve that no loss is behind; `kl` is in nats.

    "optimum" is pi_ref * e^(r / beta) at beta = parameter. "best of n" keeps the best of n =
    parameter texts of the reference, and its kl is the upper bound log n - (n - 1) / n.
    `effective_samples` are those of the prompt where the weights leave fewest.
    """

    curve: str
    parameter: float
    reward: float
    kl: float
    effective_samples: float


def find_limits(rewards: np.ndarray) -> list[dict[str, object]]:
    """The optimum and best of n, from rewards [P, M] of M texts of the reference a prompt."""
    optimum = [tilt(rewards, beta) for beta in OPTIMUM_BETAS]
    kept = [limit for limit in optimum if limit.effective_samples >= LEAST_EFFECTIVE_SAMPLES]
    enough = rewards.shape[1] // LEAST_SAMPLES_OF_EACH
    best = [best_of(rewards, n) for n in BEST_OF if n <= enough]
    return [limit._asdict() for limit in (*kept, *best)]


def tilt(rewards: np.ndarray, beta: float) -> Limit:
    """The exact optimum of the regularised objective, by importance weights e^(r / beta)."""
    scaled = rewards / beta
    greatest = scaled.max(1, keepdims=True)
    weights = np.exp(scaled - greatest)
    log_partition = np.log(weights.mean(1)) + greatest[:, 0]
    weights /= weights.sum(1, keepdims=True)
    mean = (weights * rewards).sum(1)
    kl = mean / beta - log_partition
    effective = 1.0 / (weights**2).sum(1)
    return Limit("optimum", beta, float(mean.mean()), float(kl.mean()), float(effective.min()))


def best_of(rewards: np.ndarray, n: int) -> Limit:
    """The best of n texts: the expected greatest of n draws from the texts at hand."""
    ordered = np.sort(rewards, axis=1)
    rank = np.arange(rewards.shape[1] + 1) / rewards.shape[1]
    greatest = (ordered * np.diff(rank**n)).sum(1)
    kl = math.log(n) - (n - 1) / n
    return Limit("best of n", n, float(greatest.mean()), kl, rewards.shape[1] / n)
