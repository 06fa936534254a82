"""What is logged: TRL's names, 0-d values, nothing that waits for a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import spoloss
from helpers.backends import BACKENDS, DIFFERENTIABLE, Backend, gradients
from helpers.pairs import four


def by_hand(
    logps: list[np.ndarray], beta: float, gap: Any, weights: np.ndarray
) -> dict[str, float]:
    pc, pr, rc, rr = logps
    chosen, rejected = beta * (pc - rc), beta * (pr - rr)
    x = chosen - rejected
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": x,
        "rewards/accuracies": x > 0,
        "rewards/margins_below_0": x < 0,
        "rewards/margins_above_1": x > gap,
        "logps/chosen": pc,
        "logps/rejected": pr,
    }
    return {key: float(np.average(value, weights=weights)) for key, value in values.items()}


def check(
    backend: Backend, logps: list[np.ndarray], want: dict[str, float], **options: Any
) -> None:
    given = {
        name: backend.array(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    got = spoloss.preference_metrics(*backend.arrays(*logps), **given)
    assert got.keys() == want.keys()
    for key, value in got.items():
        assert value.shape == (), key
        assert float(value) == pytest.approx(want[key], rel=1e-12), key


# x = 0.1, 0, -0.5, 5, 1, so that a pair is at 0, one at a target of 1, and the gaps between others.
LOGPS = [
    np.array([-10.0, -20.0, -30.0, -40.0, -10.0]),
    np.array([-11.0, -20.0, -25.0, -90.0, -20.0]),
    np.full(5, -20.0),
    np.full(5, -20.0),
]


@pytest.mark.parametrize("gap", [None, 0.05, 6.0, np.array([0.05, 1.0, 1.0, 6.0, 1.0])], ids=str)
@pytest.mark.parametrize(
    "weights", [None, 2.0, np.array(3.0), np.array([0.5, 2.0, 0.25, 3.0, 1.5])]
)
def test_metrics_are_weighted_means(weights: Any, gap: Any, backend: Backend) -> None:
    """They divide by the sum of the weights. The target is the pair's own reward gap."""
    each = np.ones(5) if weights is None else weights * np.ones(5)
    want = by_hand(LOGPS, 0.1, 1.0 if gap is None else gap, each)
    check(backend, LOGPS, want, beta=0.1, reward_gap=gap, weights=weights)


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf])
def test_a_padded_pair_is_left_out(padding: float, backend: Backend) -> None:
    logps, gap = four(), np.array([0.5, 0.3, 0.1, 0.2, 0.4])
    beta, weights = np.full(5, 0.1), np.array([1.0, 1.0, 0.0, 1.0, 1.0])
    keep = weights == 1.0
    want = by_hand([a[keep] for a in logps], 0.1, gap[keep], weights[keep])
    for poisoned in (*logps, beta, gap):
        before, poisoned[2] = poisoned[2], padding
        check(backend, logps, want, beta=beta, reward_gap=gap, weights=weights)
        poisoned[2] = before


def test_metrics_of_no_pair_are_nan(backend: Backend) -> None:
    for nothing in (0.0, backend.array(np.zeros(5))):
        got = spoloss.preference_metrics(*backend.arrays(*four()), beta=0.1, weights=nothing)
        assert all(np.isnan(float(value)) for value in got.values())


def test_half_precision_is_averaged_in_float32() -> None:
    logps = [
        torch.full((1000,), value, dtype=torch.bfloat16) for value in (-300.0, -302.0, 0.0, 0.0)
    ]
    metrics = spoloss.preference_metrics(*logps, beta=0.1)
    assert all(value.dtype == torch.float32 for value in metrics.values())
    assert metrics["logps/chosen"].item() == -300.0


@pytest.mark.parametrize("library", DIFFERENTIABLE)
def test_what_is_logged_is_a_constant(library: str) -> None:
    backend = BACKENDS[library]

    def total(*arrays: object) -> object:
        logps, (beta, gap, weights) = arrays[:4], arrays[4:]
        metrics = spoloss.preference_metrics(*logps, beta=beta, reward_gap=gap, weights=weights)
        rewards = spoloss.implicit_rewards(*logps, beta=beta)
        constants = [*metrics.values(), rewards.chosen.sum(), rewards.rejected.sum()]
        return sum(constants) + 0.0 * sum(array.sum() for array in arrays)

    found = gradients(backend, total, *four(), np.full(5, 0.1), np.ones(5), np.ones(5))
    for gradient in found:
        np.testing.assert_array_equal(gradient, 0.0)
