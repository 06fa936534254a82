"""Weights: every kind, pairs of weight 0 that hold anything, gradients by the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import spoloss
from helpers.backends import BACKENDS, DIFFERENTIABLE, Backend, gradients
from helpers.pairs import FUNCTIONS, TwoSided, four

LOSSES: dict[str, Callable[..., Any]] = {
    "spo": spoloss.spo_loss,
    "spo, linear below": lambda *a, **k: spoloss.spo_loss(*a, linear_below=-1.0, **k),
    "dpo": spoloss.dpo_loss,
    "dpo, smoothed": lambda *a, **k: spoloss.dpo_loss(*a, label_smoothing=0.1, **k),
    "squared": spoloss.squared_loss,
    "two-sided": lambda *a, **k: spoloss.pair_loss(TwoSided(), *a, **k),
}
WITH_GAP = ("spo", "spo, linear below", "squared", "two-sided")


AT_0 = {"policy_rejected": 0.0, "reference_chosen": 0.0, "reference_rejected": 0.0}
POISONS: dict[str, dict[str, float]] = {
    "nan": {"policy_chosen": np.nan},
    "an infinite chosen": {"policy_chosen": -np.inf},
    "an infinite rejected": {"policy_rejected": -np.inf},
    "an infinite reference": {"reference_chosen": -np.inf},
    "inf - inf": {"policy_chosen": -np.inf, "reference_chosen": -np.inf},
    "a loss that overflows": {"policy_chosen": -1e5},
    "a nan beta": {"beta": np.nan},
    "an infinite beta": {"beta": np.inf},
    "a beta of 0": {"beta": 0.0},
    "a gap of 0": {"reward_gap": 0.0},
    "a gap of 0 at h = 0": {"reward_gap": 0.0, "policy_chosen": 0.0, **AT_0},
    "a gap near 0": {"reward_gap": 1e-200},
    "an infinite gap": {"reward_gap": np.inf},
    "a nan gap": {"reward_gap": np.nan},
    "a slope that overflows": {"policy_chosen": -7.025e-4, "beta": 1e6, **AT_0},
    "a second derivative that overflows": {"policy_chosen": -35.0, "beta": 20.0, **AT_0},
    "a derivative with respect to beta that overflows": {
        **{"policy_chosen": -7.025e8, "beta": 1e-6},
        **AT_0,
    },
}
ARGUMENTS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
WEIGHTS = np.array([1.5, 0.0, 0.7, 0.0])


def batch(poison: dict[str, float], gap: bool) -> list[np.ndarray]:
    """Four log-probabilities, betas and perhaps gaps of four pairs; the second one is poisoned."""
    columns = dict(zip(ARGUMENTS, four(seed=3, size=4), strict=True))
    columns["reference_chosen"], columns["reference_rejected"] = four(seed=4, size=4)[:2]
    columns["beta"] = np.array([0.1, 0.2, 0.3, 0.15])
    if gap:
        columns["reward_gap"] = np.array([1.0, 0.5, 2.0, 1.5])
    for name, value in poison.items():
        columns[name][1] = value
    return list(columns.values())


WITH_POISON = [
    (name, poison)
    for name in LOSSES
    for poison in POISONS
    if name in WITH_GAP or "reward_gap" not in POISONS[poison]
]


@pytest.mark.parametrize(("name", "poison"), WITH_POISON)
def test_weight_0_leaves_a_pair_out_whatever_it_holds(
    name: str, poison: str, backend: Backend
) -> None:
    """Value and gradients are those of the batch without the pair, and 0 for the pair itself."""
    loss = LOSSES[name]
    arrays = batch(POISONS[poison], "reward_gap" in POISONS[poison])
    keep = np.array([True, False, True, True])

    def total(*columns: Any, weights: np.ndarray) -> Any:
        names = ("beta", "reward_gap")[: len(columns) - 4]
        options = dict(zip(names, columns[4:], strict=True))
        return loss(*columns[:4], weights=backend.array(weights), reduction="sum", **options)

    rest = [array[keep] for array in arrays]
    got = float(total(*backend.arrays(*arrays), weights=WEIGHTS))
    want = float(total(*backend.arrays(*rest), weights=WEIGHTS[keep]))
    np.testing.assert_allclose(got, want, rtol=backend.rtol(1e-14))
    if backend.name not in DIFFERENTIABLE:
        return
    found = gradients(backend, lambda *c: total(*c, weights=WEIGHTS), *arrays)
    wanted = gradients(backend, lambda *c: total(*c, weights=WEIGHTS[keep]), *rest)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a[1], 0.0)
        np.testing.assert_allclose(a[keep], b, rtol=backend.rtol(1e-13))


@pytest.mark.parametrize(("name", "poison"), WITH_POISON)
def test_weight_0_leaves_a_pair_out_of_second_derivatives(name: str, poison: str) -> None:
    """Forward mode multiplies every derivative of the pair by 0, also infinite ones."""
    loss, gap = LOSSES[name], "reward_gap" in POISONS[poison]
    arrays = [torch.tensor(array) for array in batch(POISONS[poison], gap)]
    rejected, *references = arrays[1:4]

    def total(chosen: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        options = dict(zip(("beta", "reward_gap"), parameters, strict=False))
        weights = torch.tensor(WEIGHTS)
        return loss(chosen, rejected, *references, weights=weights, reduction="sum", **options)

    inputs = (arrays[0], *arrays[4:])
    positions = tuple(range(len(inputs)))
    hessian = torch.func.jacfwd(torch.func.jacfwd(total, positions), positions)(*inputs)
    for row in hessian:
        for block in row:
            assert torch.isfinite(block).all()
            assert torch.all(block[1] == 0.0)
            assert torch.all(block[:, 1] == 0.0)


@pytest.mark.parametrize("poison", POISONS)
def test_the_analytic_gradient_of_weight_0_is_0(poison: str, backend: Backend) -> None:
    gap = "reward_gap" in POISONS[poison]
    logps, options = (lambda c: (c[:4], c[4:]))(backend.arrays(*batch(POISONS[poison], gap)))
    names = ("beta", "reward_gap")[: len(options)]
    for name in ("spo", "squared") if gap else FUNCTIONS:
        for reduction in ("mean", "sum", "none"):
            chosen, rejected = FUNCTIONS[name][1](
                *logps,
                weights=backend.array(WEIGHTS),
                reduction=reduction,
                **dict(zip(names, options, strict=True)),
            )
            for slopes in (np.asarray(chosen), np.asarray(rejected)):
                assert np.isfinite(slopes).all()
                assert slopes[1] == slopes[3] == 0.0


def test_a_number_or_a_0d_array_of_0_leaves_all_out(backend: Backend) -> None:
    nan = backend.arrays(*[np.array([np.nan, 1.0])] * 4)
    for weights in (0.0, 0, backend.array(np.array(0.0))):
        assert float(spoloss.spo_loss(*nan, weights=weights, beta=0.1)) == 0.0
        assert np.all(
            np.asarray(spoloss.spo_grad(*nan, weights=weights, beta=0.1).policy_chosen) == 0.0
        )


def test_what_stands_in_for_a_pair_is_in_the_domain_of_a_loss_of_averages() -> None:
    """The average log-probabilities of tokens are negative, and a loss may exist there alone."""

    class Root:
        def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
            return beta * (torch.sqrt(-chosen) - torch.sqrt(-rejected))

        def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
            return -0.5 * beta / torch.sqrt(-chosen), 0.5 * beta / torch.sqrt(-rejected)

    sides = torch.tensor([[-1.0, torch.nan, -2.0], [-0.5, -1.0, -3.0]], requires_grad=True)
    weights = torch.tensor([1.0, 0.0, 1.0])
    beta = torch.tensor(1.0, requires_grad=True)
    call = {"beta": beta, "weights": weights, "reduction": "sum"}
    spoloss.pair_loss(Root(), *sides, 0.0, 0.0, **call).backward()
    want = spoloss.pair_grad(Root(), *sides.detach(), 0.0, 0.0, **call)
    torch.testing.assert_close(sides.grad, torch.stack([want.policy_chosen, want.policy_rejected]))
    assert torch.all(sides.grad[:, 1] == 0.0)
    # The loss of the pair that is left out is a number, or this would be nan.
    kept = Root().value(*sides.detach()[:, [0, 2]], 1.0).sum()
    torch.testing.assert_close(beta.grad, kept)


def test_a_shared_beta_survives_a_pair_that_is_left_out() -> None:
    """One learned beta for all pairs: its gradient is that of the other pairs."""
    gap, weights = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
    h = torch.tensor([1.0, 2.0], requires_grad=True)
    beta = torch.tensor(0.1, requires_grad=True)
    options = {"beta": beta, "reward_gap": gap, "weights": weights, "reduction": "sum"}
    spoloss.spo_loss(h, torch.zeros(2), 0.0, 0.0, **options).backward()
    assert beta.grad.item() == pytest.approx(2.0 * (0.2 - 1.0) * np.exp(-0.2), rel=1e-6)


@pytest.mark.parametrize("library", DIFFERENTIABLE)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_by_a_weight_is_the_loss(name: str, library: str) -> None:
    """At weight 0 too."""
    loss, backend = LOSSES[name], BACKENDS[library]
    logps, weights = four(), np.array([0.0, 2.0, 0.0, -1.0, 0.0])
    each = np.asarray(loss(*backend.arrays(*logps), reduction="none", beta=0.1))
    weighted = lambda w: loss(*backend.arrays(*logps), weights=w, reduction="sum", beta=0.1)  # noqa: E731
    (by_weight,) = gradients(backend, weighted, weights)
    np.testing.assert_allclose(by_weight, each, rtol=backend.rtol(1e-13))


@pytest.mark.parametrize("library", DIFFERENTIABLE)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_by_a_weight_of_no_finite_loss_is_0(name: str, library: str) -> None:
    backend, chosen, zeros = BACKENDS[library], np.array([np.nan, 1.0, np.inf]), np.zeros(3)

    def weighted(weights: Any) -> Any:
        logps = (*backend.arrays(chosen, zeros), 0.0, 0.0)
        return LOSSES[name](*logps, weights=weights, reduction="sum", beta=0.1)

    (by_weight,) = gradients(backend, weighted, zeros)
    finite = float(LOSSES[name](chosen[1:2], zeros[1:2], 0.0, 0.0, beta=0.1))
    np.testing.assert_allclose(by_weight, [0.0, finite, 0.0], rtol=backend.rtol(1e-13))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_mixed_derivative_at_weight_0_is_the_slope(name: str) -> None:
    """What learning to weigh examples follows: how a weight of 0 would move the gradient."""
    loss, grad, _ = FUNCTIONS[name]
    want = grad(*four(), reduction="none", beta=0.1).policy_chosen
    h = [torch.tensor(array) for array in four()]
    function = lambda pc, w: loss(pc, *h[1:], weights=w, reduction="sum", beta=0.1)  # noqa: E731
    mixed = torch.func.jacrev(torch.func.grad(function), argnums=1)(h[0], torch.zeros(5).double())
    np.testing.assert_allclose(np.diag(mixed), want, rtol=1e-13)
    rest = [jnp.asarray(array) for array in four()]
    by_jax = lambda pc, w: loss(pc, *rest[1:], weights=w, reduction="sum", beta=0.1)  # noqa: E731
    mixed = jax.jacfwd(jax.grad(by_jax), argnums=1)(rest[0], jnp.zeros(5))
    np.testing.assert_allclose(np.diag(mixed), want, rtol=1e-13)
