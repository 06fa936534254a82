"""Layer 0: the library of an array, checks of shape and dtype, compute dtype, reductions.

This file is independent of preference learning. PyTorch and JAX are looked up in `sys.modules` and
never imported, because an array of a library can only exist after that library was loaded.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy

ArrayT = TypeVar("ArrayT")
"""One array type for a whole call: `torch.Tensor`, `numpy.ndarray`, `jax.Array`, `mlx.core.array`
or the array of another library that follows the Python array API standard, version 2024.12."""

REDUCTIONS = ("mean", "sum", "none")

_NUMBERS = (int, float, numpy.integer, numpy.floating)
_P = ParamSpec("_P")
_R = TypeVar("_R")

_CONVERTERS = {"torch": "as_tensor", "mlx.core": "array"}
"""The functions that make arrays, where they are not called asarray."""


def namespace(array: Any, name: str = "the argument", *, or_number: bool = False) -> Any:
    """The module that computes on `array`: `torch`, `numpy`, `jax.numpy`, `mlx.core`, ...

    A TypeError says that the argument `name` has none, and whether a number would do.
    """
    # Two look-ups instead of array-api-compat, which is slower and makes Dynamo warn.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return torch
    if not hasattr(array, "__array_namespace__"):
        kinds = "PyTorch, NumPy, JAX or MLX array" + (" or a number" if or_number else "")
        raise TypeError(f"{name} must be a {kinds}, got {type(array).__name__}")
    return array.__array_namespace__()


def is_number(value: Any) -> bool:
    """Whether `value` is a Python or NumPy number: not an array, a tracer or a boolean."""
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def filled(like: Any, value: float) -> Any:
    """An array of `like`'s shape and dtype with one value."""
    xp = namespace(like)
    if xp.__name__ == "torch":
        # torch.compile makes one graph for all factors, and one for each value of full_like.
        return xp.ones_like(like) * value
    return xp.full_like(like, value)


def cast(xp: Any, array: Any, dtype: Any) -> Any:
    """`array` in `dtype`, without a copy if it already has that dtype."""
    if array.dtype == dtype:
        return array
    return array.to(dtype) if xp.__name__ == "torch" else xp.astype(array, dtype)


def conform(
    names: tuple[str, ...], values: tuple[Any, ...], *, numbers_from: int
) -> tuple[Any, ...]:
    """The values, as arrays of one library, one shape and one dtype of at least 32 bits.

    The first value determines library and shape. From the position `numbers_from` on, a value may
    be a number, which becomes a float. An error names the argument that does not fit.
    """
    leader_name, leader = names[0], values[0]
    xp = namespace(leader, leader_name)
    check_real(xp, leader_name, leader)
    dtype = _compute_dtype(xp, leader.dtype)
    if dtype == leader.dtype and all(_alike(xp, value, leader) for value in values):
        return values  # the usual case, in every training step
    may_be_number = names[numbers_from:]
    arrays = {
        name: value
        for name, value in zip(names, values, strict=True)
        if not (name in may_be_number and is_number(value))
    }
    for name, array in arrays.items():
        _check_kind(xp, name, array, leader_name, or_number=name in may_be_number)
        check_device(xp, name, array, leader_name, leader)
        dtype = _compute_dtype(xp, dtype, array.dtype)
    if any(array.shape != leader.shape for array in arrays.values()):
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
        raise ValueError(f"expected one shape for all, got {shapes}")
    return tuple(
        cast(xp, value, dtype) if name in arrays else float(value)
        for name, value in zip(names, values, strict=True)
    )


def per_pair(name: str, value: Any, like: Any, *, positive: bool = True) -> Any:
    """A parameter that is one number for all pairs, or an array with one number per pair.

    An array is 0-d (a traced number) or of the shape of the log-probabilities `like`. It is
    returned in their dtype but at least float32, so that half precision rounds no parameter. Only
    the range of numbers is checked: reading the values of arrays would synchronise with the device
    and break compilation. An error names the argument.
    """
    if is_number(value):
        if positive:
            check_positive(name, value)
        elif not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
        return float(value)
    xp = namespace(like, "the log-probabilities")
    _check_kind(xp, name, value, "the log-probabilities", or_number=True)
    check_device(xp, name, value, "the log-probabilities", like)
    if len(value.shape) > 0 and value.shape != like.shape:
        raise ValueError(
            f"{name} must be a number or have the log-probabilities' shape "
            f"{tuple(like.shape)}, got {tuple(value.shape)}"
        )
    return cast(xp, value, _compute_dtype(xp, like.dtype))


def check_real(xp: Any, name: str, array: Any) -> None:
    """Raise an error for an array of the library `xp` that is not real floating."""
    if xp.__name__ == "torch":
        real = array.is_floating_point()
    elif xp is numpy:  # whose isdtype raises an error for the dtypes of other packages
        real = numpy.issubdtype(array.dtype, numpy.floating)
    else:
        real = xp.isdtype(array.dtype, "real floating")
    if real:
        return
    half = xp is numpy and array.dtype.name == "bfloat16"
    advice = ". Convert it with astype(numpy.float32)" if half else ""
    raise TypeError(f"{name} must be real floating, got {array.dtype}{advice}")


def check_device(xp: Any, name: str, array: Any, leader_name: str, leader: Any) -> None:
    """Raise an error for a PyTorch tensor that is not on the leader's device."""
    if xp.__name__ != "torch" or array.device == leader.device:
        return
    if array.ndim == 0 and array.device.type == "cpu":
        return  # PyTorch treats it as a number on any device
    raise ValueError(f"{name} must be on the {leader.device} of {leader_name}, got {array.device}")


def check_positive(name: str, value: float) -> None:
    """Raise an error for a number that is not positive and finite."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_reduction(reduction: str) -> None:
    """Raise an error for an unknown reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def reduction_scale(values: Any, reduction: str) -> float:
    """The factor of each value in the reduced result: 1 / B for "mean" (nan for B = 0), else 1.

    It depends on the shape, so a graph that is compiled for all shapes must not contain it.
    """
    if reduction != "mean":
        return 1.0
    count = math.prod(values.shape)
    return 1.0 / count if count else math.nan


def shares(values: Any, reduction: str) -> Any:
    """Each value's part of the reduced result: the value / B for "mean", else the value."""
    xp = namespace(values)
    if reduction == "mean" and xp.__name__ == "mlx.core" and 0 not in values.shape:
        # mx.compile(shapeless=True) runs its graph on other shapes than the one that it traced.
        return values / xp.sum(xp.logical_or(xp.isnan(values), True))
    return values * reduction_scale(values, reduction)


def quiet(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function return inf and nan in NumPy without a warning, as in the other libraries.

    The second argument of `function` must be an array: the library of all arrays is read from it.
    """

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for value in args[1:2] or kwargs.values():
            if isinstance(value, (numpy.ndarray, numpy.generic)):
                with numpy.errstate(all="ignore"):
                    return function(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def reduce(values: Any, reduction: str) -> Any:
    """The mean of all elements (nan if there are none), their sum, or for "none" the elements."""
    if reduction == "none":
        return values
    xp = namespace(values)
    if xp.__name__ == "mlx.core" and 0 in values.shape:
        # The sum of an empty float64 array does not return on the CPU (MLX 0.32).
        return xp.array(0.0 if reduction == "sum" else math.nan, dtype=values.dtype)
    if reduction == "sum":
        return xp.sum(values)
    if xp is numpy:
        return xp.sum(values) / math.prod(values.shape)  # numpy.mean warns about an empty array
    return xp.mean(values)


def at_least(xp: Any, x: Any, floor: float) -> Any:
    """max(x, floor), with gradient 0 below `floor`. nan stays nan."""
    if xp.__name__ == "torch":
        # The same function as clip, but the backward of clip is two slow passes.
        return xp.threshold(x, floor, floor)
    return xp.clip(x, floor, None)


def softplus(xp: Any, x: Any) -> Any:
    """log(1 + e^x), which is -log(logistic(-x)), with the right limits at +-inf."""
    if xp.__name__ == "torch":
        # Above 80 it equals x in float64, and e^x still fits in float32. The second derivative of
        # torch.logaddexp is nan there.
        return xp.nn.functional.softplus(x, threshold=80.0)
    if xp.__name__ == "mlx.core":
        # The derivative of mx.logaddexp is 1 minus a sigmoid, so small derivatives lose digits.
        positive = x > 0.0
        return xp.where(positive, x, 0.0) + xp.log1p(xp.exp(xp.where(positive, -x, x)))
    return xp.logaddexp(xp.zeros_like(x), x)


def averages(sums: Any, lengths: Any) -> Any:
    """Sums over tokens divided by their lengths. A sequence without tokens, of sum 0, stays 0."""
    xp = namespace(sums)
    lengths = cast(xp, lengths, sums.dtype)
    return sums / xp.where(lengths == 0.0, 1.0, lengths)


def detach(array: Any) -> Any:
    """`array` as a constant for automatic differentiation, if its library has that."""
    xp = namespace(array)
    if xp.__name__ == "torch":
        return array.detach()
    if xp.__name__ == "jax.numpy":
        return sys.modules["jax"].lax.stop_gradient(array)
    if xp.__name__ == "mlx.core":
        return xp.stop_gradient(array)
    return array


def _alike(xp: Any, a: Any, b: Any) -> bool:
    same = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
    return same and (xp.__name__ != "torch" or a.device == b.device)


def _check_kind(xp: Any, name: str, array: Any, leader: str, *, or_number: bool) -> None:
    other = namespace(array, name, or_number=or_number)
    if other is not xp:
        converter = f"{xp.__name__}.{_CONVERTERS.get(xp.__name__, 'asarray')}"
        raise TypeError(
            f"{name} must be from the same library as {leader}, {xp.__name__}, "
            f"got {other.__name__}. Convert it with {converter}"
        )
    check_real(xp, name, array)


def _compute_dtype(xp: Any, dtype: Any, other: Any = None) -> Any:
    # By width, because JAX can be told to refuse promotion (jax_numpy_dtype_promotion="strict").
    if other is not None and xp.finfo(other).bits > xp.finfo(dtype).bits:
        dtype = other
    return dtype if xp.finfo(dtype).bits >= 32 else xp.float32
