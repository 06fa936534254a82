"""The parameters beside the log-probabilities: dtypes, numbers, defaults, errors, silence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch

import spoloss
from helpers.backends import BACKENDS, Backend
from helpers.pairs import FUNCTIONS, four
from spoloss import SPO

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


def test_errors_of_what_is_no_argument() -> None:
    z = torch.zeros(2)
    with pytest.raises(TypeError, match=r"^margin must be a PyTorch, NumPy, JAX or MLX array, got"):
        SPO().value([1.0], 0.1)
    with pytest.raises(ValueError, match=r"^beta / reward_gap must be positive and finite, got"):
        spoloss.spo_loss(z, z, z, z, beta=1e-300, reward_gap=1e300)


@pytest.mark.parametrize(
    ("first", "converter"),
    [
        ("jax", "jax.numpy.asarray"),
        ("torch", "torch.as_tensor"),
        ("numpy", "numpy.asarray"),
        ("mlx", "mlx.core.array"),
        ("strict", "array_api_strict.asarray"),
    ],
)
def test_a_mixed_call_is_told_how_to_convert(first: str, converter: str) -> None:
    other = BACKENDS["torch" if first == "numpy" else "numpy"]
    policies = BACKENDS[first].arrays(*four()[:2])
    references = other.arrays(*four()[2:])
    with pytest.raises(
        TypeError, match=rf"^reference_chosen_logps .*\. Convert it with {converter}$"
    ):
        spoloss.spo_loss(*policies, *references, beta=0.1)
    module, _, name = converter.rpartition(".")
    convert = getattr(__import__(module, fromlist=[name]), name)
    if first != "numpy":  # NumPy reads no tensor that requires a gradient, but any other
        spoloss.spo_loss(*policies, *(convert(array) for array in references), beta=0.1)


def test_jax_by_way_of_numpy_under_jit() -> None:
    references = four()[2:]
    with pytest.raises(TypeError, match=r"Convert it with jax\.numpy\.asarray"):
        jax.jit(lambda *x: spoloss.spo_loss(*x, *references, beta=0.1))(*four()[:2])


def test_numpy_is_silent() -> None:
    """As silent as the others, where it would warn; pytest turns a warning into an error."""
    empty, inf = np.zeros(0), np.inf
    for loss, grad, _ in FUNCTIONS.values():
        assert np.isnan(loss(empty, empty, empty, empty, beta=0.1))
        assert loss(empty, empty, empty, empty, reduction="sum", beta=0.1) == 0.0
        assert grad(empty, empty, empty, empty, beta=0.1).policy_chosen.shape == (0,)
        both = np.array([inf, -inf])
        assert np.isnan(loss(both, both, both, both, beta=0.1))
        assert np.isnan(grad(both, both, both, both, beta=0.1).policy_chosen).all()
    assert all(
        np.isnan(value)
        for value in spoloss.preference_metrics(empty, empty, empty, empty, beta=0.1).values()
    )
    both = np.array([inf, -inf])
    assert np.isnan(spoloss.log_ratio_margin(both, both, 0.0, 0.0)).all()
    keywords = dict(zip(inspect.signature(spoloss.spo_loss).parameters, [both] * 4, strict=False))
    assert np.isnan(spoloss.log_ratio_margin(**keywords)).all()
    assert np.isnan(spoloss.implicit_rewards(**keywords, beta=0.1).chosen).all()
    assert np.isnan(
        spoloss.spo_prob_grad(both, both, 0.0, 0.0, beta=0.1).policy_chosen.log_abs
    ).all()
    steep = np.array([-83.0], np.float32)
    zero = np.zeros(1, np.float32)
    assert spoloss.spo_loss(steep, zero, 0.0, 0.0, beta=1.0, weights=10.0) == inf
    tiny_gap = np.array([0.0], np.float32)
    assert np.isnan(spoloss.spo_loss(zero, zero, 0.0, 0.0, reward_gap=tiny_gap, beta=0.1))
    assert spoloss.squared_loss(np.array([inf, 1.0]), np.zeros(2), 0.0, 0.0, beta=0.1) == inf


DEEP = np.float32([-12.0, -10.0, -1.0, 0.5])


@pytest.mark.parametrize("x0", [-84.0, -84.24, -85.0, -89.0, -100.0, -699.0])
def test_a_tangent_beyond_float32_gives_no_nan_gradients(x0: float) -> None:
    """The usual margins have the gradient of equation 6; those below x0 are inf, and not nan."""
    loss = SPO(linear_below=x0)
    slope, far = SPO().slope(DEEP, 0.1), np.float32([-2000.0, -1e30, -np.inf])
    for differentiate, array in (
        (lambda f: lambda h: torch.func.grad(f)(h), torch.tensor),
        (jax.grad, jnp.asarray),
        (lambda f: jax.jit(jax.grad(f)), jnp.asarray),
        (mx.grad, mx.array),
    ):
        grad = differentiate(lambda h: loss.value(h, 0.1).sum())
        got = np.asarray(grad(array(np.concatenate([DEEP, far]))))
        np.testing.assert_allclose(got[:4], slope, rtol=3e-5)
        # Where the loss overflows, its gradient may do so before the slope, which has beta in it.
        assert np.all(got[4:] <= loss.slope(far, 0.1) * (1.0 - 3e-5))
