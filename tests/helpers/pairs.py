"""Batches of pairs, and the public functions of four log-probabilities by name."""

from __future__ import annotations

from typing import Any

import numpy as np

import spoloss
from spoloss import DPO, SPO, Squared
from spoloss._arrays import namespace, quiet


class IPO:
    """IPO from its paper, and not by way of `Squared`."""

    def value(self, margin: Any, beta: Any) -> Any:
        return (margin - 1.0 / (2.0 * beta)) ** 2

    def slope(self, margin: Any, beta: Any) -> Any:
        return 2.0 * margin - 1.0 / beta


class TwoSided:
    """A loss whose slopes are neither equal nor opposite, and that overflows like SPO."""

    @quiet
    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        xp = namespace(chosen)
        return xp.exp(-beta * chosen) + beta * rejected * rejected

    @quiet
    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        return -beta * namespace(chosen).exp(-beta * chosen), 2.0 * beta * rejected


FUNCTIONS = {
    "spo": (spoloss.spo_loss, spoloss.spo_grad, SPO()),
    "dpo": (spoloss.dpo_loss, spoloss.dpo_grad, DPO()),
    "squared": (spoloss.squared_loss, spoloss.squared_grad, Squared()),
    "ipo": (spoloss.ipo_loss, spoloss.ipo_grad, IPO()),
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
