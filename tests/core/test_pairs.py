"""The functions of four log-probabilities: reductions, rewards, losses of one's own, no pairs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import spoloss
from helpers.backends import BACKENDS, DIFFERENTIABLE, Backend
from helpers.pairs import FUNCTIONS, four
from spoloss import SPO, MarginLoss


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_functions_are_spellings_of_a_loss(name: str, reduction: str, backend: Backend) -> None:
    """With a beta and a weight per pair."""
    loss, grad, margin_loss = FUNCTIONS[name]
    weights = np.array([0.5, -2.0, 0.0, 1.0, 3.0])
    logps = backend.arrays(*four())
    h, beta = spoloss.log_ratio_margin(*logps), backend.array(np.array([0.05, 0.1, 0.3, 1.0, 2.0]))
    options = {"beta": beta, "weights": backend.array(weights), "reduction": reduction}
    each = weights * np.asarray(margin_loss.value(h, beta))
    slopes = weights * np.asarray(margin_loss.slope(h, beta)) / (5 if reduction == "mean" else 1)
    want = {"none": each, "sum": each.sum(), "mean": each.mean()}[reduction]
    np.testing.assert_allclose(np.asarray(loss(*logps, **options)), want, rtol=1e-12)
    chosen, rejected = grad(*logps, **options)
    np.testing.assert_allclose(np.asarray(chosen), slopes, rtol=1e-14)
    np.testing.assert_array_equal(np.asarray(rejected), -np.asarray(chosen))


def test_implicit_rewards_are_equation_2(backend: Backend) -> None:
    pc, pr, rc, rr = four()
    arrays = backend.arrays(pc, pr, rc, rr)
    chosen, rejected = spoloss.implicit_rewards(*arrays, beta=0.3)
    np.testing.assert_allclose(np.asarray(chosen), 0.3 * (pc - rc), rtol=1e-15)
    np.testing.assert_allclose(np.asarray(rejected), 0.3 * (pr - rr), rtol=1e-15)
    chosen, rejected = spoloss.implicit_rewards(*arrays[:2], -30.0, 0.0, beta=0.5)
    np.testing.assert_allclose(np.asarray(chosen), 0.5 * (pc + 30.0), rtol=1e-15)
    np.testing.assert_allclose(np.asarray(rejected), 0.5 * pr, rtol=1e-15)


def test_any_object_with_value_and_slope_is_a_loss() -> None:
    loss = SimpleNamespace(value=SPO().value, slope=SPO().slope)
    assert spoloss.pair_loss(loss, *four(), beta=0.1) == spoloss.spo_loss(*four(), beta=0.1)


@pytest.mark.parametrize("bad", ["spo", SPO, MarginLoss, None, 0.1])
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


@pytest.mark.parametrize("library", ["numpy", *DIFFERENTIABLE])
def test_no_pairs_and_no_finite_margin(library: str) -> None:
    """As silent in NumPy, which would warn, as elsewhere; pytest turns a warning into an error."""
    backend = BACKENDS[library]
    empty = backend.arrays(np.zeros(0)) * 4
    both, zeros = backend.arrays(np.array([np.inf, -np.inf]), np.zeros(2))
    options = {"beta": 0.1}
    for loss, grad, _ in FUNCTIONS.values():
        assert np.isnan(float(loss(*empty, **options)))
        assert float(loss(*empty, reduction="sum", **options)) == 0.0
        assert grad(*empty, **options).policy_chosen.shape == (0,)
        assert np.isnan(float(loss(both, both, both, both, **options)))
        assert np.isnan(np.asarray(grad(both, both, both, both, **options).policy_chosen)).all()
    metrics = spoloss.preference_metrics(*empty, **options)
    assert all(np.isnan(float(value)) for value in metrics.values())
    nans = (
        spoloss.log_ratio_margin(both, both, 0.0, 0.0),
        spoloss.log_ratio_margin(*[both] * 4),
        spoloss.implicit_rewards(*[both] * 4, **options).chosen,
        spoloss.spo_prob_grad(both, both, 0.0, 0.0, **options).policy_chosen.log_abs,
        spoloss.spo_loss(zeros, zeros, 0.0, 0.0, reward_gap=zeros, reduction="none", **options),
    )
    assert all(np.isnan(np.asarray(array)).all() for array in nans)
    assert float(spoloss.squared_loss(both, zeros, 0.0, 0.0, **options)) == np.inf
    steep, zero = backend.arrays(np.float32([-83.0]), np.zeros(1, np.float32))
    assert float(spoloss.spo_loss(steep, zero, 0.0, 0.0, beta=1.0, weights=10.0)) == np.inf


def test_no_pairs_have_gradients_too() -> None:
    empty = [torch.empty(0, requires_grad=True) for _ in range(4)]
    spoloss.spo_loss(*empty, reduction="sum", beta=0.1).backward()
