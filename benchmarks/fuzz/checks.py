"""One generated call against what the documentation promises."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np

from benchmarks.fuzz import calls, faults, outcomes
from benchmarks.fuzz.libraries import Value
from benchmarks.fuzz.reference import Expected, Reference

_ROUNDING = {"float16": (1e-3, 1e-7), "bfloat16": (1e-2, 1e-37), "float32": (6e-8, 1e-37)}
"""By dtype, the relative error of a rounded number, and the largest number that may become 0."""


class Finding(AssertionError):
    """Something that the documentation does not promise."""


def check_refusal(rng: random.Random, call: calls.Call) -> None:
    """One wrong argument: TypeError or ValueError, and its message names the argument."""
    name, arguments = faults.spoil(rng, call)
    wrong = f"{name} = {arguments[name]!r}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            calls.run(call.function, arguments)
    except (TypeError, ValueError) as error:
        if name not in str(error):
            raise Finding(f"{wrong}: the message does not name it: {error}") from error
        return
    except Exception as error:
        raise Finding(f"{wrong}: {type(error).__name__}: {error}") from error
    raise Finding(f"{wrong}: accepted")


def check_result(call: calls.Call) -> int:
    """A right call: its results, their dtype and shape, and untouched arguments.

    Returns:
      How many values were compared.
    """
    arguments = call.arguments()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = calls.run(call.function, arguments)
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}") from error
    got, want = outcomes.named(call, result), outcomes.expected(call)
    if got.keys() != want.keys():
        raise Finding(f"returned {list(got)}, expected {list(want)}")
    compared = sum(_compare(call, name, call.library.read(got[name]), want[name]) for name in want)
    _untouched(call, arguments)
    differentiable = call.function.endswith("_loss") and call.library.name in ("torch", "mlx")
    return compared + (_check_autograd(call, arguments) if differentiable else 0)


def _compare(call: calls.Call, name: str, got: np.ndarray, want: Expected) -> int:
    dtype = call.dtype
    if str(got.dtype) != dtype:
        raise Finding(f"{name} is {got.dtype}, expected {dtype}")
    exact, error = np.broadcast_arrays(want.exact, want.error)
    if got.shape != exact.shape:
        raise Finding(f"{name} has shape {got.shape}, expected {exact.shape}")
    finite = _all_finite(call)
    with np.errstate(all="ignore"):
        largest = float(call.library.finfo(dtype).max)
        inside = np.abs(exact) + error < largest / 16.0
        known = ~np.isnan(error) & ~np.isnan(exact) & inside
        wrong = known & ~(np.abs(got.astype(np.longdouble) - exact) <= error)
    if finite and call.options.get("reduction") == "none" and np.isnan(got).any():
        raise Finding(f"{name} = {got} from finite arguments, expected {exact}")
    if wrong.any():
        off = f"{got[wrong][0]!r}, expected {exact[wrong][0]!r} within {error[wrong][0]:.2g}"
        raise Finding(f"{name} = {off}")
    return int(known.sum())


def _all_finite(call: calls.Call) -> bool:
    return all(np.isfinite(v.values).all() for v in call.logps if isinstance(v, Value))


def _untouched(call: calls.Call, arguments: dict[str, Any]) -> None:
    for name, value in {**dict(zip(calls.LOGPS, call.logps, strict=True)), **call.options}.items():
        if not isinstance(value, Value) or value.dtype != "float64":
            continue
        if not np.array_equal(call.library.read(arguments[name]), value.values, equal_nan=True):
            raise Finding(f"{name} was changed")


def _check_autograd(call: calls.Call, arguments: dict[str, Any]) -> int:
    """The derivative by the chosen log-probabilities is the slope times the weight."""
    chosen = arguments[calls.LOGPS[0]]

    def total(chosen: Any) -> Any:
        return calls.run(call.function, {**arguments, calls.LOGPS[0]: chosen}).sum()

    if call.library.name == "torch":
        import torch

        chosen = chosen.requires_grad_()
        (grad,) = torch.autograd.grad(total(chosen), chosen)
        grad = grad.float() if grad.dtype == torch.bfloat16 else grad
    else:
        if call.logps[0].dtype in ("float16", "bfloat16"):
            return 0  # rounded to half precision by the library
        import mlx.core as mx

        grad = mx.grad(total)(chosen)
    got = call.library.read(grad)
    with np.errstate(all="ignore"):
        reference = Reference(call)
        want, value = outcomes.by_logps(reference)["policy_chosen"], reference.value()
        # The value's intermediate results must be in range for its derivative to be.
        largest = float(call.library.finfo(call.dtype).max)
        fits = np.abs(value.exact) * (1.0 + abs(reference.x.exact)) < largest / 16.0
        # A gradient has the dtype of its argument, which may be narrower than that of the loss.
        relative, least = _ROUNDING.get(call.logps[0].dtype, (0.0, 0.0))
        error = 4.0 * want.error + relative * np.abs(want.exact) + least
        known = fits & ~np.isnan(error) & (np.abs(want.exact) < 6e4)
        wrong = known & ~(np.abs(got.astype(np.longdouble) - want.exact) <= error)
    if wrong.any():
        off = f"{got[wrong][0]!r}, expected {want.exact[wrong][0]!r} within {error[wrong][0]:.2g}"
        raise Finding(f"derivative by policy_chosen_logps = {off}")
    return int(known.sum())
