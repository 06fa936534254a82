"""Layer 0: checks of the numeric options that the PyTorch and JAX wings share.

The options are plain Python numbers. An array raises an error, because the wings do not
differentiate with respect to these options.
"""

from __future__ import annotations

import math
from typing import Any

import numpy

from spoloss._arrays import check_positive, is_number


def check_head_options(
    softcap: float | None, logit_scale: float, temperature: float, chunk_size: int | None
) -> None:
    """Raise an error for options of a head of another type, or out of range."""
    if softcap is not None:
        _check_number("softcap", softcap)
        check_positive("softcap", softcap)
    _check_number("logit_scale", logit_scale)
    if not -math.inf < logit_scale < math.inf or logit_scale == 0.0:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")
    _check_number("temperature", temperature)
    check_positive("temperature", temperature)
    if chunk_size is not None:
        _check_integer("chunk_size", chunk_size)
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive number of tokens, got {chunk_size}")


def check_token_options(prefix: str, ignore_index: int, shift: bool) -> None:
    """Raise an error for options of labels of another type. `prefix` precedes their names."""
    _check_integer(f"{prefix}ignore_index", ignore_index)
    check_flag(f"{prefix}shift", shift)


def check_flag(name: str, value: bool) -> None:
    """Raise an error for anything but True and False, which would count as one of them."""
    if not isinstance(value, (bool, numpy.bool)):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_nll_weight(nll_weight: float) -> None:
    """Raise an error for a factor of the negative log-likelihood that is not finite and >= 0."""
    _check_number("nll_weight", nll_weight)
    if not 0.0 <= nll_weight < math.inf:
        raise ValueError(f"nll_weight must be finite and not negative, got {nll_weight}")


def _check_number(name: str, value: Any) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_integer(name: str, value: Any) -> None:
    if not isinstance(value, (int, numpy.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
