"""The paper's mathematical claims, each checked on the package; docs/claims.md has the verdicts.

Other files test some of the claims. docs/claims.md links to those tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

import spoloss
from spoloss import DPO, SPO, Squared

X = np.linspace(-20.0, 60.0, 8001)  # steps of 0.01, through 0, 1 and 2
E = math.e


def at(loss: Any, *x: float) -> np.ndarray:
    """A loss at beta = 1, where h is x."""
    return loss.value(np.array(x), 1.0)


def slope_at(loss: Any, *x: float) -> np.ndarray:
    return loss.slope(np.array(x), 1.0)


# ----------------------------------------------------------------------------- sections 2.1 and 2.2


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_c1_the_optimal_policy_has_the_margins_of_equation_5(beta: float) -> None:
    rng = np.random.default_rng(0)
    reference = torch.tensor(rng.normal(size=6)).log_softmax(0)
    reward = torch.tensor(rng.normal(size=6))
    scores = reference.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [scores],
        max_iter=500,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def lacking() -> torch.Tensor:
        search.zero_grad()
        policy = scores.log_softmax(0)
        value = -(policy.exp() * (reward - beta * (policy - reference))).sum()
        value.backward()
        return value

    search.step(lacking)
    best = scores.log_softmax(0).detach().numpy()
    won, lost = np.triu_indices(6, 1)
    known = reference.numpy()
    h = spoloss.log_ratio_margin(best[won], best[lost], known[won], known[lost])
    gap = reward.numpy()[won] - reward.numpy()[lost]
    np.testing.assert_allclose(h, gap / beta, atol=1e-5)
    # Equation 2's Z(x) is beta times the logarithm of a sum, the same for every response.
    z = reward.numpy() - beta * (best - known)
    tilted = np.exp(known) @ np.exp(reward.numpy() / beta)
    np.testing.assert_allclose(z, beta * np.log(tilted), atol=1e-5)


def test_c2_dpo_falls_for_every_margin() -> None:
    assert np.all(slope_at(DPO(), *X, 700.0) < 0.0)
    # Beyond floats: the logarithm of the slope goes like -x without end.
    far = DPO().log_slope(np.array([1e3, 1e6, 1e12]), 1.0)
    np.testing.assert_array_equal(far.sign, -1.0)
    np.testing.assert_allclose(far.log_abs, [-1e3, -1e6, -1e12])


def test_c3_the_extremum_at_1_is_a_minimum() -> None:
    f = lambda z: -z * mpmath.exp(-z)  # noqa: E731
    assert mpmath.almosteq(mpmath.diff(f, 1), 0, abs_eps=1e-12)
    assert mpmath.diff(f, 1, 2) > 0.36
    others = X[np.abs(X - 1.0) > 1e-9]
    assert len(others) == len(X) - 1
    assert np.all(at(SPO(), *others) > -1.0 / E)
    assert at(SPO(), 1.0)[0] == pytest.approx(float(f(1)), rel=1e-15)
    # It has no maximum: to the left it has no bound.
    assert at(SPO(), -700.0)[0] > 1e300


def test_c5_past_the_target_the_loss_rises_to_where_it_began() -> None:
    right = X[X >= 1.0]
    assert np.all(np.diff(at(SPO(), *right)) > 0.0)
    assert np.all(at(SPO(), *right) < 0.0)
    # "Too confident" costs as much as no training at all, and 1/e more than the target.
    assert at(SPO(), np.inf)[0] == at(SPO(), 0.0)[0] == 0.0


def test_c5_the_pull_back_is_hardest_at_2() -> None:
    slope = slope_at(SPO(), *X)
    assert np.all(slope[X < 1.0 - 1e-9] < 0.0)
    assert np.all(slope[X > 1.0 + 1e-9] > 0.0)
    assert X[slope.argmax()] == pytest.approx(2.0, abs=1e-9)
    assert slope.max() == pytest.approx(E**-2, rel=1e-12)  # 0.135


def test_c6_how_heavy_the_penalty_below_the_target_is() -> None:
    x = [0.0, -5.0, -10.0, -20.0]
    np.testing.assert_allclose(slope_at(SPO(), *x), [-1.0, -890.0, -2.4e5, -1e10], rtol=0.02)
    assert slope_at(DPO(), 0.0)[0] == -0.5
    assert np.all(slope_at(DPO(), *X, -1e6) >= -1.0)


@pytest.mark.parametrize(
    ("dtype", "last"), [(np.float16, -8.9), (np.float32, -84.3), (np.float64, -703.2)]
)
def test_c6_where_the_penalty_overflows(dtype: type, last: float) -> None:
    greatest = mpmath.mpf(float(np.finfo(dtype).max))
    size = lambda x: -x * mpmath.exp(-x)  # noqa: E731
    assert size(mpmath.mpf(last) + 0.1) < greatest < size(mpmath.mpf(last) - 0.1)
    if dtype is not np.float16:  # which is computed in float32
        value = SPO().value(np.array([last + 0.1, last - 0.1], dtype), dtype(1.0))
        np.testing.assert_array_equal(np.isfinite(value), [True, False])


def test_landscape_is_steeper_without_bound_where_dpo_is_bounded() -> None:
    # Section 1 promises "a more stable optimization landscape": curvature by x says how stable.
    x = torch.tensor([-20.0, -10.0, -5.0, 0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    curvature = {}
    for name, loss in (("spo", SPO()), ("dpo", DPO())):
        (slope,) = torch.autograd.grad(loss.value(x, 1.0).sum(), x, create_graph=True)
        (curvature[name],) = torch.autograd.grad(slope.sum(), x)
    want = [float((2 - mpmath.mpf(v)) * mpmath.exp(-v)) for v in x.tolist()]
    np.testing.assert_allclose(curvature["spo"].numpy(), want, rtol=1e-12)
    assert curvature["spo"][0] > 1e10
    assert curvature["spo"][-1] < 0.0
    assert torch.all((curvature["dpo"] > 0.0) & (curvature["dpo"] <= 0.25))


@pytest.mark.parametrize("guess", [0.2, 1.0, 5.0])
def test_c12_a_wrong_gap_moves_the_squared_target_and_the_spo_target_alike(guess: float) -> None:
    h = np.linspace(0.0, 60.0, 6001)
    zeros = np.zeros_like(h)
    options = {"beta": 0.1, "reward_gap": guess, "reduction": "none"}
    for loss in (spoloss.spo_loss, spoloss.squared_loss):
        smallest = h[loss(h, zeros, zeros, zeros, **options).argmin()]
        assert smallest == pytest.approx(guess / 0.1, abs=0.005)


# ------------------------------------------------------------------------------------ section 3.1


def by_log_probability(grad: Callable[..., Any], x: np.ndarray, beta: float) -> np.ndarray:
    """The derivative by the logarithm of the rejected probability."""
    zeros = np.zeros_like(x)
    return grad(x / beta, zeros, zeros, zeros, beta=beta, reduction="none").policy_rejected


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_c10_by_log_probability_both_gradients_vanish(beta: float) -> None:
    x = np.array([2.0, 5.0, 20.0, 60.0, 500.0])
    spo, dpo = (by_log_probability(g, x, beta) for g in (spoloss.spo_grad, spoloss.dpo_grad))
    want = [
        (-beta * float((mpmath.mpf(v) - 1) * mpmath.exp(-v)), beta / float(1 + mpmath.exp(v)))
        for v in x
    ]
    np.testing.assert_allclose(np.stack([spo, dpo], 1), want, rtol=1e-9)
    assert np.all(np.diff(np.abs(spo)) < 0.0)
    assert np.all(np.diff(dpo) < 0.0)
    # What differs is the sign: past the target SPO raises the rejected answer again.
    assert np.all(spo < 0.0)
    assert np.all(dpo > 0.0)
    assert dpo[-1] < 1e-200
    assert -spo[-1] < 1e-200


def test_c10_of_the_two_vanishing_gradients_spos_is_the_larger() -> None:
    crossing = float(mpmath.findroot(lambda x: (x - 1) * (1 + mpmath.exp(-x)) - 1, 2))
    assert crossing == pytest.approx(1.866, abs=5e-4)
    x = X[X > 0.0]
    ratio = np.abs(slope_at(SPO(), *x) / slope_at(DPO(), *x))
    assert np.all(ratio[x > crossing] > 1.0)
    assert np.all(np.diff(ratio[x > crossing]) > 0.0)


def test_c10_on_mis_ordered_pairs_spo_is_the_one_that_explodes() -> None:
    x = np.array([-5.0, -10.0, -20.0])
    spo, dpo = (by_log_probability(g, x, 0.1) for g in (spoloss.spo_grad, spoloss.dpo_grad))
    assert np.all(spo / dpo > [800.0, 2e5, 1e10])
    guarded = spoloss.spo_grad(
        x / 0.1, *np.zeros((3, 3)), beta=0.1, linear_below=0.0, reduction="none"
    ).policy_rejected
    np.testing.assert_allclose(guarded, 0.1, rtol=1e-12)


def test_a_step_on_one_pair_of_a_table_never_lowers_the_chosen_answer() -> None:
    # Section 3.1 says that DPO's gradient on the rejected answer forces both down.
    rng = np.random.default_rng(1)
    for spread in (0.5, 2.0, 5.0):
        scores = torch.tensor(rng.normal(size=(50, 8)) * spread, requires_grad=True)
        policy = scores.log_softmax(-1)
        zero = torch.zeros(50, dtype=torch.float64)
        loss = spoloss.dpo_loss(policy[:, 0], policy[:, 1], zero, zero, reduction="sum")
        (grad,) = torch.autograd.grad(loss, scores)
        stepped = (scores - grad).log_softmax(-1)
        assert torch.all(stepped[:, 0] > policy[:, 0])
        assert torch.all(stepped[:, 1] < policy[:, 1])


def test_on_one_pair_every_loss_of_the_margin_moves_a_network_the_same_way() -> None:
    # Whatever DPO does to both probabilities, SPO does too below its target, and undoes above.
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 9))
    network.double()
    weights = list(network.parameters())
    policy = network(torch.randn(5, dtype=torch.float64)).log_softmax(-1)

    def direction(loss: Any, x: float) -> torch.Tensor:
        # The reference sets where the pair stands.
        reference = policy[:1].detach() - x / 0.1, policy[1:2].detach()
        value = spoloss.pair_loss(loss, policy[:1], policy[1:2], *reference, beta=0.1)
        grads = torch.autograd.grad(value, weights, retain_graph=True)
        flat = torch.cat([grad.ravel() for grad in grads])
        return flat / flat.norm()

    for x, sign in ((-3.0, 1.0), (0.0, 1.0), (0.9, 1.0), (1.1, -1.0), (8.0, -1.0)):
        dpo = direction(DPO(), x)
        for loss in (SPO(), Squared()):
            assert torch.dot(dpo, direction(loss, x)).item() == pytest.approx(sign, abs=1e-9)


# ------------------------------------------------------------------------------------- section 4.2


@pytest.mark.parametrize(("percent", "needed"), [(56.50, 224), (53.73, 687)])
def test_what_the_win_rates_need_to_be_beyond_chance(percent: float, needed: int) -> None:
    # Comparisons at which a 95 % interval of SPO's win rate over DPO, two-sided, just leaves 50 %.
    rate = percent / 100.0

    def low(comparisons: int) -> float:
        return rate - 1.96 * math.sqrt(rate * (1.0 - rate) / comparisons)

    assert low(needed - 1) < 0.5 <= low(needed)
