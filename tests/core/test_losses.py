"""The loss objects against 60-digit arithmetic, over the range of each dtype, in each library."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.backends import BACKENDS, DIFFERENTIABLE, Backend, gradients
from helpers.oracles import LOSSES, Oracle
from spoloss import DPO, SPO

BETAS = (1.0, 0.1, 0.37, 5.0)
DTYPES = [np.float32, np.float64]
POINTS = np.concatenate([np.linspace(-6.0, 9.0, 61), [1e-9, -1e-9, 1e-3]])
every_loss = pytest.mark.parametrize("name", LOSSES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def check_range(
    loss: Any, oracle: Oracle, backend: Backend, margins: np.ndarray, beta: float
) -> None:
    """Value and slope against 60 digits: 4 eps where x is exact, 4 * (1 + |x|) eps elsewhere.

    Below the smallest normal number e^(-x) itself loses digits (or is flushed to 0, by JAX), and
    whatever multiplies it, at most 1 + |x|, inherits that absolute error.
    """
    info = np.finfo(backend.exp or margins.dtype)
    eps, tiny, greatest = (float(getattr(info, k)) for k in ("eps", "tiny", "max"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = backend.array(margins)
        values, slopes = loss.value(array, beta), loss.slope(array, beta)
    for h, value, slope in zip(margins, np.asarray(values), np.asarray(slopes), strict=True):
        true = oracle(float(h), beta)
        x = abs(beta * float(h))
        ulps = 4.0 if beta == 1.0 and backend.exp is None else 4.0 * (1.0 + x)
        underflow = tiny * (1.0 + x) * max(beta, 1.0)
        for got, want, scale in (
            (value, true.value, true.value_scale),
            (slope, true.slope, true.slope_scale),
        ):
            assert not np.isnan(got), f"nan at h = {h}, beta = {beta}"
            if abs(want) + ulps * eps * scale > greatest:
                assert np.sign(got) == np.sign(float(want))
                assert abs(float(got)) >= min(float(abs(want) - ulps * eps * scale), greatest)
                continue
            error = abs(float(got) - want)
            assert error <= ulps * eps * scale + underflow, (
                f"h = {h}, beta = {beta}: got {got}, want {float(want)}, "
                f"{float(error / scale) / eps:.2f} eps"
            )


def dense(dtype: type, limit: float) -> np.ndarray:
    """Where the losses bend, overflow and vanish; and a decade grid over the dtype's range."""
    info = np.finfo(dtype)
    decades = np.logspace(np.log10(float(info.tiny)), np.log10(float(info.max)) - 0.1, 60)
    near = np.linspace(-limit, limit, 501), np.linspace(-3.0, 3.0, 301)
    return np.concatenate([*near, decades, -decades, [0.0]]).astype(dtype)


@every_dtype
@every_loss
def test_range_on_a_grid(name: str, dtype: type, backend: Backend) -> None:
    loss, oracle = LOSSES[name]
    grid = dense(dtype, 95.0 if dtype is np.float32 else 740.0)
    check_range(loss, oracle, backend, grid, beta=1.0)
    check_range(loss, oracle, backend, grid[::5], beta=0.1)


def margins(dtype: type) -> st.SearchStrategy[np.ndarray]:
    width = 32 if dtype is np.float32 else 64
    everywhere = st.floats(width=width, allow_nan=False, allow_infinity=False)
    nearby = st.floats(-100.0, 100.0, width=width)
    lists = st.lists(everywhere | nearby, min_size=1, max_size=12)
    # Repeated to one length, as JAX compiles every operation anew when the length changes.
    return lists.map(lambda values: np.resize(np.array(values, dtype=dtype), 12))


@every_dtype
@every_loss
@given(st.data())
def test_range_anywhere(name: str, dtype: type, data: st.DataObject) -> None:
    loss, oracle = LOSSES[name]
    library = data.draw(st.sampled_from(["numpy", "torch", "jax", "mlx"]))
    check_range(
        loss,
        oracle,
        BACKENDS[library],
        data.draw(margins(dtype)),
        data.draw(st.sampled_from(BETAS)),
    )


@every_loss
@pytest.mark.parametrize("library", DIFFERENTIABLE)
@pytest.mark.parametrize("beta", BETAS)
def test_the_derivative_of_the_value_is_the_slope(name: str, library: str, beta: float) -> None:
    """To 16 rounding errors of the slope's terms."""
    (loss, oracle), backend = LOSSES[name], BACKENDS[library]
    points = POINTS.astype(backend.exp or np.float64)
    (derivative,) = gradients(backend, lambda h: loss.value(h, beta).sum(), points)
    slope = np.asarray(loss.slope(backend.array(points), beta))
    scale = np.array([float(oracle(float(h), beta).slope_scale) for h in POINTS])
    tolerance = 16.0 * np.finfo(points.dtype).eps * (1.0 + np.abs(beta * POINTS)) * scale
    assert np.all(np.abs(derivative - slope) <= tolerance)


@every_loss
@every_dtype
def test_limits_and_no_nan_at_infinity(name: str, dtype: type, backend: Backend) -> None:
    loss, infinities = LOSSES[name][0], np.array([-np.inf, np.inf], dtype)
    margin, rtol = backend.array(infinities), backend.rtol(4.0 * np.finfo(dtype).eps)
    slope = np.asarray(loss.slope(margin, 0.5))
    assert not np.isnan(np.asarray(loss.value(margin, 0.5))).any()
    assert not np.isnan(slope).any()
    if backend.name in DIFFERENTIABLE:
        (found,) = gradients(backend, lambda h: loss.value(h, 0.5).sum(), infinities)
        np.testing.assert_allclose(found, slope, rtol=rtol)


def test_second_derivatives_far_out() -> None:
    """Finite wherever the loss is: log(1 + e^-x) must not reach inf / inf behind the scenes."""
    for loss in (SPO(), SPO(linear_below=-1.0), DPO()):
        for dtype in (torch.float32, torch.float64):
            h = torch.tensor([-80.0, 0.0, 100.0, 1e5], dtype=dtype, requires_grad=True)
            (first,) = torch.autograd.grad(loss.value(h, 1.0).sum(), h, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), h)
            assert torch.isfinite(second).all()
        far = jnp.asarray([-80.0, 0.0, 100.0, 1e5])
        second = jax.vmap(jax.grad(jax.grad(lambda h, loss=loss: loss.value(h, 1.0))))(far)
        assert np.isfinite(second).all()


@pytest.mark.parametrize("x0", [-84.0, -84.24, -85.0, -89.0, -100.0, -699.0])
@pytest.mark.parametrize("library", DIFFERENTIABLE)
def test_a_tangent_beyond_float32_gives_no_nan_gradients(library: str, x0: float) -> None:
    """The usual margins have the gradient of equation 6; those below x0 are inf, and not nan."""
    loss, near = SPO(linear_below=x0), np.float32([-12.0, -10.0, -1.0, 0.5])
    far = np.float32([-2000.0, -1e30, -np.inf])
    value = lambda h: loss.value(h, 0.1).sum()  # noqa: E731
    for function in (value, jax.jit(value)) if library == "jax" else (value,):
        (got,) = gradients(BACKENDS[library], function, np.concatenate([near, far]))
        np.testing.assert_allclose(got[:4], SPO().slope(near, 0.1), rtol=3e-5)
        # Where the loss overflows, its gradient may do so before the slope, which has beta in it.
        assert np.all(got[4:] <= loss.slope(far, 0.1) * (1.0 - 3e-5))


def test_objects_are_plain_values() -> None:
    losses = [loss for loss, _ in LOSSES.values()]
    assert len(set(losses)) == len(set(map(repr, losses))) == len(losses)
    for loss in losses:
        assert pickle.loads(pickle.dumps(loss)) == loss
        assert hash(loss) == hash(pickle.loads(pickle.dumps(loss)))


@pytest.mark.parametrize(
    ("loss", "option", "outside", "interval"),
    [
        (SPO, "linear_below", (1.0, 2.0, np.nan, np.inf, -700.0), r"\(-700, 1\)"),
        (DPO, "label_smoothing", (-0.1, 0.5, 1.0, np.nan), r"\[0, 0.5\)"),
    ],
)
def test_an_option_out_of_range(loss: Any, option: str, outside: Any, interval: str) -> None:
    for value in outside:
        with pytest.raises(ValueError, match=f"^{option} must lie in {interval}, got {value}$"):
            loss(**{option: value})
    with pytest.raises(TypeError, match=f"^{option} must be a number.*, got str$"):
        loss(**{option: "0"})
