"""The losses in 60-digit arithmetic, written from the papers and not from the package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath

from spoloss import DPO, SPO, Squared

mpmath.mp.dps = 60
_LARGE = mpmath.mpf(10) ** 5


@dataclass(frozen=True)
class Truth:
    """Exact value and slope at one margin, and the size that a rounding error scales with."""

    value: Any
    slope: Any
    value_scale: Any
    slope_scale: Any


Oracle = Callable[[float, float], Truth]


@functools.cache
def spo(h: float, beta: float) -> Truth:
    b = mpmath.mpf(beta)
    x = max(min(b * mpmath.mpf(h), _LARGE), -_LARGE)
    e = mpmath.exp(-x)
    return Truth(-x * e, b * (x - 1) * e, abs(x) * e, b * (1 + abs(x)) * e)


def guarded_spo(x0: float) -> Oracle:
    @functools.cache
    def oracle(h: float, beta: float) -> Truth:
        x, at = mpmath.mpf(beta) * mpmath.mpf(h), mpmath.mpf(x0)
        if x >= at:
            return spo(h, beta)
        value, slope = -at * mpmath.exp(-at), (at - 1) * mpmath.exp(-at)
        rise = slope * (x - at)
        scale = abs(value) + abs(rise) + at * at * mpmath.exp(-at)
        return Truth(value + rise, beta * slope, scale, beta * abs(slope))

    return oracle


def dpo(smoothing: float) -> Oracle:
    @functools.cache
    def oracle(h: float, beta: float) -> Truth:
        b, e = mpmath.mpf(beta), mpmath.mpf(smoothing)
        x = b * mpmath.mpf(h)
        near = max(min(x, _LARGE), -_LARGE)
        softplus = lambda t, far: mpmath.log1p(mpmath.exp(t)) + (far - t if far > t > 0 else 0)  # noqa: E731
        agree, flip = softplus(-near, -x), softplus(near, x)
        wrong, right = 1 / (1 + mpmath.exp(near)), 1 / (1 + mpmath.exp(-near))
        value = (1 - e) * agree + e * flip
        slope = -b * ((1 - e) * wrong - e * right)
        return Truth(value, slope, value, b * ((1 - e) * wrong + e * right))

    return oracle


@functools.cache
def squared(h: float, beta: float) -> Truth:
    h, b = mpmath.mpf(h), mpmath.mpf(beta)
    error = h - 1 / b
    if beta == 1:  # then h - 1 rounds once
        return Truth(error**2, 2 * error, error**2, 2 * abs(error))
    return Truth(error**2, 2 * error, (abs(h) + 1 / b) ** 2, 2 * (abs(h) + 1 / b))


LOSSES: dict[str, tuple[Any, Oracle]] = {
    "SPO": (SPO(), spo),
    "SPO, linear below -1": (SPO(linear_below=-1.0), guarded_spo(-1.0)),
    "SPO, linear below 0": (SPO(linear_below=0.0), guarded_spo(0.0)),
    "SPO, linear below 0.7": (SPO(linear_below=0.7), guarded_spo(0.7)),
    "DPO": (DPO(), dpo(0.0)),
    "DPO, smoothing 0.1": (DPO(label_smoothing=0.1), dpo(0.1)),
    "Squared": (Squared(), squared),
}
