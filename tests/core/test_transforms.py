"""What PyTorch, JAX and MLX do to the functions of log-probabilities: compile, grad, vmap, hessian.

A subject takes the four, `beta` and `weights`, and returns one number per pair that depends on that
pair alone (`preference_metrics`: one number). So its derivatives can be had from differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import spoloss
from helpers.backends import mlx_array
from helpers.pairs import four
from spoloss.torch import SPOLoss

Subject = Callable[..., Any]
Transform = Callable[[Subject, bool], None]
"""Checks a subject; the flag says that its result must be a constant, whose derivative is 0."""


def _loss(function: Callable[..., Any], **options: Any) -> Subject:
    return lambda *logps, reduction="none", **parameters: function(
        *logps, reduction=reduction, **parameters, **options
    )


def _grad(function: Callable[..., Any], **options: Any) -> Subject:
    loss = _loss(function, **options)
    return lambda *logps, **parameters: loss(*logps, **parameters).policy_chosen


def _prob_grad(function: Callable[..., Any], **options: Any) -> Subject:
    return lambda *logps, beta, **_: function(*logps, beta=beta, **options).policy_chosen.log_abs


CONSTANTS: dict[str, Subject] = {
    "implicit_rewards": lambda *logps, beta, **_: (
        spoloss.implicit_rewards(*logps, beta=beta).chosen
    ),
    "preference_metrics": lambda *logps, beta, weights, **_: spoloss.preference_metrics(
        *logps, beta=beta, weights=weights
    )["rewards/margins"],
}
"""Functions for logging."""

# ipo_loss, pair_loss and their gradients are other names for the same code.
SUBJECTS: dict[str, Subject] = CONSTANTS | {
    "spo_loss": _loss(spoloss.spo_loss, linear_below=-1.0),
    "dpo_loss": _loss(spoloss.dpo_loss, label_smoothing=0.1),
    "squared_loss": _loss(spoloss.squared_loss, reward_gap=0.7),
    "log_ratio_margin": lambda *logps, **_: spoloss.log_ratio_margin(*logps),
    "spo_grad": _grad(spoloss.spo_grad, linear_below=-1.0),
    "dpo_grad": _grad(spoloss.dpo_grad, label_smoothing=0.1),
    "squared_grad": _grad(spoloss.squared_grad, reward_gap=0.7),
    "spo_prob_grad": _prob_grad(spoloss.spo_prob_grad, reward_gap=0.7),
    "dpo_prob_grad": _prob_grad(spoloss.dpo_prob_grad, label_smoothing=0.1),
}


def each(subjects: dict[str, Subject], transforms: dict[str, Transform]) -> Any:
    """Every subject under every transform; those that take seconds on a loss and its gradient."""
    long = ("compile dynamic", "compile shapeless")
    return pytest.mark.parametrize(
        ("name", "transform"),
        [
            (n, t)
            for n in subjects
            for t in transforms
            if t not in long or n in ("spo_loss", "spo_grad")
        ],
    )


def arguments(size: int = 5) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Four log-probabilities, a beta per pair and a weight per pair, one of which is 0."""
    beta, weights = np.linspace(0.1, 0.4, size), np.linspace(-0.5, 2.0, size)
    weights[size // 2] = 0.0
    return [array / 4.0 for array in four(seed=7, size=size)], beta, weights


def call(array: Callable[..., Any], size: int = 5) -> tuple[list[Any], dict[str, Any]]:
    """The arguments in a library."""
    logps, beta, weights = arguments(size)
    return [array(column) for column in logps], {"beta": array(beta), "weights": array(weights)}


def of_chosen(subject: Subject, array: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    """The subject as a function of the policy's chosen log-probabilities, and these."""
    (chosen, *rest), parameters = call(array)
    return lambda pc: subject(pc, *rest, **parameters), chosen


def check_derivatives(
    subject: Subject,
    constant: bool,
    array: Callable[..., Any],
    first: Any,
    second: Any,
    rtol: float,
) -> None:
    """The library's first and second derivatives with respect to the policy's chosen."""
    function, chosen = of_chosen(subject, np.asarray)
    wanted = np.zeros(5), np.zeros(5)
    if not constant:
        low, at, high = (function(chosen + step) for step in (-1e-3, 0.0, 1e-3))
        slope = (function(chosen + 1e-5) - function(chosen - 1e-5)) / 2e-5
        wanted = slope, (high - 2.0 * at + low) / 1e-6
    function, chosen = of_chosen(subject, array)
    total = lambda pc: function(pc).sum()  # noqa: E731
    got = np.asarray(first(total)(chosen)), np.asarray(second(total)(chosen))
    np.testing.assert_allclose(got[0], wanted[0], rtol=rtol, atol=rtol / 10.0)
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-4, atol=1e-5)


def check_vmap(subject: Subject, vmap: Callable[..., Any], array: Callable[..., Any]) -> None:
    logps, parameters = call(array)
    stacked = [array(np.stack([np.asarray(column) + j for j in range(3)])) for column in logps]
    function = lambda *logps: subject(*logps, **parameters)  # noqa: E731
    got = np.asarray(vmap(function)(*stacked))
    for j in range(3):
        want = np.asarray(function(*(column[j] for column in stacked)))
        np.testing.assert_allclose(got[j], want, rtol=2e-6)


# PyTorch


def torch_compile(subject: Subject, dynamic: bool | None, graphs: int) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(subject, fullgraph=True, dynamic=dynamic, backend=counter)
    for size in (5, 3, 8, 13):
        logps, parameters = call(torch.tensor, size)
        leaves = [array.requires_grad_() for array in logps]
        got = compiled(*leaves, **parameters, reduction="mean")
        want = subject(*leaves, **parameters, reduction="mean")
        torch.testing.assert_close(got, want)
        if want.requires_grad:
            torch.testing.assert_close(
                torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
            )
        assert counter.frame_count <= graphs, "one graph per length"


def of_each_pair(hessian: Callable[..., Any]) -> Callable[..., Any]:
    """The diagonal of the Hessian, which holds nothing else."""

    def diagonal(chosen: Any) -> np.ndarray:
        found = np.asarray(hessian(chosen))
        np.testing.assert_array_equal(found, np.diag(np.diag(found)))
        return np.diag(found)

    return diagonal


def torch_derivatives(subject: Subject, constant: bool) -> None:
    second = lambda f: of_each_pair(torch.func.hessian(f))  # noqa: E731
    check_derivatives(subject, constant, torch.tensor, torch.func.grad, second, 1e-6)


def torch_gradchecks(subject: Subject, constant: bool) -> None:
    logps, parameters = call(torch.tensor)
    leaves = [array.requires_grad_() for array in (*logps, *parameters.values())]
    function = lambda *x: subject(*x[:4], beta=x[4], weights=x[5])  # noqa: E731
    if constant:
        assert not function(*leaves).requires_grad
        return
    torch.autograd.gradcheck(function, leaves)
    torch.autograd.gradgradcheck(function, leaves)


TORCH: dict[str, Transform] = {
    "compile": lambda subject, _: torch_compile(subject, dynamic=None, graphs=2),
    "compile dynamic": lambda subject, _: torch_compile(subject, dynamic=True, graphs=1),
    "vmap": lambda subject, _: check_vmap(subject, torch.func.vmap, torch.tensor),
    "grad and hessian": torch_derivatives,
    "gradcheck and gradgradcheck": torch_gradchecks,
}


@each(SUBJECTS, TORCH)
def test_pytorch(name: str, transform: str) -> None:
    TORCH[transform](SUBJECTS[name], name in CONSTANTS)


def test_a_module_compiles_to_two_graphs() -> None:
    module = SPOLoss(0.2, linear_below=-1.0, reduction="mean")
    subject = lambda *logps, weights, **_: module(*logps, weights=weights).losses  # noqa: E731
    torch_compile(subject, dynamic=None, graphs=2)


def test_inductor_compiles_a_loss_with_everything_in_it() -> None:
    """One loss, because the others differ by a formula that the graph of "compile" shows."""
    torch.compiler.reset()
    logps, parameters = call(torch.tensor)
    options = parameters | {"linear_below": -1.0, "reward_gap": 0.7}
    compiled = torch.compile(spoloss.spo_loss, fullgraph=True)
    leaves = [array.requires_grad_() for array in logps]
    got = compiled(*leaves, **options)
    torch.testing.assert_close(got, spoloss.spo_loss(*leaves, **options))
    got.backward()
    want = spoloss.spo_grad(*(leaf.detach() for leaf in leaves), **options).policy_chosen
    torch.testing.assert_close(leaves[0].grad, want)


def test_nothing_reads_a_value() -> None:
    """Meta tensors hold no data: reading one, as .item() or an if does, raises an error."""
    logps, parameters = call(lambda array: torch.tensor(array, device="meta"))
    for subject in SUBJECTS.values():
        assert subject(*logps, **parameters).device.type == "meta"


# JAX


def jax_jit(subject: Subject, constant: bool) -> None:
    del constant
    function, chosen = of_chosen(subject, jnp.asarray)
    grad = jax.grad(lambda pc: function(pc).sum())
    np.testing.assert_allclose(jax.jit(grad)(chosen), grad(chosen), rtol=1e-12)
    logps, beta, weights = arguments()
    # beta and weights are traced too.
    everything = jax.jit(lambda *x: subject(*x[:4], beta=x[4], weights=x[5]))
    want = subject(*logps, beta=beta, weights=weights)
    np.testing.assert_allclose(everything(*logps, beta, weights), want, rtol=1e-12)


def jax_derivatives(subject: Subject, constant: bool) -> None:
    second = lambda f: of_each_pair(jax.hessian(f))  # noqa: E731
    check_derivatives(subject, constant, jnp.asarray, jax.grad, second, 1e-6)


JAX: dict[str, Transform] = {
    "jit": jax_jit,
    "vmap": lambda subject, _: check_vmap(subject, jax.vmap, jnp.asarray),
    "grad and hessian": jax_derivatives,
}


@each(SUBJECTS, JAX)
def test_jax(name: str, transform: str) -> None:
    JAX[transform](SUBJECTS[name], name in CONSTANTS)


# MLX, whose exponential is float32's


def mlx_compile(subject: Subject, constant: bool) -> None:
    """One graph for every length, so that no length is in it."""
    del constant
    compiled = mx.compile(
        lambda *x: subject(*x[:4], beta=x[4], weights=x[5], reduction="mean"), shapeless=True
    )
    for size in (5, 3, 8):
        logps, parameters = call(mlx_array, size)
        got = compiled(*logps, *parameters.values())
        want = subject(*logps, **parameters, reduction="mean")
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-5)


def mlx_derivatives(subject: Subject, constant: bool) -> None:
    twice = lambda f: mx.grad(lambda pc: mx.grad(f)(pc).sum())  # noqa: E731
    check_derivatives(subject, constant, mlx_array, mx.grad, twice, 1e-5)


MLX: dict[str, Transform] = {
    "compile shapeless": mlx_compile,
    "vmap": lambda subject, _: check_vmap(subject, mx.vmap, mlx_array),
    "grad and grad twice": mlx_derivatives,
}


@each(SUBJECTS, MLX)
def test_mlx(name: str, transform: str) -> None:
    MLX[transform](SUBJECTS[name], name in CONSTANTS)
