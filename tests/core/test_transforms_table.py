"""Every cell of the tables in docs/transforms.md about the functions of log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch

from helpers.backends import mlx_array
from helpers.transforms import (
    MODULES,
    SUBJECTS,
    Subject,
    arguments,
    cells,
    first_difference,
    second_difference,
)
from spoloss._arrays import detach

FIRST = {"rtol": 1e-6, "atol": 1e-7}
SECOND = {"rtol": 1e-4, "atol": 1e-5}
CONSTANTS = ("implicit_rewards", "preference_metrics")


def of_numpy(subject: Subject) -> Subject:
    """A module's subject computes on tensors alone."""
    tensors = lambda x: torch.tensor(x)  # noqa: E731
    return lambda *logps, **options: subject(
        *map(tensors, logps), **{name: tensors(value) for name, value in options.items()}
    ).numpy()


def differences(subject: Subject, mark: str) -> tuple[np.ndarray, np.ndarray]:
    """What the first and the second derivative must be."""
    if mark == "0":
        return np.zeros(5), np.zeros(5)
    in_numpy = of_numpy(subject) if subject in MODULES.values() else subject
    return first_difference(in_numpy), second_difference(in_numpy)


def check_vmap(subject: Subject, vmap: Callable[..., Any], array: Callable[..., Any]) -> None:
    batches = [arguments(size) for size in (5, 5, 5)]
    stacked = [
        array(np.stack([batch[0][i] + j for j, batch in enumerate(batches)])) for i in range(4)
    ]
    beta, weights = array(batches[0][1]), array(batches[0][2])
    call = lambda *logps: subject(*logps, beta=beta, weights=weights)  # noqa: E731
    got = np.asarray(vmap(call)(*stacked))
    for j in range(3):
        want = np.asarray(call(*(column[j] for column in stacked)))
        np.testing.assert_allclose(got[j], want, rtol=2e-6)


# PyTorch


def torch_call() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    logps, beta, weights = arguments()
    parameters = {"beta": torch.tensor(beta), "weights": torch.tensor(weights)}
    return [torch.tensor(array) for array in logps], parameters


def by_chosen(subject: Subject) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    (chosen, *rest), parameters = torch_call()
    return lambda pc: subject(pc, *rest, **parameters), chosen


def torch_compile(subject: Subject, mark: str, *, dynamic: bool | None, graphs: int) -> None:
    del mark
    torch.compiler.reset()
    made = []

    def backend(graph: Any, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    compiled = torch.compile(subject, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in (5, 3, 8, 13):
        logps, beta, weights = arguments(size)
        parameters = {"beta": torch.tensor(beta), "weights": torch.tensor(weights)}
        leaves = [torch.tensor(array, requires_grad=True) for array in logps]
        got = compiled(*leaves, **parameters, reduction="mean")
        want = subject(*leaves, **parameters, reduction="mean")
        torch.testing.assert_close(got, want)
        if want.requires_grad:
            torch.testing.assert_close(
                torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
            )
        assert len(made) <= graphs, "one graph per length"


def torch_grad(subject: Subject, mark: str) -> None:
    function, chosen = by_chosen(subject)
    got = torch.func.grad(lambda pc: function(pc).sum())(chosen)
    np.testing.assert_allclose(got, differences(subject, mark)[0], **FIRST)


def torch_vmap(subject: Subject, mark: str) -> None:
    del mark
    check_vmap(subject, torch.func.vmap, torch.tensor)


def torch_jacrev(subject: Subject, mark: str) -> None:
    function, chosen = by_chosen(subject)
    got = torch.func.jacrev(function)(chosen)
    want = differences(subject, mark)[0]
    np.testing.assert_allclose(got, np.diag(want) if got.ndim == 2 else want, **FIRST)


def torch_hessian(subject: Subject, mark: str) -> None:
    function, chosen = by_chosen(subject)
    got = torch.func.hessian(lambda pc: function(pc).sum())(chosen)
    np.testing.assert_allclose(got, np.diag(differences(subject, mark)[1]), **SECOND)


def torch_gradcheck(subject: Subject, mark: str, *, check: Callable[..., bool]) -> None:
    logps, parameters = torch_call()
    if mark == "-":
        assert not subject(*(a.requires_grad_() for a in logps), **parameters).requires_grad
        return
    leaves = [a.requires_grad_() for a in (*logps, parameters["beta"], parameters["weights"])]
    try:
        check(lambda *x: subject(*x[:4], beta=x[4], weights=x[5]), leaves)
    except RuntimeError as error:  # GradcheckError
        raise AssertionError(str(error)) from error


TORCH: dict[str, Callable[..., None]] = {
    "compile": lambda *cell: torch_compile(*cell, dynamic=None, graphs=2),
    "dynamic": lambda *cell: torch_compile(*cell, dynamic=True, graphs=1),
    "grad": torch_grad,
    "vmap": torch_vmap,
    "jacrev": torch_jacrev,
    "hessian": torch_hessian,
    "gradcheck": lambda *cell: torch_gradcheck(*cell, check=torch.autograd.gradcheck),
    "gradgradcheck": lambda *cell: torch_gradcheck(*cell, check=torch.autograd.gradgradcheck),
}
ON_TORCH = SUBJECTS | MODULES


@pytest.mark.parametrize(
    ("name", "column", "mark"),
    cells("PyTorch", set(ON_TORCH), set(TORCH), slow=("compile", "dynamic")),
)
def test_pytorch(name: str, column: str, mark: str) -> None:
    assert mark in (("yes", "0", "-") if name in CONSTANTS else ("yes",))
    TORCH[column](ON_TORCH[name], mark)


# JAX


def jax_by_chosen(subject: Subject) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    logps, beta, weights = arguments()
    chosen, *rest = (jnp.asarray(array) for array in logps)
    parameters = {"beta": jnp.asarray(beta), "weights": jnp.asarray(weights)}
    return lambda pc: subject(pc, *rest, **parameters), chosen


def jax_jit(subject: Subject, mark: str) -> None:
    del mark
    function, chosen = jax_by_chosen(subject)
    np.testing.assert_allclose(jax.jit(function)(chosen), function(chosen), rtol=1e-12)
    grad = jax.grad(lambda pc: function(pc).sum())
    np.testing.assert_allclose(jax.jit(grad)(chosen), grad(chosen), rtol=1e-12)
    logps, beta, weights = arguments()
    # beta and weights are traced too.
    everything = jax.jit(lambda *x: subject(*x[:4], beta=x[4], weights=x[5]))
    want = subject(*logps, beta=beta, weights=weights)
    np.testing.assert_allclose(everything(*logps, beta, weights), want, rtol=1e-12)


def jax_grad(subject: Subject, mark: str) -> None:
    function, chosen = jax_by_chosen(subject)
    got = jax.grad(lambda pc: function(pc).sum())(chosen)
    np.testing.assert_allclose(got, differences(subject, mark)[0], **FIRST)


def jax_vmap(subject: Subject, mark: str) -> None:
    del mark
    check_vmap(subject, jax.vmap, jnp.asarray)


def jax_hessian(subject: Subject, mark: str) -> None:
    function, chosen = jax_by_chosen(subject)
    got = jax.hessian(lambda pc: function(pc).sum())(chosen)
    np.testing.assert_allclose(got, np.diag(differences(subject, mark)[1]), **SECOND)


JAX: dict[str, Callable[[Subject, str], None]] = {
    "jit": jax_jit,
    "grad": jax_grad,
    "vmap": jax_vmap,
    "hessian": jax_hessian,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "column", "mark"), cells("JAX", set(SUBJECTS), set(JAX)))
def test_jax(name: str, column: str, mark: str) -> None:
    assert mark in (("yes", "0") if name in CONSTANTS else ("yes",))
    JAX[column](SUBJECTS[name], mark)


# MLX, whose exponential is float32's


def mlx_call(size: int = 5) -> tuple[list[mx.array], dict[str, mx.array]]:
    logps, beta, weights = arguments(size)
    parameters = {"beta": mlx_array(beta), "weights": mlx_array(weights)}
    return [mlx_array(array) for array in logps], parameters


def mlx_compile(subject: Subject, mark: str) -> None:
    del mark
    compiled = mx.compile(
        lambda *x: subject(*x[:4], beta=x[4], weights=x[5], reduction="mean"), shapeless=True
    )
    for size in (5, 3, 8):
        logps, parameters = mlx_call(size)
        got = compiled(*logps, parameters["beta"], parameters["weights"])
        want = subject(*logps, **parameters, reduction="mean")
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-5)


def mlx_total(subject: Subject) -> tuple[Callable[[mx.array], mx.array], mx.array]:
    (chosen, *rest), parameters = mlx_call()
    return lambda pc: subject(pc, *rest, **parameters).sum(), chosen


def mlx_grad(subject: Subject, mark: str) -> None:
    function, chosen = mlx_total(subject)
    got = mx.grad(function)(chosen)
    want = differences(subject, mark)[0]
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-6)


def mlx_vmap(subject: Subject, mark: str) -> None:
    del mark
    check_vmap(subject, mx.vmap, mlx_array)


def mlx_grad_twice(subject: Subject, mark: str) -> None:
    function, chosen = mlx_total(subject)
    got = mx.grad(lambda pc: mx.grad(function)(pc).sum())(chosen)
    want = differences(subject, mark)[1]
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-5)


MLX: dict[str, Callable[[Subject, str], None]] = {
    "compile": mlx_compile,
    "grad": mlx_grad,
    "vmap": mlx_vmap,
    "grad twice": mlx_grad_twice,
}


@pytest.mark.parametrize(
    ("name", "column", "mark"), cells("MLX", set(SUBJECTS), set(MLX), slow=("compile",))
)
def test_mlx(name: str, column: str, mark: str) -> None:
    assert mark in (("yes", "0") if name in CONSTANTS else ("yes",))
    MLX[column](SUBJECTS[name], mark)


# The checks themselves


def stray_detach(*logps: Any, **options: Any) -> Any:
    """A loss that autograd sees half of."""
    h = SUBJECTS["log_ratio_margin"](*logps, **options)
    return h * (h if isinstance(h, np.ndarray) else detach(h))


def leaks(*logps: Any, **options: Any) -> Any:
    """Said to be a constant, and none."""
    return SUBJECTS["log_ratio_margin"](*logps, **options)


def batch_in_the_graph(*logps: Any, **options: Any) -> Any:
    """A length that the graph is made for."""
    return SUBJECTS["log_ratio_margin"](*logps, **options) / float(logps[0].shape[0])


@pytest.mark.parametrize(
    ("checks", "columns"),
    [
        (TORCH, ("grad", "jacrev", "hessian", "gradcheck", "gradgradcheck")),
        (JAX, ("grad", "hessian")),
        (MLX, ("grad", "grad twice")),
    ],
)
def test_the_checks_see_a_stray_detach(checks: dict[str, Any], columns: tuple[str, ...]) -> None:
    for column in columns:
        with pytest.raises(AssertionError):
            checks[column](stray_detach, "yes")


def test_the_checks_see_a_constant_that_is_none() -> None:
    for check in (TORCH["grad"], TORCH["jacrev"], JAX["grad"], MLX["grad"]):
        with pytest.raises(AssertionError):
            check(leaks, "0")
    with pytest.raises(AssertionError):
        TORCH["gradcheck"](leaks, "-")


@pytest.mark.slow
def test_the_checks_see_a_length_in_the_graph() -> None:
    def one_graph_per_length(*logps: Any, **options: Any) -> Any:
        return SUBJECTS["log_ratio_margin"](*logps, **options) + sum(range(len(logps[0])))

    for column in ("compile", "dynamic"):
        with pytest.raises(AssertionError):
            TORCH[column](one_graph_per_length, "yes")
    with pytest.raises(AssertionError):
        MLX["compile"](batch_in_the_graph, "yes")
