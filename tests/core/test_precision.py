"""In which dtype a call computes: half precision, NumPy's numbers, options, a mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch

import spoloss
from helpers.backends import BACKENDS, Backend
from helpers.pairs import four

BETA = np.array([0.1037, 0.2071, 0.05013, 0.3119, 0.1499])
GAP = np.array([0.7773, 1.3101, 0.9099, 2.017, 0.5037])
WEIGHTS = np.array([0.3333, 1.7777, 0.1234, 2.7182, 1.0101])
SPO_FAMILY = (spoloss.spo_loss, spoloss.spo_grad, spoloss.squared_loss, spoloss.squared_grad)

HALVES: dict[str, Callable[[np.ndarray], Any]] = {
    "torch float16": lambda a: torch.tensor(a).half(),
    "torch bfloat16": lambda a: torch.tensor(a).bfloat16(),
    "jax float16": lambda a: jnp.asarray(a, jnp.float16),
    "jax bfloat16": lambda a: jnp.asarray(a, jnp.bfloat16),
    "numpy float16": lambda a: a.astype(np.float16),
    "mlx float16": lambda a: mx.array(a, dtype=mx.float16),
    "mlx bfloat16": lambda a: mx.array(a, dtype=mx.bfloat16),
}


def as_float64(half: Any) -> np.ndarray:
    if isinstance(half, mx.array):
        half = half.astype(mx.float32)
    if isinstance(half, torch.Tensor):
        half = half.float()
    return np.asarray(half).astype(np.float64)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("function", SPO_FAMILY)
def test_half_precision_is_computed_in_float32_and_rounds_no_parameter(
    function: Callable[..., Any], half: str
) -> None:
    backend = BACKENDS[half.split()[0]]
    logps = [HALVES[half](array / 8.0) for array in four()]
    exact = [as_float64(array) for array in logps]
    for parameters in (
        {"beta": BETA},
        {"beta": BETA, "reward_gap": GAP},
        {"beta": BETA, "weights": WEIGHTS},
        {"beta": np.array(0.1037), "reward_gap": np.array(1.3101), "weights": np.array(0.3333)},
    ):
        single = {name: value.astype(np.float32) for name, value in parameters.items()}
        theirs = {name: backend.array(value) for name, value in single.items()}
        wide = {name: value.astype(np.float64) for name, value in single.items()}
        got = function(*logps, reduction="none", **theirs)
        want = function(*exact, reduction="none", **wide)
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
            assert a.dtype == backend.float32
            np.testing.assert_allclose(np.asarray(a), b, rtol=2e-5, atol=1e-7)


def test_the_widest_of_the_four_decides_for_the_parameters(backend: Backend) -> None:
    zeros = np.zeros(1)
    logps = (*backend.arrays(zeros.astype(np.float32)) * 2, *backend.arrays(zeros) * 2)
    gap = backend.array(np.array([0.3]))
    loss = spoloss.squared_loss(*logps, beta=0.1, reward_gap=gap)
    assert float(loss) == pytest.approx(9.0, rel=1e-15)


NUMBERS = (np.int64(1), np.int32(1), 1, np.float32(1), np.float64(1), np.longdouble(1))


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: type(n).__name__)
def test_numbers_of_python_and_numpy_are_numbers(number: Any, backend: Backend) -> None:
    for dtype in (np.float32, np.float64):
        logps = backend.arrays(*four(dtype=dtype))
        want = spoloss.spo_loss(*logps, beta=1.0, reward_gap=1.0, weights=1.0)
        got = spoloss.spo_loss(*logps, beta=number, reward_gap=number, weights=number)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
        free = spoloss.spo_loss(*logps[:2], number, number, beta=0.1)
        assert free.dtype == want.dtype
        metrics = spoloss.preference_metrics(*logps, beta=number, reward_gap=number, weights=number)
        assert all(value.dtype == want.dtype for value in metrics.values())


@pytest.mark.parametrize("scalar", [np.float64, np.longdouble, np.float32, np.float16])
def test_options_bring_no_dtype_of_their_own(scalar: Any, backend: Backend) -> None:
    for dtype in (np.float32, np.float64):
        logps = backend.arrays(*four(dtype=dtype))
        for loss, grad, options in (
            (spoloss.spo_loss, spoloss.spo_grad, {"linear_below": scalar(-0.3)}),
            (spoloss.dpo_loss, spoloss.dpo_grad, {"label_smoothing": scalar(0.1)}),
        ):
            plain = {name: float(value) for name, value in options.items()}
            for function in (loss, lambda *x, g=grad, **o: g(*x, **o).policy_chosen):
                got, want = (function(*logps, beta=0.1, **o) for o in (options, plain))
                assert got.dtype == want.dtype == getattr(backend, dtype.__name__)
                np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
