"""Published losses in about six lines each, for PyTorch, NumPy, JAX and MLX arrays.

Copy the class that you need. `pair_loss`, `pair_grad` and `linear_pair_loss` accept an instance:

    pair_loss(APODown(), *logps, beta=0.1)
    linear_pair_loss(SimPO(gamma=1.0), head, chosen, rejected, 0.0, 0.0, beta=2.0, average=True)

h is the margin in nats, x = beta * h, and s the logistic function. u_w and u_l are the log-ratios
log(pi / pi_ref) of the chosen and the rejected completion, and h = u_w - u_l. The tests compare
every loss with TRL's own code where TRL has it, else with the paper's equation, in value and
gradient. docs/your_own_loss.md has a table of the losses, and the rules for a loss of your own.

Needs: pip install spoloss
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from spoloss import DPO, MarginLoss

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


def bell(x: Any) -> Any:
    """The derivative of s(x), which is s(x) * s(-x)."""
    return sigmoid(x) * sigmoid(-x)


# Losses of the margin


@dataclass(frozen=True)
class Hinge:
    """l = max(0, 1 - x): SLiC-HF (arXiv:2305.10425), and RSO (arXiv:2309.06657) on log-ratios."""

    def value(self, margin: Any, beta: Any) -> Any:
        x = margin * beta
        return namespace(x).where(x >= 1.0, 0.0, 1.0 - x)

    def slope(self, margin: Any, beta: Any) -> Any:
        x, xp = margin * beta, namespace(margin)
        return xp.where(x >= 1.0, xp.zeros_like(x), -beta)


@dataclass(frozen=True)
class RobustDPO:
    """Robust DPO (arXiv:2403.00409): unbiased if a fraction e of labels is flipped, 0 < e < 0.5.

    l = (-(1-e) * log s(x) + e * log s(-x)) / (1 - 2e), which is DPO minus x * e / (1 - 2e).
    """

    flip_rate: float = 0.1

    def value(self, margin: Any, beta: Any) -> Any:
        push = self.flip_rate / (1.0 - 2.0 * self.flip_rate)
        return DPO().value(margin, beta) - push * beta * margin

    def slope(self, margin: Any, beta: Any) -> Any:
        return DPO().slope(margin, beta) - self.flip_rate / (1.0 - 2.0 * self.flip_rate) * beta


@dataclass(frozen=True)
class SimPO:
    """l = -log s(x - gamma) (arXiv:2405.14734), with references of 0.0 and `average=True`."""

    gamma: float = 0.5

    def value(self, margin: Any, beta: Any) -> Any:
        return DPO().value(margin - self.gamma / beta, beta)

    def slope(self, margin: Any, beta: Any) -> Any:
        return DPO().slope(margin - self.gamma / beta, beta)


@dataclass(frozen=True)
class DiscoPOP:
    """l = -log s(x) * s(-x/tau) + e^(-x) * s(x/tau), 0 < tau < 1 (arXiv:2406.08414, eq. 5)."""

    tau: float = 0.05

    def value(self, margin: Any, beta: Any) -> Any:
        # D - D * s(x/tau) is D * s(-x/tau), without inf * 0 at x = -inf.
        x = namespace(margin).clip(margin * beta, -FAR, FAR)
        mixed = log_sigmoid(x) * sigmoid(x / self.tau) + self._exponential(x)
        return DPO().value(margin, beta) + mixed

    def slope(self, margin: Any, beta: Any) -> Any:
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
        x, e = namespace(margin).clip(margin * beta, -FAR, FAR), self.label_smoothing
        chosen, rejected = log_sigmoid(x) - math.log1p(-e), log_sigmoid(-x) - math.log(e)
        return sigmoid(x) * chosen + sigmoid(-x) * rejected

    def slope(self, margin: Any, beta: Any) -> Any:
        x, e = namespace(margin).clip(margin * beta, -FAR, FAR), self.label_smoothing
        return beta * sigmoid(x) * sigmoid(-x) * (x - math.log((1.0 - e) / e))


# Losses of the two log-ratios. a = beta * u_w and b = beta * u_l are the implicit rewards.


@dataclass(frozen=True)
class NCA:
    """l = -log s(a) - (log s(-a) + log s(-b)) / 2 (arXiv:2402.05369)."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        a, b = beta * chosen, beta * rejected
        return -log_sigmoid(a) - 0.5 * (log_sigmoid(-a) + log_sigmoid(-b))

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        a, b = beta * chosen, beta * rejected
        return beta * (0.5 * sigmoid(a) - sigmoid(-a)), 0.5 * beta * sigmoid(b)


@dataclass(frozen=True)
class BCO:
    """l = -log s(a - delta) - log s(delta - b) (arXiv:2404.04656).

    The paper's delta is a running mean of the rewards a and b. TRL 1.16 sets it to 0.
    """

    delta: float = 0.0

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return -log_sigmoid(beta * chosen - self.delta) - log_sigmoid(self.delta - beta * rejected)

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        a, b = beta * chosen, beta * rejected
        return -beta * sigmoid(self.delta - a), beta * sigmoid(b - self.delta)


@dataclass(frozen=True)
class SPPOHard:
    """l = (u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2 (arXiv:2405.00675, hard labels)."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        return 2.0 * (chosen - 0.5 / beta), 2.0 * (rejected + 0.5 / beta)


@dataclass(frozen=True)
class APOZero:
    """l = s(-beta * u_w) + s(beta * u_l): chosen up, rejected down (arXiv:2408.06266, eq. 7)."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return sigmoid(-beta * chosen) + sigmoid(beta * rejected)

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        return -beta * bell(beta * chosen), beta * bell(beta * rejected)


@dataclass(frozen=True)
class APODown:
    """l = s(beta * u_w) + s(-x): both down, the rejected more (arXiv:2408.06266, eq. 8)."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return sigmoid(beta * chosen) + sigmoid(-beta * (chosen - rejected))

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        steep = beta * bell(beta * (chosen - rejected))
        return beta * bell(beta * chosen) - steep, steep


@dataclass(frozen=True)
class DPOP:
    """l = -log s(beta * (h - penalty * max(0, -u_w))): DPO-Positive (arXiv:2402.13228, eq. 3)."""

    penalty: float = 50.0

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return DPO().value(self._margin(chosen, rejected), beta)

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        xp, slope = namespace(chosen), DPO().slope(self._margin(chosen, rejected), beta)
        return slope * xp.where(chosen < 0.0, 1.0 + self.penalty, xp.ones_like(chosen)), -slope

    def _margin(self, chosen: Any, rejected: Any) -> Any:
        below = namespace(chosen).where(chosen < 0.0, -chosen, 0.0)
        return chosen - rejected - self.penalty * below


@dataclass(frozen=True)
class CalDPO:
    """l = -log s(h) + ((u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2) / 2 (arXiv:2412.14516)."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return -log_sigmoid(chosen - rejected) + 0.5 * SPPOHard().value(chosen, rejected, beta)

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        push = sigmoid(rejected - chosen)
        return chosen - 0.5 / beta - push, rejected + 0.5 / beta + push


# Losses of the margin between two scores


@dataclass(frozen=True)
class Scored:
    """l(g(u_w) - g(u_l)): a loss of the margin between scores with `value` g and `slope` dg/du.

    | loss | is |
    |---|---|
    | f-DPO (arXiv:2309.16240), forward KL | Scored(DPO(), Power(-1.0)) |
    | f-DPO, alpha-divergence | Scored(DPO(), Power(alpha - 1.0)) |
    | f-DPO, Jensen-Shannon | Scored(DPO(), JensenShannon()) |
    | chi-PO (arXiv:2407.13399), without its clip | Scored(DPO(), ChiSquared()) |
    | AlphaPO (arXiv:2501.03884) | Scored(SimPO(gamma), Power(-alpha)), like SimPO on averages |
    | ORPO's odds ratio (arXiv:2403.07691) | Scored(DPO(), LogOdds()) with beta=1.0, likewise |
    """

    loss: MarginLoss
    score: Any

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return self.loss.value(self.score.value(chosen) - self.score.value(rejected), beta)

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        margin = self.score.value(chosen) - self.score.value(rejected)
        slope = self.loss.slope(margin, beta)
        return slope * self.score.slope(chosen), -slope * self.score.slope(rejected)


@dataclass(frozen=True)
class Power:
    """g = (e^(k u) - 1) / k, with k not 0."""

    exponent: float

    def value(self, ratio: Any) -> Any:
        return namespace(ratio).expm1(self.exponent * ratio) / self.exponent

    def slope(self, ratio: Any) -> Any:
        return namespace(ratio).exp(self.exponent * ratio)


@dataclass(frozen=True)
class JensenShannon:
    """g = log(2 s(u))."""

    def value(self, ratio: Any) -> Any:
        return math.log(2.0) + log_sigmoid(ratio)

    def slope(self, ratio: Any) -> Any:
        return sigmoid(-ratio)


@dataclass(frozen=True)
class ChiSquared:
    """g = e^u + u."""

    def value(self, ratio: Any) -> Any:
        return namespace(ratio).exp(ratio) + ratio

    def slope(self, ratio: Any) -> Any:
        return namespace(ratio).exp(ratio) + 1.0


@dataclass(frozen=True)
class LogOdds:
    """g = u - log(1 - e^u), for average log-probabilities u < 0. It is constant above -1e-6."""

    def value(self, ratio: Any) -> Any:
        xp = namespace(ratio)
        below = xp.clip(ratio, None, -1e-6)
        return below - xp.log(-xp.expm1(below))

    def slope(self, ratio: Any) -> Any:
        xp = namespace(ratio)
        return xp.where(ratio < -1e-6, -1.0 / xp.expm1(xp.clip(ratio, None, -1e-6)), 0.0)
