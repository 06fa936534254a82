"""How good a policy is: win rates and margins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.studies.training import Pairs
from spoloss import log_ratio_margin, preference_metrics

if TYPE_CHECKING:
    from benchmarks.studies.pretrained import TopBlocks

QUANTILES = (0.1, 0.5, 0.9)


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


@torch.no_grad()
def measure_pairs(policy: TopBlocks, pairs: Pairs, beta: float) -> dict[str, float]:
    """Implicit reward margins x = beta * h of pairs, and how far their log-probabilities moved."""
    logps = (*policy.logps(pairs.inputs).chunk(2), *pairs.references)
    pc, pr, rc, rr = (tensor.double() for tensor in logps)
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
