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
_BETA = 0.313
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
            _check_alone(case)
            for beta in _BETAS:
                _check_numbers(case, beta)
            if limits:
                _check_limits(case)
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
    grad: Callable[..., Callable[..., Any]]
    vmap: Callable[..., Callable[..., Any]]


def _torch() -> _Library:
    torch = importlib.import_module("torch")
    return _Library(
        "torch",
        ("float32", "float64"),
        lambda numbers, dtype: torch.tensor(numbers, dtype=getattr(torch, dtype)),
        torch.func.grad,
        torch.func.vmap,
    )


def _jax() -> _Library:
    jax = importlib.import_module("jax")
    return _Library(
        "jax",
        ("float32", "float64") if jax.config.jax_enable_x64 else ("float32",),
        jax.numpy.asarray,
        jax.grad,
        jax.vmap,
    )


_LIBRARIES = {"torch": _torch, "jax": _jax}


@dataclass(frozen=True)
class _Case:
    """A loss, in a library and a dtype."""

    given: Any
    loss: PairLoss
    library: _Library
    dtype: str

    @property
    def eps(self) -> float:
        return float(numpy.finfo(self.dtype).eps)

    def array(self, numbers: Any) -> Any:
        return self.library.array(numbers, self.dtype)

    def arrays(self, points: Sequence[tuple[float, float]] = _POINTS) -> tuple[Any, Any]:
        chosen, rejected = zip(*points, strict=True)
        return self.array(chosen), self.array(rejected)

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Value and slopes, by the names that messages use."""
        slopes = self.loss.slopes
        both = (lambda *inputs: slopes(*inputs)[0]), (lambda *inputs: slopes(*inputs)[1])
        return {"value": self.loss.value, **dict(zip(_SLOPES, both, strict=True))}

    def derivatives(self, points: Sequence[tuple[float, float]], beta: float) -> tuple[Any, Any]:
        total = lambda c, r: self.loss.value(c, r, beta).sum()  # noqa: E731
        return self.library.grad(total, (0, 1))(*self.arrays(points))  # type: ignore[no-any-return]

    def inside(self, beta: float) -> Any:
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
            message = f"{what}: {got[i]:.9g}, and not {want[i]:.9g}, at {_at(_POINTS[i], beta)}"
            self.holds(False, message)


def _numbers(array: Any) -> Any:
    return numpy.asarray(array.tolist(), numpy.float64)


def _at(point: tuple[float, float], beta: float) -> str:
    return f"chosen = {point[0]}, rejected = {point[1]}, beta = {beta}"


def _check_form(case: _Case) -> None:
    chosen, rejected = case.arrays()
    slopes = case.loss.slopes(chosen, rejected, _BETA)
    case.holds(
        isinstance(slopes, tuple) and len(slopes) == 2,
        f"slopes must return a tuple of two arrays, got {type(slopes).__name__}",
    )
    per_pair = case.array([_BETA] * len(_POINTS))
    for beta, kind in ((_BETA, "a number"), (per_pair, "an array")):
        for name, function in case.functions().items():
            result = function(chosen, rejected, beta)
            shape, dtype = getattr(result, "shape", ()), getattr(result, "dtype", None)
            case.holds(
                shape == chosen.shape and dtype == chosen.dtype,
                f"{name} must have shape {tuple(chosen.shape)} and dtype {chosen.dtype} if beta is "
                f"{kind}, got {type(result).__name__} of shape {tuple(shape)} and dtype {dtype}",
            )


def _check_numbers(case: _Case, beta: float) -> None:
    arrays, where = case.arrays(), case.inside(beta)
    betas = numpy.resize(_BETAS, len(_POINTS))
    slopes, derivatives = case.loss.slopes(*arrays, beta), case.derivatives(_POINTS, beta)
    for name, slope, derivative in zip(_SLOPES, slopes, derivatives, strict=True):
        case.close(f"the derivative of value is not {name}", derivative, slope, beta, where)
    _check_differences(case, slopes, beta, where)
    for name, function in case.functions().items():
        want, one = function(*arrays, beta), function(*arrays, case.array(beta))
        case.close(f"{name} with a 0-d beta is not that with a number", one, want, beta, where)
        what, each = f"{name} with a beta per pair", function(*arrays, case.array(betas.tolist()))
        case.close(f"{what} is not that with a number", each, want, beta, where & (betas == beta))


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


def _check_alone(case: _Case) -> None:
    """Each pair by itself. Under vmap, no number can be read out of the arrays."""
    where, pairs = case.inside(_BETA), [array[:, None] for array in case.arrays()]
    for name, function in case.functions().items():
        try:
            alone = case.library.vmap(function, (0, 0, None))(*pairs, _BETA)
        except Exception as error:
            message = str(error).partition("\n")[0]
            case.holds(False, f"{name} must not read numbers out of arrays: {message}")
        case.holds(alone.shape == pairs[0].shape, f"{name} of one pair must have shape (1,)")
        together = function(*case.arrays(), _BETA)
        case.close(
            f"{name} of a pair depends on the other pairs", alone[:, 0], together, _BETA, where
        )


def _check_limits(case: _Case) -> None:
    arrays = case.arrays(_INFINITIES)
    found = {name: function(*arrays, _BETA) for name, function in case.functions().items()}
    for name, derivative in zip(_SLOPES, case.derivatives(_INFINITIES, _BETA), strict=True):
        found[f"the derivative of value that is {name}"] = derivative
    for name, array in found.items():
        for point, number in zip(_INFINITIES, _numbers(array), strict=True):
            case.holds(not numpy.isnan(number), f"{name} is nan at {_at(point, _BETA)}")
