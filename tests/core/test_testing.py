"""`check_loss` passes what is right, and says which rule a wrong loss breaks, and where."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers.oracles import LOSSES
from spoloss import DPO, SPO
from spoloss._arrays import detach, namespace, quiet
from spoloss.testing import check_loss


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_of_the_package_pass(name: str) -> None:
    check_loss(LOSSES[name][0], limits=True)


class OfPairs:
    """l = u_w^2 - u_l * u_w / beta, whose slopes are neither equal nor opposite."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return chosen * chosen - chosen * rejected / beta

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        return 2.0 * chosen - rejected / beta, -chosen / beta


def test_a_loss_of_two_log_ratios_passes() -> None:
    with torch.no_grad():  # as in a script that only evaluates
        check_loss(OfPairs())


class Kinks:
    """l = beta * (max(u_w, 0) + max(u_l, 0) + max(u_w - u_l, 0))."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return beta * sum(x * _above_0(x) for x in (chosen, rejected, chosen - rejected))

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        of_margin = _above_0(chosen - rejected)
        return beta * (_above_0(chosen) + of_margin), beta * (_above_0(rejected) - of_margin)


def _above_0(x: Any) -> Any:
    xp = namespace(x)
    return xp.where(x > 0.0, xp.ones_like(x), xp.zeros_like(x))


def test_a_loss_with_kinks_passes() -> None:
    check_loss(Kinks())


def test_a_loss_for_one_library_passes() -> None:
    class InTorch(OfPairs):
        def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
            return torch.square(chosen) - torch.mul(chosen, rejected) / beta

    check_loss(InTorch())


class OneSide(OfPairs):
    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        return 2.0 * chosen - rejected / beta, 0.0 * chosen


class NoTuple(OfPairs):
    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return 2.0 * chosen - rejected / beta


class Widened(OfPairs):
    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        value = super().value(chosen, rejected, beta)
        return value.double() if isinstance(value, torch.Tensor) else value.astype(np.float64)


class Reduced(OfPairs):
    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return super().value(chosen, rejected, beta).mean()


class BatchMean(OfPairs):
    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return super().value(chosen, rejected, beta) + 1e-3 * detach(chosen).mean()


class FirstBeta(OfPairs):
    """Of several betas it takes the first."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return super().value(chosen, rejected, self._first(beta))

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        return super().slopes(chosen, rejected, self._first(beta))

    def _first(self, beta: Any) -> Any:
        return beta if isinstance(beta, float) or beta.ndim == 0 else beta[0]


class LostBeta(SPO):
    """The slope by x and not by h."""

    def slope(self, margin: Any, beta: Any) -> Any:
        return super().slope(margin, beta) / beta


class WrongPolynomial(SPO):
    """(x + 1) in place of (x - 1)."""

    @quiet
    def slope(self, margin: Any, beta: Any) -> Any:
        x = margin * beta
        return beta * (x + 1.0) * namespace(margin).exp(-x)


class StrayDetach(SPO):
    """Right value, right slope, wrong gradient."""

    def value(self, margin: Any, beta: Any) -> Any:
        x = margin * beta
        return -x * detach(namespace(margin).exp(-x))


class SinglePrecision(SPO):
    """float64 rounded to float32 on the way."""

    def value(self, margin: Any, beta: Any) -> Any:
        return self._round(super().value(margin, beta), margin.dtype)

    def slope(self, margin: Any, beta: Any) -> Any:
        return self._round(super().slope(margin, beta), margin.dtype)

    def _round(self, array: Any, dtype: Any) -> Any:
        if isinstance(array, torch.Tensor):
            return array.float().to(dtype)
        return array.astype(np.float32).astype(dtype)


class Naive(SPO):
    """Equation 6 as it stands on paper: nan at inf."""

    @quiet
    def value(self, margin: Any, beta: Any) -> Any:
        x = margin * beta
        return -x * namespace(margin).exp(-x)


class Detached:
    """Value and slope agree with each other: both forget the derivative of e^-x."""

    def value(self, margin: Any, beta: Any) -> Any:
        x = margin * beta
        return -x * detach(namespace(x).exp(-x))

    def slope(self, margin: Any, beta: Any) -> Any:
        return -beta * namespace(margin).exp(-margin * beta)


class WrongAt0(DPO):
    """abs has the derivative 0 at 0, where training starts."""

    def value(self, margin: Any, beta: Any) -> Any:
        xp, x = namespace(margin), margin * beta
        e = xp.exp(-xp.abs(x))
        return -xp.log(xp.where(x < 0.0, e, 1.0) / (1.0 + e))


class Branches(OfPairs):
    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return super().value(chosen, rejected, beta) * (1.0 if bool((chosen > -1e9).all()) else 2.0)


class Nowhere(OfPairs):
    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return super().value(chosen, rejected, beta) * float("nan")


DERIVATIVE = "derivative of value is not the slope with respect to"
WRONG: dict[str, tuple[Any, str]] = {
    "one side": (OneSide(), rf"{DERIVATIVE} rejected: .* at chosen = -19.73, rejected = -19.73"),
    "a lost beta": (LostBeta(), f"{DERIVATIVE} chosen: .* beta = 0.0517"),
    "another polynomial": (WrongPolynomial(), f"{DERIVATIVE} chosen"),
    "a stray detach": (StrayDetach(), f"{DERIVATIVE} chosen"),
    "a detach in both": (Detached(), "difference of value is not the slope with respect to chosen"),
    "wrong at 0": (WrongAt0(), f"{DERIVATIVE} chosen: .* chosen = -19.73, rejected = -19.73"),
    "float32 inside": (SinglePrecision(), f"float64: the {DERIVATIVE} chosen"),
    "no tuple": (NoTuple(), "slopes must return a tuple of two arrays, got Tensor"),
    "another dtype": (Widened(), "value must have shape .* dtype torch.float32 .* got Tensor .*64"),
    "another shape": (Reduced(), r"value must have shape \(49,\) .* got Tensor of shape \(\)"),
    "the batch": (BatchMean(), "value of a pair depends on the other pairs"),
    "one beta": (FirstBeta(), "value with a beta per pair is not that with a number"),
    "an if": (Branches(), "value must not read numbers out of arrays"),
    "nan everywhere": (Nowhere(), "value is nan or inf at most points"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_is_told_what_is_wrong(name: str) -> None:
    loss, message = WRONG[name]
    with pytest.raises(AssertionError, match=message):
        check_loss(loss)


def test_limits_are_checked_where_they_are_wanted() -> None:
    check_loss(Naive())
    message = "float32: value is nan at chosen = inf, rejected = 0.3, beta = 0.313"
    with pytest.raises(AssertionError, match=message):
        check_loss(Naive(), limits=True)


def test_what_is_no_loss() -> None:
    with pytest.raises(TypeError, match="loss must be an object with value and slope"):
        check_loss(SPO)  # type: ignore[arg-type]


def test_a_loss_for_no_library() -> None:
    class ForLists(OfPairs):
        def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
            return chosen.as_list(), rejected, beta

    with pytest.raises(AssertionError, match=r"value accepts the arrays of no library\. torch: "):
        check_loss(ForLists())


def test_jax_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    class InJAX(OfPairs):
        def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
            return jnp.square(chosen) - jnp.multiply(chosen, rejected) / beta

    without_torch = lambda name: None if name == "torch" else object()  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without_torch)
    check_loss(InJAX())
    with pytest.raises(AssertionError, match=r"with jax, float32: .* respect to rejected"):
        check_loss(OneSide())
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="check_loss needs PyTorch or JAX"):
        check_loss(InJAX())
