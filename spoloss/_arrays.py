"""Floor 0: which library an array is of, shape and dtype checks, compute dtype, reduction.

Nothing in this file knows what a preference is. PyTorch and JAX are looked up in
`sys.modules` and never imported: an array of a library can only exist once that library is
loaded.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy

ArrayT = TypeVar("ArrayT")
"""One array type for a whole call: `torch.Tensor`, `numpy.ndarray`, `jax.Array`, ..."""

REDUCTIONS = ("mean", "sum", "none")


def namespace(array: Any, name: str = "the margin") -> Any:
    """The module that computes on `array`: `torch`, `numpy`, `jax.numpy`, ...

    Raises:
      TypeError: `array` is a list, a number or anything else without a namespace.
    """
    # Two look-ups in place of array-api-compat, which costs more and makes Dynamo warn.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return torch
    if not hasattr(array, "__array_namespace__"):
        raise TypeError(f"{name} must be a PyTorch, NumPy or JAX array, got {type(array).__name__}")
    return array.__array_namespace__()


def is_number(value: Any) -> bool:
    """Whether `value` is a scalar known now, not an array that a compiler may be tracing."""
    return isinstance(value, (int, float, numpy.floating))


def cast(xp: Any, array: Any, dtype: Any) -> Any:
    """`array` in `dtype`, without a copy where it has that dtype already."""
    if array.dtype == dtype:
        return array
    return array.to(dtype) if xp.__name__ == "torch" else xp.astype(array, dtype)


def conform(
    names: tuple[str, ...], values: tuple[Any, ...], *, numbers_from: int
) -> tuple[Any, ...]:
    """The values, as arrays of one library, one shape and one dtype of at least 32 bits.

    Args:
      names: the arguments' names, for messages.
      values: arrays; the first one decides library and shape.
      numbers_from: from this position on a value may be a Python number, which passes through.

    Raises:
      TypeError: an array is of another library, or not real floating.
      ValueError: the shapes differ.
    """
    leader_name, leader = names[0], values[0]
    xp = namespace(leader, leader_name)
    _check_real(xp, leader_name, leader)
    dtype = _compute_dtype(xp, leader.dtype)
    if dtype == leader.dtype and _all_alike(values):
        return values  # the usual case, in every step of a training
    may_be_number = names[numbers_from:]
    arrays = {
        name: value
        for name, value in zip(names, values, strict=True)
        if not (name in may_be_number and is_number(value))
    }
    for name, array in arrays.items():
        _check_kind(xp, name, array, leader_name)
        dtype = _compute_dtype(xp, dtype, array.dtype)
    if any(array.shape != leader.shape for array in arrays.values()):
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
        raise ValueError(f"expected one shape for all, got {shapes}")
    return tuple(
        cast(xp, value, dtype) if name in arrays else float(value)
        for name, value in zip(names, values, strict=True)
    )


def per_pair(name: str, value: Any, like: Any, *, positive: bool = True) -> Any:
    """A parameter that is one number for all or one per element of `like`, in `like`'s dtype.

    Args:
      name: the argument's name, for messages.
      value: a Python number, or an array that is 0-d (a traced number) or of `like`'s shape.
      like: the array whose library, shape and dtype `value` must fit.
      positive: refuse numbers that are not positive and finite. Arrays are never looked into:
        that would wait for the device and stop a compiler.

    Raises:
      TypeError: `value` is an array of another library, or not real floating.
      ValueError: a number out of range, or an array of another shape.
    """
    if is_number(value):
        if positive:
            check_positive(name, value)
        return float(value)
    xp = namespace(like)
    _check_kind(xp, name, value, "the log-probabilities")
    if len(value.shape) > 0 and value.shape != like.shape:
        raise ValueError(
            f"{name} must be a number or have the log-probabilities' shape "
            f"{tuple(like.shape)}, got {tuple(value.shape)}"
        )
    return cast(xp, value, like.dtype)


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not positive and finite.

    Raises:
      ValueError: `value` is 0, negative, infinite or nan.
    """
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_reduction(reduction: str) -> None:
    """Refuse a reduction that does not exist.

    Raises:
      ValueError: `reduction` is not one of REDUCTIONS.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def reduction_scale(values: Any, reduction: str) -> float:
    """What each value counts for: 1 / B under "mean", else 1. An empty mean is nan."""
    if reduction != "mean":
        return 1.0
    count = math.prod(values.shape)
    return 1.0 / count if count else math.nan


def reduce(values: Any, reduction: str) -> Any:
    """Reduce over all elements: their mean, their sum, or ("none") nothing."""
    if reduction == "none":
        return values
    xp = namespace(values)
    return xp.mean(values) if reduction == "mean" else xp.sum(values)


def at_least(xp: Any, x: Any, floor: float) -> Any:
    """max(x, floor), with gradient 0 below `floor` and nan kept."""
    if xp.__name__ == "torch":
        # The same function as clip, whose backward is two slow passes: a compare and a where.
        return xp.threshold(x, floor, floor)
    return xp.clip(x, floor, None)


def log_sigmoid(xp: Any, x: Any) -> Any:
    """log(1 / (1 + e^-x)), with right limits at +-inf."""
    if xp.__name__ == "torch":
        # The second derivative of torch.logaddexp is nan beyond x = 88 in float32: inf / inf.
        return xp.nn.functional.logsigmoid(x)
    return -xp.logaddexp(xp.zeros_like(x), -x)


def detach(array: Any) -> Any:
    """`array` as a constant to the autograd of its library; NumPy has none."""
    xp = namespace(array)
    if xp.__name__ == "torch":
        return array.detach()
    if xp.__name__ == "jax.numpy":
        return sys.modules["jax"].lax.stop_gradient(array)
    return array


def quiet(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a loss reach 0 and inf in NumPy as silently as in PyTorch and JAX."""

    @functools.wraps(method)
    def wrapper(self: Any, margin: Any, beta: Any) -> Any:
        if not isinstance(margin, (numpy.ndarray, numpy.generic)):
            return method(self, margin, beta)
        with numpy.errstate(all="ignore"):
            return method(self, margin, beta)

    return wrapper


def _all_alike(values: tuple[Any, ...]) -> bool:
    leader, *others = values
    kind, dtype, shape = type(leader), leader.dtype, leader.shape
    for value in others:
        if type(value) is not kind or value.dtype != dtype or value.shape != shape:
            return False
    return True


def _check_kind(xp: Any, name: str, array: Any, leader: str) -> None:
    if namespace(array, name) is not xp:
        raise TypeError(
            f"{name} must be of the same library as {leader}, {xp.__name__}; "
            f"got {namespace(array, name).__name__}"
        )
    _check_real(xp, name, array)


def _check_real(xp: Any, name: str, array: Any) -> None:
    is_torch = xp.__name__ == "torch"
    if not (array.is_floating_point() if is_torch else xp.isdtype(array.dtype, "real floating")):
        raise TypeError(f"{name} must be real floating, got {array.dtype}")


def _compute_dtype(xp: Any, dtype: Any, other: Any = None) -> Any:
    if other is not None and other != dtype:
        dtype = (xp.promote_types if xp.__name__ == "torch" else xp.result_type)(dtype, other)
    return dtype if xp.finfo(dtype).bits >= 32 else xp.float32
