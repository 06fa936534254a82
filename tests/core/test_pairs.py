"""The functions of four log-probabilities: reductions, invariances, parameters, bad input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import spoloss
from helpers.backends import Backend
from helpers.pairs import FUNCTIONS, four
from spoloss import SPO


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_spellings_of_pair_loss(name: str, backend: Backend) -> None:
    loss, grad, margin_loss = FUNCTIONS[name]
    logps = backend.arrays(*four())
    h = spoloss.log_ratio_margin(*logps)
    np.testing.assert_allclose(
        np.asarray(loss(*logps, beta=0.2, reduction="none")),
        np.asarray(margin_loss.value(h, 0.2)),
        rtol=1e-15,
    )
    np.testing.assert_allclose(
        np.asarray(loss(*logps, beta=0.1)),
        np.asarray(spoloss.pair_loss(margin_loss, *logps, beta=0.1)),
        rtol=1e-15,
    )
    slope = np.asarray(margin_loss.slope(h, 0.2))
    chosen, rejected = grad(*logps, beta=0.2, reduction="none")
    np.testing.assert_allclose(np.asarray(chosen), slope, rtol=1e-15)
    np.testing.assert_array_equal(np.asarray(rejected), -np.asarray(chosen))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_beta_per_pair_is_a_loop_over_pairs(name: str, backend: Backend) -> None:
    loss, grad, _ = FUNCTIONS[name]
    logps, beta = four(), np.array([0.05, 0.1, 0.3, 1.0, 2.0])
    got = np.asarray(loss(*backend.arrays(*logps), beta=backend.array(beta), reduction="none"))
    slope = np.asarray(
        grad(*backend.arrays(*logps), beta=backend.array(beta), reduction="none").policy_chosen
    )
    for i in range(5):
        pair = [array[i : i + 1] for array in logps]
        np.testing.assert_allclose(
            got[i], loss(*pair, beta=float(beta[i])), rtol=backend.rtol(1e-13)
        )
        np.testing.assert_allclose(
            slope[i], grad(*pair, beta=float(beta[i])).policy_chosen[0], rtol=backend.rtol(1e-13)
        )


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_is_computed_and_returned_in_float32(half: str) -> None:
    logps = [torch.tensor(array).to(getattr(torch, half)) for array in four()]
    exact = [array.double() for array in logps]
    for loss, grad, _ in FUNCTIONS.values():
        got = loss(*logps, beta=0.1)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), loss(*exact, beta=0.1), rtol=2e-5, atol=1e-6)
        assert grad(*logps, beta=0.1).policy_chosen.dtype == torch.float32
    jax_logps = [jnp.asarray(array.float().numpy(), dtype=half) for array in logps]
    assert spoloss.spo_loss(*jax_logps, beta=0.1).dtype == jnp.float32
    np.testing.assert_allclose(
        spoloss.spo_loss(*jax_logps, beta=0.1), spoloss.spo_loss(*logps, beta=0.1), rtol=1e-6
    )


def test_dtypes_stay_or_widen(backend: Backend) -> None:
    single = backend.arrays(*four(dtype=np.float32))
    double = backend.arrays(*four())
    weights = backend.array(np.ones(5))
    assert spoloss.spo_loss(*single, beta=0.1).dtype == backend.float32
    assert spoloss.spo_loss(*double, beta=0.1).dtype == backend.float64
    assert spoloss.spo_loss(*single[:2], *double[2:], beta=0.1).dtype == backend.float64
    assert spoloss.spo_loss(*single, weights=weights, beta=np.float64(0.1)).dtype == backend.float32
    assert (
        spoloss.spo_loss(np.float16([0.5]), np.float16([0.5]), 0.0, 0.0, beta=0.1).dtype
        == np.float32
    )


def test_no_reference_is_the_number_zero(backend: Backend) -> None:
    pc, pr, rc, _ = backend.arrays(*four())
    zeros = backend.array(np.zeros(5))
    np.testing.assert_allclose(
        np.asarray(spoloss.spo_loss(pc, pr, 0.0, 0.0, beta=0.1)),
        np.asarray(spoloss.spo_loss(pc, pr, zeros, zeros, beta=0.1)),
    )
    np.testing.assert_allclose(
        np.asarray(spoloss.implicit_rewards(pc, pr, rc, 0.0, beta=0.5).rejected),
        0.5 * np.asarray(pr),
    )


def test_implicit_rewards_are_equation_2() -> None:
    pc, pr, rc, rr = four()
    chosen, rejected = spoloss.implicit_rewards(pc, pr, rc, rr, beta=0.3)
    np.testing.assert_allclose(chosen, 0.3 * (pc - rc))
    np.testing.assert_allclose(rejected, 0.3 * (pr - rr))
    np.testing.assert_allclose(
        chosen - rejected, 0.3 * spoloss.log_ratio_margin(pc, pr, rc, rr), rtol=1e-12
    )


def test_a_loss_of_ones_own() -> None:
    class Hinge:
        def value(self, margin: Any, beta: Any) -> Any:
            return np.maximum(1.0 - beta * margin, 0.0)

        def slope(self, margin: Any, beta: Any) -> Any:
            return np.where(beta * margin < 1.0, -beta, 0.0)

    logps = four()
    h = spoloss.log_ratio_margin(*logps)
    want = np.maximum(1 - 0.1 * h, 0).mean()
    np.testing.assert_allclose(spoloss.pair_loss(Hinge(), *logps, beta=0.1), want)
    slope = spoloss.pair_grad(Hinge(), *logps, beta=0.1, reduction="sum").policy_rejected
    np.testing.assert_allclose(slope, 0.1 * (h < 10.0))


def test_any_object_with_value_and_slope_is_a_loss() -> None:
    logps, spo = four(), SPO()
    loss = SimpleNamespace(value=spo.value, slope=spo.slope)
    assert spoloss.pair_loss(loss, *logps, beta=0.1) == spoloss.spo_loss(*logps, beta=0.1)

    class Abstract(ABC):
        @abstractmethod
        def value(self, margin: Any, beta: Any) -> Any: ...

        @abstractmethod
        def slope(self, margin: Any, beta: Any) -> Any: ...

    with pytest.raises(TypeError, match="loss must be an object with value and slope"):
        spoloss.pair_loss(Abstract, *logps, beta=0.1)


@pytest.mark.parametrize("bad", ["spo", SPO, None, 0.1])
def test_what_is_no_loss(bad: Any) -> None:
    for function in (spoloss.pair_loss, spoloss.pair_grad):
        with pytest.raises(TypeError, match="loss must be an object with value and slope"):
            function(bad, *four(), beta=0.1)


class OneSlope:
    """The slopes are one array, and in a batch of two pairs they would unpack."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:  # noqa: ARG002
        return rejected - chosen

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> Any:  # noqa: ARG002
        return 0.0 * chosen - 1.0


class Mean(OneSlope):
    """Value and slopes of the batch, and not of each pair."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:  # noqa: ARG002
        return (rejected - chosen).mean()

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> Any:  # noqa: ARG002
        return -np.float64(1.0), np.float64(1.0)


@pytest.mark.parametrize("weights", [None, 1.0])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (OneSlope(), r"^slopes of .* must return a tuple of two arrays, got ndarray$"),
        (Mean(), r"^slopes of .* must return arrays of shape \(2,\), got float64 of shape \(\)$"),
    ],
    ids=["OneSlope", "Mean"],
)
def test_a_loss_of_ones_own_gives_one_number_per_pair(
    loss: Any, message: str, weights: float | None
) -> None:
    logps = np.array([-1.0, -2.0]), np.array([-3.0, -1.0]), 0.0, 0.0
    with pytest.raises(TypeError, match=message):
        spoloss.pair_grad(loss, *logps, beta=0.1, weights=weights)
    if isinstance(loss, Mean):
        with pytest.raises(TypeError, match=r"must return arrays of shape \(2,\), got float64"):
            spoloss.pair_loss(loss, *logps, beta=0.1, weights=weights)


def test_arguments_that_a_loss_cannot_honour_do_not_exist() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        spoloss.dpo_loss(*four(), reward_gap=1.0, beta=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword"):
        spoloss.squared_loss(*four(), linear_below=0.0, beta=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        spoloss.spo_loss(*four(), 0.1, beta=0.1)  # type: ignore[misc]


def test_empty_batches() -> None:
    empty = [torch.empty(0, requires_grad=True) for _ in range(4)]
    total = spoloss.spo_loss(*empty, reduction="sum", beta=0.1)
    assert total.item() == 0.0
    total.backward()
    assert torch.isnan(spoloss.spo_loss(*empty, beta=0.1))
