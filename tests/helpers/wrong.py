"""Deliberately wrong losses, which `check_loss` must refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from spoloss import SPO
from spoloss._arrays import detach, namespace, quiet

_RIGHT = SPO()


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
