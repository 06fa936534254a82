"""Layer 4: `check_loss`, which checks a loss of your own against the rules of its protocol."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from spoloss.losses import MarginLoss, PairLoss, pairwise

__all__ = ["check_loss"]

# Training starts at 0. The other numbers are odd, so that none lies on a kink of a usual loss.
_LOG_RATIOS = (-19.73, -3.141, -0.717, 0.0, 0.433, 2.236, 11.09)
_POINTS = tuple(itertools.product(_LOG_RATIOS, _LOG_RATIOS))
_BETAS = (0.0517, 0.313, 1.0, 2.519)
_SLOPES = ("the slope with respect to chosen", "the slope with respect to rejected")
_INFINITIES = ((numpy.inf, 0.3), (-numpy.inf, 0.3), (0.3, numpy.inf), (0.3, -numpy.inf))


def check_loss(loss: MarginLoss | PairLoss, *, limits: bool = False) -> None:
    """Check a loss of your own, in PyTorch and in JAX where they are installed.

    These are the rules, for a loss of the margin (`value` and `slope`) as for a loss of the two
    log-ratios (`value` and `slopes`):

    - Value and slopes have the shape and dtype of the log-ratios, in float32 and in float64.
    - The slopes are the derivatives of the value: by automatic differentiation, at 0 too, where
      training starts; and by differences, which no `detach` misleads.
    - `beta` may be a number, a 0-d array, or an array with one number per pair.
    - The loss of a pair does not depend on the other pairs.
    - Value and slopes do not read numbers out of arrays (an `if`, `.item()`), which would break
      `torch.compile`, `torch.vmap` and `jax.jit`.

    They are checked at log-ratios between -20 and 11 and betas between 0.05 and 2.5. A point at
    which the value is not finite is outside the domain of the loss, and is left out. A library
    whose arrays `value` does not accept is left out, but one must accept them. JAX checks float64
    only under `jax_enable_x64`.

    A formula that is wrong in value and slopes alike passes. Compare it with published code.

    Args:
      loss: An instance of your class (see `spoloss.MarginLoss` and `spoloss.PairLoss`).
      limits: Whether to check too that value and slopes are not nan when a log-ratio is infinite,
        as after a forbidden token. The losses of this package have such limits, but some published
        losses do not.

    Raises:
      TypeError: `loss` is not a loss object.
      ImportError: Neither PyTorch nor JAX is installed.
      AssertionError: A rule is broken. The message says which, and where.
    """
    of_pairs, refused = pairwise(loss), []
    libraries = [make() for name, make in _LIBRARIES.items() if importlib.util.find_spec(name)]
    if not libraries:
        raise ImportError('check_loss needs PyTorch or JAX: pip install "spoloss[torch]"')
    for library in libraries:
        one = library.array([0.5], "float32")
        try:
            of_pairs.value(one, one, 1.0)
        except (TypeError, AttributeError) as error:
            refused.append(f"{library.name}: {error}")
            continue
        for dtype in library.dtypes:
            case = _Case(loss, of_pairs, library, dtype)
            _check_form(case)
            _check_derivatives(case)
            _check_betas(case)
            _check_alone(case)
            if limits:
                _check_limits(case)
        _check_tracing(case)
    if len(refused) == len(libraries):
        raise AssertionError(
            f"{loss}: value accepts the arrays of no library. {'; '.join(refused)}"
        )


@dataclass(frozen=True)
class _Library:
    """What the checks need of PyTorch or JAX."""

    name: str
    dtypes: tuple[str, ...]
    array: Callable[[Any, str], Any]
    gradients: Callable[[Callable[[Any, Any], Any], Any, Any], tuple[Any, Any]]
    """The derivatives of a 0-d function of two arrays."""
    trace: Callable[[Callable[[Any, Any], Any], Any, Any], Any]
    """Calls a function with arguments out of which no number can be read."""


def _torch() -> _Library:
    torch = importlib.import_module("torch")

    def gradients(function: Any, chosen: Any, rejected: Any) -> Any:
        with torch.enable_grad():
            inputs = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
            return torch.autograd.grad(function(*inputs), inputs, materialize_grads=True)

    return _Library(
        "torch",
        ("float32", "float64"),
        lambda numbers, dtype: torch.tensor(numbers, dtype=getattr(torch, dtype)),
        gradients,
        lambda function, *arrays: torch.func.vmap(function)(*arrays),
    )


def _jax() -> _Library:
    jax = importlib.import_module("jax")
    return _Library(
        "jax",
        ("float32", "float64") if jax.config.jax_enable_x64 else ("float32",),
        lambda numbers, dtype: jax.numpy.asarray(numbers, dtype),
        lambda function, *arrays: jax.grad(function, (0, 1))(*arrays),
        lambda function, *arrays: jax.jit(function)(*arrays),
    )


_LIBRARIES = {"torch": _torch, "jax": _jax}


@dataclass(frozen=True)
class _Case:
    """A loss, in a library and a dtype."""

    given: Any
    loss: PairLoss
    library: _Library
    dtype: str

    def arrays(self, points: Sequence[tuple[float, float]] = _POINTS) -> tuple[Any, Any]:
        chosen, rejected = zip(*points, strict=True)
        return self.library.array(chosen, self.dtype), self.library.array(rejected, self.dtype)

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Value and slopes, by the names that messages use."""
        return {
            "value": self.loss.value,
            _SLOPES[0]: lambda *inputs: self.loss.slopes(*inputs)[0],
            _SLOPES[1]: lambda *inputs: self.loss.slopes(*inputs)[1],
        }

    def inside(self, beta: Any) -> Any:
        """At which points the value is finite."""
        finite = numpy.isfinite(_numbers(self.loss.value(*self.arrays(), beta)))
        self.holds(finite.mean() > 0.5, f"value is nan or inf at most points, with beta = {beta}")
        return finite

    def holds(self, rule: bool, message: str) -> None:
        if not rule:
            raise AssertionError(f"{self.given} with {self.library.name}, {self.dtype}: {message}")

    def close(
        self, what: str, got: Any, want: Any, beta: float, where: Any, wide: Any = 0.0
    ) -> None:
        """Equal at some of the points, to two thirds of the digits or to a wider tolerance."""
        got, want = _numbers(got), _numbers(want)
        size = numpy.maximum(1.0, numpy.maximum(abs(got), abs(want)))
        tolerance = numpy.maximum(self.eps ** (2.0 / 3.0) * size, wide)
        for i in numpy.flatnonzero(where & ~(abs(got - want) <= tolerance))[:1]:
            chosen, rejected = _POINTS[i]
            at = f"chosen = {chosen}, rejected = {rejected}, beta = {beta}"
            self.holds(False, f"{what}: {got[i]:.9g}, and not {want[i]:.9g}, at {at}")

    @property
    def eps(self) -> float:
        return float(numpy.finfo(self.dtype).eps)


def _numbers(array: Any) -> Any:
    return numpy.asarray(array.tolist(), numpy.float64)


def _check_form(case: _Case) -> None:
    chosen, rejected = case.arrays()
    slopes = case.loss.slopes(chosen, rejected, _BETAS[1])
    case.holds(
        isinstance(slopes, tuple) and len(slopes) == 2,
        f"slopes must return a tuple of two arrays, got {type(slopes).__name__}",
    )
    per_pair = case.library.array([_BETAS[1]] * len(_POINTS), case.dtype)
    for beta, kind in ((_BETAS[1], "a number"), (per_pair, "an array")):
        for name, function in case.functions().items():
            result = function(chosen, rejected, beta)
            shape, dtype = getattr(result, "shape", ()), getattr(result, "dtype", None)
            case.holds(
                shape == chosen.shape and dtype == chosen.dtype,
                f"{name} must have shape {tuple(chosen.shape)} and dtype {chosen.dtype} if beta is "
                f"{kind}, got {type(result).__name__} of shape {tuple(shape)} and dtype {dtype}",
            )


def _check_derivatives(case: _Case) -> None:
    arrays = case.arrays()
    for beta in _BETAS:
        slopes, where = case.loss.slopes(*arrays, beta), case.inside(beta)
        total = lambda c, r, beta=beta: case.loss.value(c, r, beta).sum()  # noqa: E731
        derivatives = case.library.gradients(total, *arrays)
        for name, slope, derivative in zip(_SLOPES, slopes, derivatives, strict=True):
            case.close(f"the derivative of value is not {name}", derivative, slope, beta, where)
        _check_differences(case, slopes, beta, where)


def _check_differences(case: _Case, slopes: tuple[Any, Any], beta: float, where: Any) -> None:
    step = case.eps ** (1.0 / 3.0)
    # Off the points at which training starts, and where losses have kinks.
    where = where & numpy.array([c != r and c != 0.0 and r != 0.0 for c, r in _POINTS])
    for name, slope, (a, b) in zip(_SLOPES, slopes, ((step, 0.0), (0.0, step)), strict=True):
        ends = [case.arrays([(c + s * a, r + s * b) for c, r in _POINTS]) for s in (1.0, -1.0)]
        up, down = (_numbers(case.loss.value(*end, beta)) for end in ends)
        width = sum(_numbers(one) - _numbers(other) for one, other in zip(*ends, strict=True))
        size = abs(up) + abs(down) + abs(_numbers(slope)) + 1.0
        rounding, curvature = case.eps * 30.0 * (1.0 + beta) / step, (1.0 + beta) ** 3 * step**2
        wide = 4.0 * size * (rounding + curvature)
        case.close(
            f"the difference of value is not {name}", (up - down) / width, slope, beta, where, wide
        )


def _check_betas(case: _Case) -> None:
    arrays = case.arrays()
    betas = numpy.resize(_BETAS, len(_POINTS))
    for name, function in case.functions().items():
        per_pair = function(*arrays, case.library.array(betas.tolist(), case.dtype))
        for beta in _BETAS:
            want, where = function(*arrays, beta), case.inside(beta)
            one = function(*arrays, case.library.array(beta, case.dtype))
            case.close(f"{name} with a 0-d beta is not that with a number", one, want, beta, where)
            what = f"{name} with a beta per pair is not that with a number"
            case.close(what, per_pair, want, beta, where & (betas == beta))


def _check_alone(case: _Case) -> None:
    beta = _BETAS[1]
    where = case.inside(beta)
    for name, function in case.functions().items():
        together = function(*case.arrays(), beta)
        alone = _numbers(together)
        for i in range(0, len(_POINTS), 5):
            alone[i] = float(function(*case.arrays(_POINTS[i : i + 1]), beta)[0])
        case.close(f"{name} of a pair depends on the other pairs", alone, together, beta, where)


def _check_tracing(case: _Case) -> None:
    for name, function in case.functions().items():

        def call(chosen: Any, rejected: Any, function: Callable[..., Any] = function) -> Any:
            return function(chosen, rejected, _BETAS[1])

        try:
            case.library.trace(call, *case.arrays())
        except Exception as error:
            message = str(error).splitlines()[0]
            case.holds(False, f"{name} must not read numbers out of arrays: {message}")


def _check_limits(case: _Case) -> None:
    beta, arrays = _BETAS[1], case.arrays(_INFINITIES)
    total = lambda c, r: case.loss.value(c, r, beta).sum()  # noqa: E731
    found = {name: function(*arrays, beta) for name, function in case.functions().items()}
    for name, derivative in zip(_SLOPES, case.library.gradients(total, *arrays), strict=True):
        found[f"the derivative of value that is {name}"] = derivative
    for name, array in found.items():
        for (chosen, rejected), number in zip(_INFINITIES, _numbers(array), strict=True):
            at = f"chosen = {chosen}, rejected = {rejected}, beta = {beta}"
            case.holds(not numpy.isnan(number), f"{name} is nan at {at}")
