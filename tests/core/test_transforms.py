"""What PyTorch and JAX do to the functions: compile, grad, vmap, hessian, jit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import spoloss
from helpers.pairs import FUNCTIONS, four

FULL = {
    "spo": {"weights": np.array([0.5, 2.0, 0.0, 1.0, 3.0]), "linear_below": -1.0},
    "dpo": {"weights": np.array([0.5, 2.0, 0.0, 1.0, 3.0]), "label_smoothing": 0.1},
    "squared": {"weights": np.array([0.5, 2.0, 0.0, 1.0, 3.0])},
    "ipo": {"weights": np.array([0.5, 2.0, 0.0, 1.0, 3.0])},
}


def hessian_by_hand(name: str, options: dict[str, Any], beta: float) -> np.ndarray:
    """d2(mean loss)/d(policy chosen)2, a diagonal, from differences of the analytic slope."""
    _, grad, _ = FUNCTIONS[name]
    logps, step = four(), 1e-6
    up = grad(logps[0] + step, *logps[1:], beta=beta, **options).policy_chosen
    down = grad(logps[0] - step, *logps[1:], beta=beta, **options).policy_chosen
    return np.diag((up - down) / (2 * step))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func(name: str) -> None:
    loss, grad, _ = FUNCTIONS[name]
    logps = [torch.tensor(array) for array in four()]
    options = {k: torch.tensor(v) if k == "weights" else v for k, v in FULL[name].items()}
    want = grad(*four(), **FULL[name]).policy_chosen
    np.testing.assert_allclose(torch.func.grad(loss)(*logps, **options), want, rtol=1e-12)
    each = torch.func.vmap(loss)(*logps)
    torch.testing.assert_close(each, loss(*logps, reduction="none"))
    slopes = torch.func.vmap(torch.func.grad(loss))(*logps)
    np.testing.assert_allclose(slopes, grad(*four(), reduction="none").policy_chosen, rtol=1e-12)
    hessian = torch.func.hessian(lambda pc: loss(pc, *logps[1:], **options))(logps[0])
    np.testing.assert_allclose(hessian, hessian_by_hand(name, FULL[name], 0.1), atol=1e-8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_gradcheck_twice(name: str) -> None:
    loss, _, _ = FUNCTIONS[name]
    logps = [torch.tensor(array, requires_grad=True) for array in four()]
    beta = torch.tensor([0.05, 0.1, 0.3, 0.2, 0.15], dtype=torch.float64, requires_grad=True)
    function = lambda *x: loss(*x[:4], beta=x[4], reduction="none")  # noqa: E731
    assert torch.autograd.gradcheck(function, (*logps, beta))
    assert torch.autograd.gradgradcheck(function, (*logps, beta))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("torch_backend", ["aot_eager", "inductor"])
def test_torch_compile_without_a_break_or_a_warning(name: str, torch_backend: str) -> None:
    loss, grad, _ = FUNCTIONS[name]
    torch.compiler.reset()
    options = {k: torch.tensor(v) if k == "weights" else v for k, v in FULL[name].items()}
    compiled = torch.compile(loss, fullgraph=True, backend=torch_backend)
    for beta in (0.1, 0.2, 0.3):  # the third is a dynamic float, no longer a constant
        leaves = [torch.tensor(array, requires_grad=True) for array in four()]
        got = compiled(*leaves, beta=beta, **options)
        got.backward()
        want = grad(*four(), beta=beta, **FULL[name])
        torch.testing.assert_close(got, loss(*leaves, beta=beta, **options))
        np.testing.assert_allclose(leaves[0].grad, want.policy_chosen, rtol=1e-12)
    compiled_grad = torch.compile(grad, fullgraph=True, backend="aot_eager")
    logps = [torch.tensor(array) for array in four()]
    np.testing.assert_allclose(compiled_grad(*logps).policy_chosen, grad(*four()).policy_chosen)


@pytest.mark.slow
def test_torch_compile_of_the_probability_gradients() -> None:
    logps = [torch.tensor(array) for array in four()]
    for function in (spoloss.spo_prob_grad, spoloss.dpo_prob_grad):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*logps), function(*logps))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_jax(name: str) -> None:
    loss, grad, _ = FUNCTIONS[name]
    logps = [jnp.asarray(array) for array in four()]
    options = {k: jnp.asarray(v) if k == "weights" else v for k, v in FULL[name].items()}
    static = [k for k in options if k != "weights"]
    jitted = jax.jit(loss, static_argnames=[*static, "reduction"])
    # beta is traced here, as a 0-d array.
    np.testing.assert_allclose(
        jitted(*logps, beta=0.2, **options), loss(*logps, beta=0.2, **options), rtol=1e-12
    )
    want = grad(*four(), beta=0.2, **FULL[name]).policy_chosen
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda pc, beta: loss(pc, *logps[1:], beta=beta, **options)))(
            logps[0], 0.2
        ),
        want,
        rtol=1e-12,
    )
    slopes = jax.vmap(jax.grad(loss))(*logps)
    np.testing.assert_allclose(slopes, grad(*four(), reduction="none").policy_chosen, rtol=1e-12)
    hessian = jax.hessian(lambda pc: loss(pc, *logps[1:], **options))(logps[0])
    np.testing.assert_allclose(hessian, hessian_by_hand(name, FULL[name], 0.1), atol=1e-8)


def test_second_derivatives_far_out() -> None:
    """Finite wherever the loss is: log(1 + e^-x) must not reach inf / inf behind the scenes."""
    for function in (spoloss.SPO(), spoloss.SPO(linear_below=-1.0), spoloss.DPO()):
        for dtype in (torch.float32, torch.float64):
            h = torch.tensor([-80.0, 0.0, 100.0, 1e5], dtype=dtype, requires_grad=True)
            (first,) = torch.autograd.grad(function.value(h, 1.0).sum(), h, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), h)
            assert torch.isfinite(second).all()
        far = jnp.asarray([-80.0, 0.0, 100.0, 1e5])
        second = jax.vmap(jax.grad(jax.grad(lambda h, f=function: f.value(h, 1.0))))(far)
        assert np.isfinite(second).all()
