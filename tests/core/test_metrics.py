"""What is logged: TRL's names, 0-d values, nothing that waits for a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import spoloss
from helpers.backends import BACKENDS, DIFFERENTIABLE, Backend, gradients
from helpers.pairs import four


def test_metrics_by_hand(backend: Backend) -> None:
    pc = np.array([-10.0, -20.0, -30.0, -40.0])
    pr = np.array([-11.0, -20.0, -25.0, -90.0])
    rc, rr = np.full(4, -20.0), np.full(4, -20.0)
    metrics = spoloss.preference_metrics(*backend.arrays(pc, pr, rc, rr), beta=0.1)
    want = {  # x = 0.1, 0, -0.5, 5
        "rewards/chosen": -0.5,
        "rewards/rejected": -1.65,
        "rewards/margins": 1.15,
        "rewards/accuracies": 0.5,
        "rewards/margins_below_0": 0.25,
        "rewards/margins_above_1": 0.25,
        "logps/chosen": -25.0,
        "logps/rejected": -36.5,
    }
    assert metrics.keys() == want.keys()
    for name, value in metrics.items():
        assert value.shape == (), name
        assert float(value) == pytest.approx(want[name], rel=1e-12), name


def test_half_precision_is_averaged_in_float32() -> None:
    logps = [
        torch.full((1000,), value, dtype=torch.bfloat16) for value in (-300.0, -302.0, 0.0, 0.0)
    ]
    metrics = spoloss.preference_metrics(*logps, beta=0.1)
    assert all(value.dtype == torch.float32 for value in metrics.values())
    assert metrics["logps/chosen"].item() == -300.0


KEYS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/margins_below_0",
    "rewards/margins_above_1",
    "logps/chosen",
    "logps/rejected",
)


def by_hand(
    logps: list[np.ndarray], beta: float, gap: np.ndarray, weights: np.ndarray
) -> dict[str, float]:
    pc, pr, rc, rr = logps
    chosen, rejected = beta * (pc - rc), beta * (pr - rr)
    x = chosen - rejected
    values = (chosen, rejected, x, x > 0, x < 0, x > gap, pc, pr)
    return {
        key: float(np.average(value, weights=weights))
        for key, value in zip(KEYS, values, strict=True)
    }


def test_weighted_means_divide_by_the_sum_of_the_weights(backend: Backend) -> None:
    logps, weights = four(), np.array([0.5, 2.0, 0.25, 1.0, 3.0])
    want = by_hand(logps, 0.1, np.ones(5), weights)
    got = spoloss.preference_metrics(
        *backend.arrays(*logps), beta=0.1, weights=backend.array(weights)
    )
    assert got.keys() == want.keys()
    for key, value in got.items():
        assert value.shape == (), key
        assert float(value) == pytest.approx(want[key], rel=1e-13), key


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf])
def test_a_padded_pair_is_left_out(padding: float, backend: Backend) -> None:
    logps, gap = four(), np.array([0.5, 0.3, 0.1, 0.2, 0.4])
    beta, weights = np.full(5, 0.1), np.array([1.0, 1.0, 0.0, 1.0, 1.0])
    keep = weights == 1.0
    want = by_hand([a[keep] for a in logps], 0.1, gap[keep], weights[keep])
    for poisoned in (*logps, beta, gap):
        before, poisoned[2] = poisoned[2], padding
        got = spoloss.preference_metrics(
            *backend.arrays(*logps),
            beta=backend.array(beta),
            reward_gap=backend.array(gap),
            weights=backend.array(weights),
        )
        for key, value in got.items():
            assert float(value) == pytest.approx(want[key], rel=1e-13), key
        poisoned[2] = before


def test_equal_weights_of_any_kind_change_nothing(backend: Backend) -> None:
    logps = backend.arrays(*four())
    want = spoloss.preference_metrics(*logps, beta=0.1)
    for weights in (2.0, 3, backend.array(np.array(2.0)), backend.array(np.full(5, 2.0))):
        got = spoloss.preference_metrics(*logps, beta=0.1, weights=weights)
        for key, value in got.items():
            assert float(value) == pytest.approx(float(want[key]), rel=1e-13), key
    for nothing in (0.0, backend.array(np.zeros(5))):
        got = spoloss.preference_metrics(*logps, beta=0.1, weights=nothing)
        assert all(np.isnan(float(value)) for value in got.values())


def test_above_the_target_is_above_the_pairs_own(backend: Backend) -> None:
    # x = 1 everywhere, the targets on both sides of it; a number moves the target of all.
    ten, zeros = np.full(4, 10.0), np.zeros(4)
    logps = backend.arrays(ten, zeros, zeros, zeros)
    gap = backend.array(np.array([0.5, 0.9, 1.5, 3.0]))
    for reward_gap, share in ((gap, 0.5), (0.5, 1.0), (1.5, 0.0), (None, 0.0)):
        metrics = spoloss.preference_metrics(*logps, beta=0.1, reward_gap=reward_gap)
        assert float(metrics["rewards/margins_above_1"]) == share
        assert float(metrics["rewards/margins"]) == 1.0


def test_the_reward_gap_of_metrics_is_checked_like_the_losses() -> None:
    with pytest.raises(ValueError, match="reward_gap must be positive and finite, got 0"):
        spoloss.preference_metrics(*four(), beta=0.1, reward_gap=0.0)
    with pytest.raises(ValueError, match=r"weights must be a number .* \(5,\), got \(4,\)"):
        spoloss.preference_metrics(*four(), beta=0.1, weights=np.ones(4))


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
