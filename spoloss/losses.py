"""Layer 1: the losses as functions of the margin. No other file contains their formulas.

The margin of a pair is h = log[pi(y_w) / pi_ref(y_w)] - log[pi(y_l) / pi_ref(y_l)], in nats
(arXiv:2508.07137v1, eq. 4). It measures how much more the policy pi prefers the chosen completion
y_w over the rejected y_l than the reference pi_ref does. x = beta * h is the implicit reward margin
(eq. 3). Value and slope are elementwise, on arrays of PyTorch, NumPy, JAX, MLX or any other library
that follows the Python array API standard, version 2024.12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from spoloss._arrays import at_least, filled, is_number, namespace, quiet, softplus


class MarginLoss(Protocol):
    """The interface of a loss of the margin. Any object with these two methods implements it.

    Both methods work elementwise. `margin` is an array of shape [B], in nats. `beta` is a float, or
    an array that is 0-d or of the margin's shape, in 1 / nats. For example, in PyTorch:

        class Hinge:
            def value(self, margin, beta):
                return (1 - beta * margin).clamp(min=0)

            def slope(self, margin, beta):
                return -beta * (beta * margin < 1).to(margin)

        loss = pair_loss(Hinge(), chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    """

    def value(self, margin: Any, beta: Any) -> Any:
        """The loss l(h), shape [B]."""

    def slope(self, margin: Any, beta: Any) -> Any:
        """Its derivative dl/dh, shape [B]."""


class PairLoss(Protocol):
    """The interface of a loss of the two log-ratios. Any object with these two methods is one.

    The log-ratio of a completion y is u = log pi(y) - log pi_ref(y), in nats: u_w of the chosen
    completion and u_l of the rejected one. Both methods work elementwise, on arrays of shape [B].
    `beta` is a float, or an array that is 0-d or of shape [B], in 1 / nats. For example, SPPO
    (arXiv:2405.00675) in any library:

        class SPPO:
            def value(self, chosen, rejected, beta):
                return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2

            def slopes(self, chosen, rejected, beta):
                return 2 * (chosen - 0.5 / beta), 2 * (rejected + 0.5 / beta)

        loss = pair_loss(SPPO(), chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    """

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        """The loss l(u_w, u_l), shape [B]."""

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        """Its derivatives dl/du_w and dl/du_l, shape [B] each."""


@dataclass(frozen=True)
class _OfMargin:
    """A loss of the margin as a loss of the two log-ratios: h = u_w - u_l."""

    loss: MarginLoss

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return self.loss.value(chosen - rejected, beta)

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        slope = self.loss.slope(chosen - rejected, beta)
        return slope, -slope


def pairwise(loss: Any) -> PairLoss:
    """A loss of the margin or of the two log-ratios, as the latter.

    Raises:
      TypeError: `loss` is a class, or lacks the methods of a `MarginLoss` or a `PairLoss`.
    """
    if not isinstance(loss, type) and hasattr(loss, "value"):
        if hasattr(loss, "slopes"):
            return loss  # type: ignore[no-any-return]
        if hasattr(loss, "slope"):
            return _OfMargin(loss)
    raise TypeError(
        "loss must be an object with value and slope, such as SPO() or DPO(), or with value and "
        f"slopes, got {loss!r}"
    )


class SignedLog(NamedTuple):
    """A number as sign * exp(log_abs), for magnitudes out of range. For 0: sign 0, log_abs -inf."""

    sign: Any
    log_abs: Any


_VANISHED = -2000.0
"""For z at or below this, e^z is 0 in every float dtype. A finite z makes z * e^z 0, not nan."""


@dataclass(frozen=True)
class SPO:
    """Stable Preference Optimization (SPO), arXiv:2508.07137v1, eq. 6.

        l = -x * e^(-x),   x = beta * h,   with the margin h in nats

    The minimum, -1/e, is at x = 1, which is h = 1 / beta. The loss is convex only for x < 2. For
    x < 0 it grows like |x| * e^|x|. In float32 it overflows near x = -84: the value is then +inf
    and the slope -inf, never nan.

    Attributes:
      linear_below: x0 in (-700, 1), or None. For x < x0 the loss continues along its tangent at x0,
        where dl/dx = -(1 - x0) * e^(-x0). This bounds |dl/dx| everywhere, except that it is e^(-2)
        at x = 2, which is larger if x0 is near 1. Below -700, e^(-x0) would overflow float64. None,
        the default, is equation 6 as published.

    Raises:
      TypeError: `linear_below` is not a number or None.
      ValueError: `linear_below` is outside (-700, 1).
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
        """l(h) = -x * e^(-x), elementwise. It is linear in h for x < linear_below."""
        xp = namespace(margin, "margin")
        z = at_least(xp, margin * -beta, _VANISHED)  # z = -x, so that l = z * e^z
        # Where the curve is inf before the tangent begins, the tangent changes nothing.
        if self._greatest_z > math.log(float(xp.finfo(z.dtype).max)):
            return z * xp.exp(z)
        below, z0 = z > self._greatest_z, filled(z, self._greatest_z)
        # The branch that is not taken must be finite, because 0 * inf in its gradient is nan.
        curve, rise = self._on_the_curve(xp, z), xp.where(below, z - z0, 0.0)
        tangent = xp.exp(z0) * (z0 + (1.0 + z0) * rise)
        return xp.where(below, tangent, curve * xp.exp(curve))

    @quiet
    def slope(self, margin: Any, beta: Any) -> Any:
        """dl/dh = beta * (x - 1) * e^(-x), elementwise. It is constant for x < linear_below."""
        xp = namespace(margin, "margin")
        z = self._on_the_curve(xp, at_least(xp, margin * -beta, _VANISHED))
        return -beta * (1.0 + z) * xp.exp(z)

    @quiet
    def log_slope(self, margin: Any, beta: Any) -> SignedLog:
        """dl/dh as sign and log-magnitude, for margins at which e^(-x) is out of range."""
        xp = namespace(margin, "margin")
        z = self._on_the_curve(xp, margin * -beta)
        factor = -beta * (1.0 + z)
        return SignedLog(xp.sign(factor), xp.log(xp.abs(factor)) + z)

    @property
    def _greatest_z(self) -> float:
        return math.inf if self.linear_below is None else -self.linear_below

    def _on_the_curve(self, xp: Any, z: Any) -> Any:
        """min(z, -linear_below): the point that the tangent touches, where there is a tangent."""
        if self.linear_below is None:
            return z
        return xp.where(z > self._greatest_z, filled(z, self._greatest_z), z)


@dataclass(frozen=True)
class DPO:
    """Direct Preference Optimization (DPO), arXiv:2305.18290, eq. 7.

        l = -(1 - e) * log s(x) - e * log s(-x),   x = beta * h,   s(x) = 1 / (1 + e^(-x))

    h is the margin, in nats. Without smoothing (e = 0) the loss decreases everywhere, towards 0.
    With e > 0 (conservative DPO) its minimum is at x = log((1 - e) / e).

    Attributes:
      label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels.

    Raises:
      TypeError: `label_smoothing` is not a number.
      ValueError: `label_smoothing` is outside [0, 0.5).
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
        """l(h) = -(1 - e) * log s(x) - e * log s(-x), elementwise."""
        xp = namespace(margin, "margin")
        z = margin * -beta  # z = -x, so that -log s(x) = log(1 + e^z)
        e = self.label_smoothing
        if e == 0.0:  # 0 * log s(-inf) would be nan
            return softplus(xp, z)
        return (1.0 - e) * softplus(xp, z) + e * softplus(xp, -z)

    @quiet
    def slope(self, margin: Any, beta: Any) -> Any:
        """dl/dh = -beta * ((1 - e) * s(-x) - e * s(x)), elementwise."""
        x = margin * beta
        e = self.label_smoothing
        return -beta * ((1.0 - e) * _sigmoid(-x) - e * _sigmoid(x))

    @quiet
    def log_slope(self, margin: Any, beta: Any) -> SignedLog:
        """dl/dh as sign and log-magnitude, for margins at which s(-x) is out of range."""
        xp = namespace(margin, "margin")
        if self.label_smoothing > 0.0:
            # With smoothing, |dl/dh| stays in range, because it tends to e * beta.
            slope = self.slope(margin, beta)
            return SignedLog(xp.sign(slope), xp.log(xp.abs(slope)))
        x = margin * beta
        log_beta = xp.log(filled(x, beta) if is_number(beta) else beta)
        return SignedLog(-xp.ones_like(x), log_beta - softplus(xp, x))


@dataclass(frozen=True)
class Squared:
    """Squared error to the target margin: l = (h - 1/beta)^2, arXiv:2508.07137v1, section 2.2.

    h is the margin, in nats. The minimum, 0, is at h = 1 / beta. Identity Preference Optimization
    (IPO, arXiv:2310.12036) has it at 1 / (2 * beta), so it is this loss with twice the beta.
    """

    @quiet
    def value(self, margin: Any, beta: Any) -> Any:
        """l(h) = (h - 1/beta)^2, elementwise."""
        error = margin - 1.0 / beta
        return error * error

    @quiet
    def slope(self, margin: Any, beta: Any) -> Any:
        """dl/dh = 2 * (h - 1/beta), elementwise."""
        return 2.0 * (margin - 1.0 / beta)


def _sigmoid(x: Any) -> Any:
    # Split by sign, so that e^(-|x|) never overflows and neither side loses digits in a difference.
    # abs(x) would not do: at 0 PyTorch gives it the derivative 0, and the sigmoid's is 1/4.
    xp = namespace(x, "margin")
    negative = x < 0.0
    e = xp.exp(xp.where(negative, x, -x))
    return xp.where(negative, e, 1.0) / (1.0 + e)
