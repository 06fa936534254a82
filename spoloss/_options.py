"""Layer 0: checks of the numeric options that the PyTorch and JAX wings share.

The options are plain Python numbers. An array raises an error, because the wings do not
differentiate with respect to these options.
"""

from __future__ import annotations

import math
from typing import Any

import numpy

from spoloss._arrays import check_positive, is_finite, is_number


def check_head_options(
    softcap: float | None, logit_scale: float, temperature: float, chunk_size: int | None
) -> None:
    """Check the options of a language-model head.

        logits = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature

    Args:
      softcap: positive and finite, or None.
      logit_scale: finite and not 0.
      temperature: positive and finite.
      chunk_size: a positive number of tokens, or None.

    Raises:
      TypeError: `softcap`, `logit_scale` or `temperature` is not a number, or `chunk_size` is not
        an integer.
      ValueError: a number is out of range.
    """
    if softcap is not None:
        _check_number("softcap", softcap)
        check_positive("softcap", softcap)
    _check_number("logit_scale", logit_scale)
    if not is_finite(logit_scale) or logit_scale == 0.0:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")
    _check_number("temperature", temperature)
    check_positive("temperature", temperature)
    if chunk_size is not None:
        if not isinstance(chunk_size, (int, numpy.integer)) or isinstance(chunk_size, bool):
            raise TypeError(f"chunk_size must be an integer, got {type(chunk_size).__name__}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive number of tokens, got {chunk_size}")


def check_nll_weight(nll_weight: float) -> None:
    """Check the factor of the negative log-likelihood.

    Raises:
      TypeError: `nll_weight` is not a number.
      ValueError: `nll_weight` is negative, infinite or nan.
    """
    _check_number("nll_weight", nll_weight)
    if not 0.0 <= nll_weight < math.inf:
        raise ValueError(f"nll_weight must be finite and not negative, got {nll_weight}")


def _check_number(name: str, value: Any) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
