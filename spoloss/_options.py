"""Layer 0: checks of the numbers that the PyTorch and the JAX wing both take.

They are plain Python numbers, fixed before any array is touched. An array is refused, because the
wings differentiate nothing by these numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy

from spoloss._arrays import check_positive


def check_head_options(
    softcap: float | None, logit_scale: float, temperature: float, chunk_size: int | None
) -> None:
    """Refuse numbers that no head computes with.

        logits = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature

    Args:
      softcap: positive and finite, or None.
      logit_scale: finite and not 0.
      temperature: positive and finite.
      chunk_size: a positive number of tokens, or None.

    Raises:
      TypeError: one of them is not a number.
      ValueError: one of them is out of range.
    """
    if softcap is not None:
        _check_number("softcap", softcap)
        check_positive("softcap", softcap)
    _check_number("logit_scale", logit_scale)
    if not math.isfinite(logit_scale) or logit_scale == 0.0:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")
    _check_number("temperature", temperature)
    check_positive("temperature", temperature)
    if chunk_size is not None:
        _check_integer("chunk_size", chunk_size)
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive number of tokens, got {chunk_size}")


def check_nll_weight(nll_weight: float) -> None:
    """Refuse a factor of the negative log-likelihood that is negative or not finite.

    Raises:
      TypeError: `nll_weight` is not a number.
      ValueError: `nll_weight` is negative, infinite or nan.
    """
    _check_number("nll_weight", nll_weight)
    if not 0.0 <= nll_weight < math.inf:
        raise ValueError(f"nll_weight must be finite and not negative, got {nll_weight}")


def _check_number(name: str, value: Any) -> None:
    # True is an int to Python, but nobody means temperature=True.
    numbers = (int, float, numpy.integer, numpy.floating)
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, numpy.integer)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
