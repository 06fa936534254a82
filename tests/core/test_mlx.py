"""What MLX does otherwise than the other libraries, and what is done about it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import spoloss
from helpers.pairs import FUNCTIONS
from spoloss import DPO


def test_the_slope_of_dpo_keeps_its_digits() -> None:
    """mx.logaddexp's own derivative is off by 1e-7, whatever its size."""
    margins = np.float32([-90.0, -9.0, -1e-3, 0.0, 1e-3, 9.0, 20.0, 80.0, np.inf, -np.inf])
    for loss in (DPO(), DPO(label_smoothing=0.1)):
        grad = mx.grad(lambda h, loss=loss: loss.value(h, 1.0).sum())(mx.array(margins))
        want = loss.slope(margins.astype(np.float64), 1.0)
        np.testing.assert_allclose(np.asarray(grad), want, rtol=2e-5)
    half = mx.grad(lambda h: DPO().value(h, 1.0))(mx.array(0.0))
    assert half.item() == -0.5


def test_float64_is_kept() -> None:
    logps = [mx.array([-1.0, -2.0], dtype=mx.float64)] * 4
    for loss, grad, _ in FUNCTIONS.values():
        assert loss(*logps, beta=0.1).dtype == mx.float64
        assert grad(*logps, beta=0.1).policy_chosen.dtype == mx.float64
    squared = spoloss.squared_loss(*logps[:2], 0.0, 0.0, beta=0.3)
    assert squared.item() == pytest.approx((1.0 / 0.3) ** 2, rel=1e-15)
