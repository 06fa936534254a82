"""What a call must return, in extended precision from the papers' formulas, with its tolerance.

The tolerance follows the error of each step to first order: eps of the result's dtype times the
size of what is rounded, through the derivative of what comes after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import spoloss
from benchmarks.fuzz.calls import Call
from benchmarks.fuzz.libraries import Value


@dataclass(frozen=True)
class Expected:
    """Exact values, and how far a result may be from them; nan where it is not compared."""

    exact: np.ndarray
    error: np.ndarray

    def times(self, factor: Any, eps: float) -> Expected:
        """The product with an array that has been rounded once."""
        product = self.exact * factor
        return Expected(product, np.abs(self.error * factor) + 4.0 * eps * np.abs(product))


def exact(value: Any) -> Any:
    """A number or a `Value` in extended precision."""
    return np.asarray(value.values if isinstance(value, Value) else value, dtype=np.longdouble)


class Reference:
    """The quantities of one call that its results are made of."""

    def __init__(self, call: Call) -> None:
        info = call.library.finfo(call.dtype)
        self.eps, self.tiny, self.max = (float(getattr(info, k)) for k in ("eps", "tiny", "max"))
        self.call, self.options = call, call.options
        self.pc, self.pr, self.rc, self.rr = map(exact, call.logps)
        # XLA reads subnormal numbers as 0.
        self.unread = float(np.finfo("float32").tiny) if call.library.name == "jax" else 0.0
        self.margin = Expected(
            (self.pc - self.rc) - (self.pr - self.rr),
            2.0 * self.eps * sum(abs(v) for v in (self.pc, self.pr, self.rc, self.rr))
            + 4.0 * self.unread,
        )
        default = 0.1 if "loss" not in self.options else np.nan
        self.beta = exact(self.options.get("beta", default))
        gap = self.options.get("reward_gap")
        self.gap = exact(1.0 if gap is None else gap)
        if call.function.startswith("ipo"):
            self.gap = exact(0.5)
        self.b = self.beta / self.gap
        self.x = self.margin.times(self.b, self.eps)
        self.weights = exact(self.options.get("weights", 1.0))

    @property
    def loss(self) -> Any:
        """The loss object whose formulas apply."""
        name = self.call.function.split("_")[0]
        if name == "pair":
            return self.options["loss"]
        if name == "spo":
            return spoloss.SPO(self.options.get("linear_below"))
        if name == "dpo":
            return spoloss.DPO(self.options.get("label_smoothing", 0.0))
        return spoloss.Squared()

    def value(self) -> Expected:
        """Each pair's loss."""
        x, dx, eps = self.x.exact, self.x.error, self.eps
        match self.loss:
            case spoloss.SPO(linear_below=x0):
                near = x if x0 is None else np.maximum(x, x0)
                e, rise = np.exp(-near), x - near
                slope = (near - 1.0) * e
                size = (1.0 + abs(near)) * abs(near) * e + abs(slope * rise)
                error = 3.0 * (1.0 + abs(near)) * e * dx + 8.0 * eps * size
                return Expected(-near * e + slope * rise, error)
            case spoloss.DPO(label_smoothing=smoothing):
                e = np.longdouble(smoothing)
                value = (1 - e) * np.logaddexp(0, -x) + e * np.logaddexp(0, x)
                steep = (1 - e) * _sigmoid(-x) + e * _sigmoid(x)
                return Expected(value, 3.0 * steep * dx + 8.0 * eps * value)
            case _:
                off, error = self._off_target()
                return Expected(off * off, (2.0 * abs(off) + error) * error + 4.0 * eps * off**2)

    def slope(self) -> Expected:
        """Each pair's dl/dh."""
        x, dx, eps, b = self.x.exact, self.x.error, self.eps, self.b
        match self.loss:
            case spoloss.SPO(linear_below=x0):
                near = x if x0 is None else np.maximum(x, x0)
                e = np.exp(-near)
                size = 3.0 * (2.0 + abs(near)) * e * dx + 8.0 * eps * (1.0 + abs(near)) ** 2 * e
                return Expected(b * (near - 1.0) * e, b * size)
            case spoloss.DPO(label_smoothing=smoothing):
                e = np.longdouble(smoothing)
                down, up = (1 - e) * _sigmoid(-x), e * _sigmoid(x)
                error = 8.0 * eps * (down + up) + 3.0 * _sigmoid(x) * _sigmoid(-x) * dx
                return Expected(-b * (down - up), b * error)
            case _:
                off, error = self._off_target()
                return Expected(2.0 * off, 2.0 * error)

    def _off_target(self) -> tuple[Any, Any]:
        target = 1.0 / self.b
        off = self.margin.exact - target
        return off, self.margin.error + self.eps * (4.0 * target + abs(off))

    def weighted(self, of_pair: Expected) -> Expected:
        """Times the weights: exactly 0 at weight 0, whatever the pair holds."""
        shape = self.margin.exact.shape
        weights = np.broadcast_to(self.weights, shape)
        product = of_pair.times(weights, self.eps)
        # Below the smallest normal number, digits are lost or the result is flushed to 0.
        floor = 4.0 * self.tiny * (1.0 + abs(self.x.exact)) * (1.0 + self.b) * (1.0 + abs(weights))
        in_range = abs(of_pair.exact) < self.max / 16.0
        error = np.where((self.x.error < 0.1) & in_range, product.error + floor, np.nan)
        left_out = weights == 0.0
        return Expected(np.where(left_out, 0.0, product.exact), np.where(left_out, 0.0, error))

    def reduced(self, values: Expected, reduction: str) -> Expected:
        """The mean, the sum, or the values themselves."""
        if reduction == "none":
            return values
        count = max(values.exact.size, 1)
        total = np.sum(values.exact)
        error = np.sum(values.error) + 2.0 * count * self.eps * np.sum(abs(values.exact))
        if reduction == "sum":
            return Expected(total, error)
        divisor = values.exact.size or np.nan
        return Expected(total / divisor, error / count + 4.0 * self.eps * abs(total / count))

    def log_slope(self) -> tuple[Expected, Expected]:
        """The sign of dl/dh and the logarithm of its magnitude."""
        slope = self.slope()
        relative = slope.error / abs(slope.exact)
        known = (relative < 0.1) & (self.x.error < 0.1) & (abs(self.x.exact) < 1e4)
        size = np.log(abs(slope.exact))
        error = 2.0 * relative + 16.0 * self.eps * (1.0 + abs(size) + abs(self.x.exact))
        keep = lambda e: np.where(known, e, np.nan)  # noqa: E731
        return Expected(np.sign(slope.exact), keep(0.0)), Expected(size, keep(error))


def _sigmoid(x: Any) -> Any:
    return np.where(x < 0, np.exp(np.minimum(x, 0)), 1.0) / (1.0 + np.exp(-abs(x)))
