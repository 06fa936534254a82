"""What must hold for a loss object, as functions that raise AssertionError where it doesn't.

They take the loss as an argument so that the suite can run each on losses that are wrong.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import torch

from helpers.backends import Backend
from helpers.oracles import Oracle

BETAS = (1.0, 0.1, 0.37, 5.0)
POINTS = np.concatenate([np.linspace(-6.0, 9.0, 61), [1e-9, -1e-9, 1e-3]])
INFINITIES = np.array([-np.inf, np.inf])


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


def check_torch_autograd(loss: Any, oracle: Oracle) -> None:
    """Autograd of the value is the slope."""
    for beta in BETAS:
        margin = torch.tensor(POINTS, requires_grad=True)
        (grad,) = torch.autograd.grad(loss.value(margin, beta).sum(), margin)
        _check_grad(grad.numpy(), loss.slope(margin.detach(), beta).numpy(), oracle, beta)


def check_jax_grad(loss: Any, oracle: Oracle) -> None:
    """jax.grad of the value is the slope."""
    for beta in BETAS:
        margin = jnp.asarray(POINTS)
        grad = jax.grad(lambda h, beta=beta: loss.value(h, beta).sum())(margin)
        _check_grad(np.asarray(grad), np.asarray(loss.slope(margin, beta)), oracle, beta)


def check_mlx_grad(loss: Any, oracle: Oracle) -> None:
    """mx.grad of the value is the slope, as exactly as MLX's exponential is."""
    for beta in BETAS:
        margin = mx.array(POINTS.astype(np.float32))
        grad = mx.grad(lambda h, beta=beta: loss.value(h, beta).sum())(margin)
        slope = np.asarray(loss.slope(margin, beta))
        _check_grad(np.asarray(grad), slope, oracle, beta, eps=float(np.finfo(np.float32).eps))


def _check_grad(
    grad: np.ndarray,
    slope: np.ndarray,
    oracle: Oracle,
    beta: float,
    eps: float = float(np.finfo(np.float64).eps),
) -> None:
    scale = np.array([float(oracle(float(h), beta).slope_scale) for h in POINTS])
    tolerance = 16.0 * eps * (1.0 + np.abs(beta * POINTS)) * scale
    assert np.all(np.abs(grad - slope) <= tolerance)


def check_no_nan_at_infinity(loss: Any, backend: Backend) -> None:
    """Limits and not nan at +-inf: value, slope, and autograd, which must equal the slope."""
    for dtype in (np.float32, np.float64):
        rtol = backend.rtol(4.0 * np.finfo(dtype).eps)
        margin = backend.array(INFINITIES.astype(dtype))
        value, slope = np.asarray(loss.value(margin, 0.5)), np.asarray(loss.slope(margin, 0.5))
        assert not np.isnan(value).any()
        assert not np.isnan(slope).any()
        if backend.name == "torch":
            margin.requires_grad_()
            (grad,) = torch.autograd.grad(loss.value(margin, 0.5).sum(), margin)
            np.testing.assert_allclose(grad.numpy(), slope, rtol=rtol)
        if backend.name in ("jax", "mlx"):
            differentiate = jax.grad if backend.name == "jax" else mx.grad
            grad = differentiate(lambda h: loss.value(h, 0.5).sum())(margin)
            np.testing.assert_allclose(np.asarray(grad), slope, rtol=rtol)
