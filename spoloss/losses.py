"""Floor 1: the losses of a margin, and the only formulas of the package.

A pair's margin is h = log(pi/pi_ref)(chosen) - log(pi/pi_ref)(rejected), in nats (paper eq. 4);
x = beta * h is its implicit reward margin (eq. 3). Each loss gives its value l(h) and its slope
dl/dh, elementwise, for any array of PyTorch, NumPy, JAX or another array-API library.

"Paper" is Y. Tan, "A Stable and Principled Loss Function for Direct Language Model Alignment",
12 August 2025; "DPO" is Rafailov et al., arXiv:2305.18290.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from spoloss._arrays import at_least, is_number, log_sigmoid, namespace, quiet


class MarginLoss(Protocol):
    """What a loss of the margin must offer; a class with these two methods is one.

    Both are elementwise. `margin` is an array of shape [B] in nats, `beta` a float or an array of
    the margin's shape, in 1 / nats.
    """

    def value(self, margin: Any, beta: Any) -> Any:
        """The loss l(h), shape [B]."""

    def slope(self, margin: Any, beta: Any) -> Any:
        """Its derivative dl/dh, shape [B]."""


class SignedLog(NamedTuple):
    """A number that no float holds, as sign * exp(log_abs), like `numpy.linalg.slogdet`."""

    sign: Any
    log_abs: Any


_VANISHED = -2000.0
"""e^z is 0 in every float dtype from here down; the bound keeps z finite so that z * 0 is 0."""


@dataclass(frozen=True)
class SPO:
    """Stable Preference Optimization: l = -x * e^(-x), x = beta * h (paper eq. 6).

    Smallest, -1/e, at x = 1. Convex for x < 2 only. To the left of 0 it grows like |x| * e^|x| and
    overflows float32 near x = -84 (to +inf, its slope to -inf; never to nan).

    Attributes:
      linear_below: x0 < 1, or None. For x < x0 the loss continues along its tangent at x0, where
        |dl/dx| is (1 - x0) * e^(-x0); it is nowhere larger, but for the pull back to x = 1, which
        reaches e^(-2) at x = 2. None is equation 6 as published.

    Raises:
      TypeError: `linear_below` is not a number.
      ValueError: `linear_below` lies outside (-700, 1); at -700 e^(-x0) leaves float64.
    """

    linear_below: float | None = None

    def __post_init__(self) -> None:
        x0 = self.linear_below
        if x0 is None:
            return
        if not is_number(x0):
            raise TypeError(f"linear_below must be a number or None, got {type(x0).__name__}")
        if not -700.0 < x0 < 1.0:
            raise ValueError(f"linear_below must lie in (-700, 1), got {x0}")
        # A NumPy scalar would carry its own dtype into the result.
        object.__setattr__(self, "linear_below", float(x0))

    @quiet
    def value(self, margin: Any, beta: Any) -> Any:
        """l(h) = -x * e^(-x)."""
        xp = namespace(margin, "margin")
        z = at_least(xp, margin * -beta, _VANISHED)  # z = -x, so that l = z * e^z
        z0 = self._greatest_z
        if z0 == math.inf or z0 * math.exp(z0) > float(xp.finfo(margin.dtype).max):
            return z * xp.exp(z)  # a tangent of which no value fits the dtype is no other curve
        below = z > z0
        # The side not taken must stay finite: 0 * inf in its gradient would be nan.
        curve, rise = xp.where(below, z0, z), xp.where(below, z - z0, 0.0)
        tangent = math.exp(z0) * (z0 + (1.0 + z0) * rise)
        return xp.where(below, tangent, curve * xp.exp(curve))

    @quiet
    def slope(self, margin: Any, beta: Any) -> Any:
        """dl/dh = beta * (x - 1) * e^(-x)."""
        xp = namespace(margin, "margin")
        z = xp.clip(margin * -beta, _VANISHED, self._greatest_z)
        return -beta * (1.0 + z) * xp.exp(z)

    @quiet
    def log_slope(self, margin: Any, beta: Any) -> SignedLog:
        """dl/dh as sign and log-magnitude, for margins where e^(-x) fits no float."""
        xp = namespace(margin, "margin")
        z = xp.clip(margin * -beta, None, self._greatest_z)
        factor = -beta * (1.0 + z)
        return SignedLog(xp.sign(factor), xp.log(xp.abs(factor)) + z)

    @property
    def _greatest_z(self) -> float:
        return math.inf if self.linear_below is None else -self.linear_below


@dataclass(frozen=True)
class DPO:
    """Direct Preference Optimization: l = -(1-e) * log s(x) - e * log s(-x) (DPO eq. 7).

    s is the logistic function, x = beta * h. Without smoothing the loss falls for every h,
    towards 0.

    Attributes:
      label_smoothing: e in [0, 0.5), the share of labels taken to be flipped (conservative DPO).

    Raises:
      TypeError: `label_smoothing` is not a number.
      ValueError: `label_smoothing` lies outside [0, 0.5).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        e = self.label_smoothing
        if not is_number(e):
            raise TypeError(f"label_smoothing must be a number, got {type(e).__name__}")
        if not 0.0 <= e < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {e}")
        # A NumPy scalar would carry its own dtype into the result.
        object.__setattr__(self, "label_smoothing", float(e))

    @quiet
    def value(self, margin: Any, beta: Any) -> Any:
        """l(h) = -(1-e) * log s(x) - e * log s(-x)."""
        xp = namespace(margin, "margin")
        x = margin * beta
        if self.label_smoothing == 0.0:  # 0 * log s(-inf) would be nan
            return -log_sigmoid(xp, x)
        e = self.label_smoothing
        return (e - 1.0) * log_sigmoid(xp, x) - e * log_sigmoid(xp, -x)

    @quiet
    def slope(self, margin: Any, beta: Any) -> Any:
        """dl/dh = -beta * ((1-e) * s(-x) - e * s(x))."""
        x = margin * beta
        e = self.label_smoothing
        return -beta * ((1.0 - e) * _sigmoid(-x) - e * _sigmoid(x))

    @quiet
    def log_slope(self, margin: Any, beta: Any) -> SignedLog:
        """dl/dh as sign and log-magnitude, for margins where s(-x) fits no float."""
        xp = namespace(margin, "margin")
        if self.label_smoothing > 0.0:
            # Then |dl/dh| stays in range by itself: it tends to e * beta.
            slope = self.slope(margin, beta)
            return SignedLog(xp.sign(slope), xp.log(xp.abs(slope)))
        x = margin * beta
        log_beta = math.log(beta) if is_number(beta) else xp.log(beta)
        return SignedLog(-xp.ones_like(x), log_beta + log_sigmoid(xp, -x))


@dataclass(frozen=True)
class Squared:
    """Squared error to the target: l = (h - 1/beta)^2 (paper 2.2), in nats^2.

    Identity Preference Optimization (IPO) is this loss with twice the beta: its target is
    1 / (2 * beta).
    """

    @quiet
    def value(self, margin: Any, beta: Any) -> Any:
        """l(h) = (h - 1/beta)^2."""
        error = margin - 1.0 / beta
        return error * error

    @quiet
    def slope(self, margin: Any, beta: Any) -> Any:
        """dl/dh = 2 * (h - 1/beta)."""
        return 2.0 * (margin - 1.0 / beta)


def _sigmoid(x: Any) -> Any:
    # Split by sign: e^(-|x|) never overflows, and neither side loses digits to a difference.
    xp = namespace(x)
    e = xp.exp(-xp.abs(x))
    return xp.where(x < 0.0, e, 1.0) / (1.0 + e)
