"""Five published losses in about six lines each, for PyTorch, NumPy, JAX and MLX arrays.

    python more_losses.py                              # their values and slopes at a few margins

Copy the class that you need. `pair_loss`, `pair_grad` and `linear_pair_loss` accept an instance:

    pair_loss(Hinge(), *logps, beta=0.1)
    linear_pair_loss(SimPO(gamma=1.0), ..., 0.0, 0.0, beta=2.0, average=True)

h is the margin in nats, x = beta * h, s the logistic function. The tests compare every class with
TRL's own code, in value and gradient. docs/your_own_loss.md has the rules for a loss of your own.

Needs: pip install spoloss
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from spoloss import DPO, MarginLoss, pair_grad, pair_loss

FAR = 800.0
"""Beyond |x| = 800, s(x) is 0 or 1 in every float dtype. Clipping x there avoids 0 * inf."""


def namespace(array: Any) -> Any:
    """The module that computes on `array`: torch, numpy, jax.numpy or mlx.core."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    import torch  # its tensors do not have the method

    return torch


def log_sigmoid(x: Any) -> Any:
    """The log of s(x), accurate in both tails, with the right gradient at every x."""
    return -DPO().value(x, 1.0)


def sigmoid(x: Any) -> Any:
    """The logistic function s(x), with the right gradient at every x."""
    return namespace(x).exp(log_sigmoid(x))


@dataclass(frozen=True)
class Hinge:
    """l = max(0, 1 - x): SLiC-HF (arXiv:2305.10425), and RSO (arXiv:2309.06657) on log-ratios."""

    def value(self, margin: Any, beta: Any) -> Any:
        """l(h)."""
        x = margin * beta
        return namespace(x).where(x >= 1.0, 0.0, 1.0 - x)

    def slope(self, margin: Any, beta: Any) -> Any:
        """dl/dh = -beta for x < 1, else 0."""
        x, xp = margin * beta, namespace(margin)
        return xp.where(x >= 1.0, xp.zeros_like(x), -beta)


@dataclass(frozen=True)
class RobustDPO:
    """Robust DPO (arXiv:2403.00409): unbiased if a fraction e of labels is flipped, 0 < e < 0.5.

    l = (-(1-e) * log s(x) + e * log s(-x)) / (1 - 2e), which is DPO minus x * e / (1 - 2e).
    """

    flip_rate: float = 0.1

    def value(self, margin: Any, beta: Any) -> Any:
        """l(h)."""
        return DPO().value(margin, beta) - self._push * beta * margin

    def slope(self, margin: Any, beta: Any) -> Any:
        """dl/dh = DPO's - beta * e / (1 - 2e)."""
        return DPO().slope(margin, beta) - self._push * beta

    @property
    def _push(self) -> float:
        return self.flip_rate / (1.0 - 2.0 * self.flip_rate)


@dataclass(frozen=True)
class SimPO:
    """l = -log s(x - gamma) (arXiv:2405.14734), with references of 0.0 and `average=True`."""

    gamma: float = 0.5

    def value(self, margin: Any, beta: Any) -> Any:
        """l(h)."""
        return DPO().value(margin - self.gamma / beta, beta)

    def slope(self, margin: Any, beta: Any) -> Any:
        """dl/dh = -beta * s(gamma - x)."""
        return DPO().slope(margin - self.gamma / beta, beta)


@dataclass(frozen=True)
class DiscoPOP:
    """l = -log s(x) * s(-x/tau) + e^(-x) * s(x/tau), 0 < tau < 1 (arXiv:2406.08414, eq. 5)."""

    tau: float = 0.05

    def value(self, margin: Any, beta: Any) -> Any:
        """l(h); D - D * s(x/tau) is D * s(-x/tau), without inf * 0 at x = -inf."""
        x = namespace(margin).clip(margin * beta, -FAR, FAR)
        mixed = log_sigmoid(x) * sigmoid(x / self.tau) + self._exponential(x)
        return DPO().value(margin, beta) + mixed

    def slope(self, margin: Any, beta: Any) -> Any:
        """dl/dh, by the product rule."""
        x = namespace(margin).clip(margin * beta, -FAR, FAR)
        logistic, exponential = sigmoid(-x / self.tau), self._exponential(x)
        mixing = (exponential + log_sigmoid(x) * sigmoid(x / self.tau)) * logistic / self.tau
        return beta * (mixing - sigmoid(-x) * logistic - exponential)

    def _exponential(self, x: Any) -> Any:
        # As one power: e^(-x) alone is inf in float32 below x = -88, and inf * 0 is nan.
        return namespace(x).exp(log_sigmoid(x / self.tau) - x)


@dataclass(frozen=True)
class EXO:
    """EXO for pairs (arXiv:2402.00856, eq. 16), with its minimum at x = log((1-e)/e), 0 < e < 0.5.

    l = s(x) * (log s(x) - log(1-e)) + s(-x) * (log s(-x) - log e), a reverse KL divergence.
    """

    label_smoothing: float = 1e-3

    def value(self, margin: Any, beta: Any) -> Any:
        """l(h)."""
        x, e = namespace(margin).clip(margin * beta, -FAR, FAR), self.label_smoothing
        chosen, rejected = log_sigmoid(x) - math.log1p(-e), log_sigmoid(-x) - math.log(e)
        return sigmoid(x) * chosen + sigmoid(-x) * rejected

    def slope(self, margin: Any, beta: Any) -> Any:
        """dl/dh = beta * s(x) * s(-x) * (x - log((1-e)/e))."""
        x, e = namespace(margin).clip(margin * beta, -FAR, FAR), self.label_smoothing
        return beta * sigmoid(x) * sigmoid(-x) * (x - math.log((1.0 - e) / e))


GALLERY: tuple[MarginLoss, ...] = (Hinge(), RobustDPO(), SimPO(), DiscoPOP(), EXO())


if __name__ == "__main__":
    chosen = np.linspace(-40.0, 80.0, 7)
    print("x = 0.1 * h", *(f"{0.1 * h:8.1f}" for h in chosen))
    for loss in GALLERY:
        values = pair_loss(loss, chosen, np.zeros(7), 0.0, 0.0, beta=0.1, reduction="none")
        slopes = pair_grad(loss, chosen, np.zeros(7), 0.0, 0.0, beta=0.1, reduction="none")
        print(f"\n{loss}")
        print("value      ", *(f"{value:8.4f}" for value in values))
        print("slope dl/dh", *(f"{slope:8.4f}" for slope in slopes.policy_chosen))
