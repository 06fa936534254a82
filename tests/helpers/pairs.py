"""Batches of pairs, and the public functions of four log-probabilities by name."""

from __future__ import annotations

import numpy as np

import spoloss
from spoloss import DPO, SPO, Squared

FUNCTIONS = {
    "spo": (spoloss.spo_loss, spoloss.spo_grad, SPO()),
    "dpo": (spoloss.dpo_loss, spoloss.dpo_grad, DPO()),
    "squared": (spoloss.squared_loss, spoloss.squared_grad, Squared()),
}

NAMES = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
)


def four(seed: int = 0, size: int = 5, dtype: type = np.float64) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=size) * 6.0 - 40.0).astype(dtype) for _ in range(4)]
