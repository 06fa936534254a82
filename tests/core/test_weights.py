"""Weights: every kind, pairs of weight 0 that hold anything, gradients by the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import spoloss
from helpers.backends import BACKENDS, DIFFERENTIABLE, Backend, gradients
from helpers.pairs import TwoSided, four
from spoloss import DPO, SPO, Squared

LOSSES: dict[str, Any] = {
    "spo": SPO(),
    "spo, linear below": SPO(linear_below=-1.0),
    "dpo": DPO(),
    "dpo, smoothed": DPO(label_smoothing=0.1),
    "squared": Squared(),
    "two-sided": TwoSided(),
}
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
    "a second derivative that overflows": {"policy_chosen": -0.069, "beta": 1e4, **AT_0},
    "a beta-derivative that overflows": {"policy_chosen": -7.025e8, "beta": 1e-6, **AT_0},
}
WEIGHTS = np.array([1.5, 0.0, 0.7, 0.0])
KEPT = np.array([True, False, True, True])
OPTIONS = ("beta", "reward_gap")
with_poison = pytest.mark.parametrize(
    ("name", "poison"), [(name, poison) for name in LOSSES for poison in POISONS]
)


def batch(poison: str) -> list[np.ndarray]:
    """Four log-probabilities, betas and perhaps gaps of four pairs; the second one is poisoned."""
    given = POISONS[poison]
    sides = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    logps = *four(seed=3, size=4)[:2], *four(seed=4, size=4)[:2]
    columns = dict(zip(sides, logps, strict=True)) | {"beta": np.array([0.1, 0.2, 0.3, 0.15])}
    if "reward_gap" in given:
        columns["reward_gap"] = np.array([1.0, 0.5, 2.0, 1.5])
    for name, value in given.items():
        columns[name][1] = value
    return list(columns.values())


def call(function: Any, name: str, columns: Any, weights: Any, reduction: str = "sum") -> Any:
    options = dict(zip(OPTIONS, columns[4:], strict=False))
    return function(LOSSES[name], *columns[:4], weights=weights, reduction=reduction, **options)


@with_poison
def test_weight_0_leaves_a_pair_out_whatever_it_holds(
    name: str, poison: str, backend: Backend
) -> None:
    """Value and gradients are those of the batch without the pair, and 0 for the pair itself."""
    arrays = batch(poison)
    rest, few = [array[KEPT] for array in arrays], backend.array(WEIGHTS[KEPT])
    weights = backend.array(WEIGHTS)
    total = lambda *c: call(spoloss.pair_loss, name, c, weights)  # noqa: E731
    of_rest = lambda *c: call(spoloss.pair_loss, name, c, few)  # noqa: E731
    got, want = float(total(*backend.arrays(*arrays))), float(of_rest(*backend.arrays(*rest)))
    np.testing.assert_allclose(got, want, rtol=backend.rtol(1e-14))
    for reduction in ("mean", "sum", "none"):
        for slopes in call(
            spoloss.pair_grad, name, backend.arrays(*arrays), weights, reduction=reduction
        ):
            assert np.isfinite(np.asarray(slopes)).all()
            assert slopes[1] == slopes[3] == 0.0
    if backend.name not in DIFFERENTIABLE:
        return
    found, wanted = gradients(backend, total, *arrays), gradients(backend, of_rest, *rest)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a[1], 0.0)
        np.testing.assert_allclose(a[KEPT], b, rtol=backend.rtol(1e-13))


@with_poison
def test_weight_0_leaves_a_pair_out_of_second_derivatives(name: str, poison: str) -> None:
    """Forward mode multiplies every derivative of the pair by 0, also infinite ones."""
    chosen, *constants = map(torch.tensor, batch(poison))
    constants, parameters = constants[:3], constants[3:]
    inputs = (chosen, *parameters)

    def total(chosen: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        columns = (chosen, *constants, *parameters)
        return call(spoloss.pair_loss, name, columns, torch.tensor(WEIGHTS))

    positions = tuple(range(len(inputs)))
    hessian = torch.func.jacfwd(torch.func.jacfwd(total, positions), positions)(*inputs)
    for block in (block for row in hessian for block in row):
        assert torch.isfinite(block).all()
        assert torch.all(block[1] == 0.0)
        assert torch.all(block[:, 1] == 0.0)


def test_a_number_or_a_0d_array_of_0_leaves_all_out(backend: Backend) -> None:
    nan = backend.arrays(*[np.array([np.nan, 1.0])] * 4)
    for weights in (0.0, 0, backend.array(np.array(0.0))):
        assert float(spoloss.spo_loss(*nan, weights=weights, beta=0.1)) == 0.0
        assert np.all(
            np.asarray(spoloss.spo_grad(*nan, weights=weights, beta=0.1).policy_chosen) == 0.0
        )


def test_what_stands_in_for_a_pair_is_in_the_domain_of_a_loss_of_averages() -> None:
    """The average log-probabilities of tokens are negative, and a loss may exist there alone."""
    factor = torch.tensor(1.0, requires_grad=True)

    class Root:
        def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
            return factor * beta * (torch.sqrt(-chosen) - torch.sqrt(-rejected))

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
    # No mask reaches a number that the loss itself learns: 0 times a value of nan would be nan.
    kept = Root().value(*sides.detach()[:, [0, 2]], 1.0).sum().detach()
    for learned in (beta, factor):
        torch.testing.assert_close(learned.grad, kept)


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
    """At weight 0 too, but 0 where the loss is not finite."""
    backend, chosen, zeros = BACKENDS[library], np.array([np.nan, 1.0, np.inf]), np.zeros(3)
    finite = float(spoloss.pair_loss(LOSSES[name], chosen[1:2], zeros[1:2], 0.0, 0.0, beta=0.1))
    each = np.asarray(spoloss.pair_loss(LOSSES[name], *four(), reduction="none", beta=0.1))
    for logps, weights, want in (
        (four(), np.array([0.0, 2.0, 0.0, -1.0, 0.0]), each),
        ((chosen, zeros, zeros, zeros), zeros, [0.0, finite, 0.0]),
    ):
        columns = *backend.arrays(*logps), 0.1
        weighted = lambda w, c=columns: call(spoloss.pair_loss, name, c, w)  # noqa: E731
        (by_weight,) = gradients(backend, weighted, weights)
        np.testing.assert_allclose(by_weight, want, rtol=backend.rtol(1e-13))


@pytest.mark.parametrize("name", LOSSES)
def test_the_mixed_derivative_at_weight_0_is_the_slope(name: str) -> None:
    """What learning to weigh examples follows: how a weight of 0 would move the gradient."""
    want = spoloss.pair_grad(LOSSES[name], *four(), reduction="none", beta=0.1).policy_chosen
    for array, grad, jacobian in (
        (torch.tensor, torch.func.grad, torch.func.jacrev),
        (jnp.asarray, jax.grad, jax.jacfwd),
    ):
        chosen, *rest = map(array, four())
        total = lambda pc, w, rest=rest: call(spoloss.pair_loss, name, (pc, *rest, 0.1), w)  # noqa: E731
        mixed = jacobian(grad(total), argnums=1)(chosen, array(np.zeros(5)))
        np.testing.assert_allclose(np.diag(mixed), want, rtol=1e-13)
