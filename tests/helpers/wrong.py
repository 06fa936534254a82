"""Deliberately wrong losses. Every check of the suite must fail on some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spoloss import SPO
from spoloss._arrays import detach, namespace, quiet
from spoloss.losses import PairLoss, pairwise

_RIGHT = SPO()


class FlippedSign:
    """+x * e^(-x): value and slope agree with each other and are both wrong."""

    def value(self, margin: Any, beta: Any) -> Any:
        return -_RIGHT.value(margin, beta)

    def slope(self, margin: Any, beta: Any) -> Any:
        return -_RIGHT.slope(margin, beta)


class LostBeta:
    """The slope by x and not by h."""

    def value(self, margin: Any, beta: Any) -> Any:
        return _RIGHT.value(margin, beta)

    def slope(self, margin: Any, beta: Any) -> Any:
        return _RIGHT.slope(margin, beta) / beta


class WrongPolynomial:
    """(x + 1) in place of (x - 1)."""

    def value(self, margin: Any, beta: Any) -> Any:
        return _RIGHT.value(margin, beta)

    @quiet
    def slope(self, margin: Any, beta: Any) -> Any:
        x = margin * beta
        return beta * (x + 1.0) * namespace(margin).exp(-x)


class StrayDetach:
    """e^(-x) cut off from autograd: right value, right slope, wrong gradient."""

    def value(self, margin: Any, beta: Any) -> Any:
        x = margin * beta
        return -x * detach(namespace(margin).exp(-x))

    def slope(self, margin: Any, beta: Any) -> Any:
        return _RIGHT.slope(margin, beta)


class SinglePrecision:
    """float64 rounded to float32 on the way."""

    def value(self, margin: Any, beta: Any) -> Any:
        return self._round(_RIGHT.value(margin, beta), margin)

    def slope(self, margin: Any, beta: Any) -> Any:
        return self._round(_RIGHT.slope(margin, beta), margin)

    def _round(self, array: Any, like: Any) -> Any:
        if isinstance(array, torch.Tensor):
            return array.to(torch.float32).to(like.dtype)
        return array.astype(np.float32).astype(like.dtype)


class Naive:
    """Equation 6 as it stands on paper: nan at inf."""

    @quiet
    def value(self, margin: Any, beta: Any) -> Any:
        x = margin * beta
        return -x * namespace(margin).exp(-x)

    @quiet
    def slope(self, margin: Any, beta: Any) -> Any:
        x = margin * beta
        return beta * (x - 1.0) * namespace(margin).exp(-x)


@dataclass(frozen=True)
class Clamped:
    """A silent clamp of the margin: finite everywhere, and flat where it should climb."""

    def value(self, margin: Any, beta: Any) -> Any:
        return _RIGHT.value(namespace(margin).clip(margin, -20.0, None), beta)

    def slope(self, margin: Any, beta: Any) -> Any:
        return _RIGHT.slope(namespace(margin).clip(margin, -20.0, None), beta)


Method = Callable[[PairLoss, Any, Any, Any], Any]


@dataclass(frozen=True)
class Broken:
    """A right loss of the two log-ratios with something wrong in it."""

    loss: PairLoss
    value_of: Method
    slopes_of: Method

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return self.value_of(self.loss, chosen, rejected, beta)

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        return self.slopes_of(self.loss, chosen, rejected, beta)  # type: ignore[no-any-return]


def _value(loss: PairLoss, c: Any, r: Any, b: Any) -> Any:
    return loss.value(c, r, b)


def _slopes(loss: PairLoss, c: Any, r: Any, b: Any) -> Any:
    return loss.slopes(c, r, b)


def _times(factor: Any, slopes: tuple[Any, Any]) -> tuple[Any, Any]:
    return factor * slopes[0], factor * slopes[1]


CONSISTENT: dict[str, tuple[Method, Method]] = {
    "sign": (
        lambda m, c, r, b: -m.value(c, r, b),
        lambda m, c, r, b: _times(-1.0, m.slopes(c, r, b)),
    ),
    "sides swapped": (
        lambda m, c, r, b: m.value(r, c, b),
        lambda m, c, r, b: m.slopes(r, c, b)[::-1],
    ),
    "beta lost": (
        lambda m, c, r, _: m.value(c, r, 1.0),
        lambda m, c, r, _: m.slopes(c, r, 1.0),
    ),
}
"""Wrong in value and slopes alike: no check of the one against the other sees these."""

INCONSISTENT: dict[str, tuple[Method, Method]] = {
    "sign of the slopes": (_value, lambda m, c, r, b: _times(-1.0, m.slopes(c, r, b))),
    "one slope lost": (_value, lambda m, c, r, b: (m.slopes(c, r, b)[0], 0.0 * r)),
    "value cut": (lambda m, c, r, b: m.value(detach(c), r, b) + 0.0 * c, _slopes),
}


def broken(loss: Any) -> dict[str, Broken]:
    """All of them, of one loss."""
    every = CONSISTENT | INCONSISTENT
    return {what: Broken(pairwise(loss), *methods) for what, methods in every.items()}
