"""Gradients by log-probability against autograd, and equations 7 and 8 against 60 digits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

import spoloss
from helpers.backends import Backend
from helpers.pairs import FUNCTIONS, four


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pair_grad_is_autograd(name: str, reduction: str) -> None:
    loss, grad, _ = FUNCTIONS[name]
    logps, weights = four(), np.array([0.5, 2.0, 0.0, 1.0, 3.0])
    want = grad(*logps, beta=0.2, weights=weights, reduction=reduction)
    leaves = [torch.tensor(array, requires_grad=True) for array in logps]
    loss(*leaves, beta=0.2, weights=torch.tensor(weights), reduction=reduction).backward()
    by_jax = jax.grad(
        lambda pc, pr: loss(pc, pr, *logps_jax[2:], beta=0.2, weights=w, reduction=reduction),
        argnums=(0, 1),
    )
    logps_jax, w = [jnp.asarray(array) for array in logps], jnp.asarray(weights)
    for got in ([leaf.grad.numpy() for leaf in leaves[:2]], by_jax(*logps_jax[:2])):
        np.testing.assert_allclose(got[0], want.policy_chosen, rtol=1e-12)
        np.testing.assert_allclose(got[1], want.policy_rejected, rtol=1e-12)
    # The reference's gradient is the negative of the policy's.
    np.testing.assert_allclose(leaves[2].grad.numpy(), -want.policy_chosen, rtol=1e-12)
    np.testing.assert_allclose(leaves[3].grad.numpy(), -want.policy_rejected, rtol=1e-12)


PROB_GRADS = {
    "spo": (spoloss.spo_prob_grad, {}),
    "spo with a gap": (spoloss.spo_prob_grad, {"reward_gap": 2.5}),
    "spo guarded": (spoloss.spo_prob_grad, {"linear_below": -1.0}),
    "dpo": (spoloss.dpo_prob_grad, {}),
    "dpo smoothed": (spoloss.dpo_prob_grad, {"label_smoothing": 0.2}),
}


def exact_prob_grad(
    logps: list[float],
    beta: float,
    *,
    spo: bool,
    reward_gap: float = 1.0,
    linear_below: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Any, Any]:
    """The derivatives by pi_w and pi_l, from the paper's equations 7 and 8 in 60 digits."""
    pc, pr, rc, rr = map(mpmath.mpf, logps)
    b = mpmath.mpf(beta) / mpmath.mpf(reward_gap)
    x = b * ((pc - rc) - (pr - rr))
    if spo:
        x = x if linear_below is None else max(x, mpmath.mpf(linear_below))
        slope = b * (x - 1) * mpmath.exp(-x)
    else:
        e = mpmath.mpf(label_smoothing)
        slope = -b * ((1 - e) / (1 + mpmath.exp(x)) - e / (1 + mpmath.exp(-x)))
    return slope * mpmath.exp(-pc), -slope * mpmath.exp(-pr)


@pytest.mark.parametrize("name", PROB_GRADS)
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_equations_7_and_8(name: str, beta: float, backend: Backend) -> None:
    function, options = PROB_GRADS[name]
    rows = [
        [-10.0, -5000.0, -12.0, -11.0],
        [-5000.0, -10.0, -12.0, -11.0],
        [-5000.0, -5000.0, -4990.0, -5001.0],
        [-3.0, -4.0, -3.5, -3.0],
        [-100.0, -120.0, -100.0, -100.0],
    ]
    chosen, rejected = function(*backend.arrays(*np.array(rows).T), beta=beta, **options)
    for i, row in enumerate(rows):
        exact = exact_prob_grad(row, beta, spo=name.startswith("spo"), **options)
        for got, want in zip((chosen, rejected), exact, strict=True):
            assert float(got.sign[i]) == mpmath.sign(want)
            assert float(got.log_abs[i]) == pytest.approx(
                float(mpmath.log(abs(want))), rel=backend.rtol(1e-14), abs=backend.rtol(1e-12)
            )


def test_equation_8_is_0_at_the_target() -> None:
    chosen, rejected = spoloss.spo_prob_grad(
        *(np.array([v]) for v in (2.0, 0.0, 0.0, 0.0)), beta=0.5
    )
    assert chosen.sign == rejected.sign == 0.0
    assert chosen.log_abs == rejected.log_abs == -np.inf


def log_abs_rejected(function: Any, log_pi_l: np.ndarray, beta: float) -> np.ndarray:
    fixed = np.full_like(log_pi_l, np.log(0.01))
    return function(fixed, log_pi_l, fixed, fixed, beta=beta).policy_rejected.log_abs


@pytest.mark.parametrize(("beta", "vanishes"), [(0.1, False), (1.0, False), (2.0, True)])
def test_what_vanishes_as_the_rejected_probability_does(beta: float, vanishes: bool) -> None:
    # Paper 3.1 says that SPO's gradient is forced to zero; it is for beta > 1 only, as DPO's.
    log_pi_l = -np.array([200.0, 1000.0, 5000.0])
    spo = log_abs_rejected(spoloss.spo_prob_grad, log_pi_l, beta)
    dpo = log_abs_rejected(spoloss.dpo_prob_grad, log_pi_l, beta)
    assert np.all(np.diff(spo) < 0) == vanishes
    assert np.all(np.diff(spo) > 0) == (not vanishes)
    # pi_l^(beta - 1) for DPO; the same times x - 1 for SPO, whence SPO diverges even at beta = 1.
    np.testing.assert_allclose(np.diff(dpo) / np.diff(log_pi_l), beta - 1, atol=1e-6)
    x = beta * (np.log(0.01) - log_pi_l)
    np.testing.assert_allclose(spo - dpo, np.log(x - 1), rtol=1e-6)


def test_the_gradient_at_a_probability_of_1e_50() -> None:
    log_pi_l = np.array([np.log(1e-50)])
    spo = np.exp(log_abs_rejected(spoloss.spo_prob_grad, log_pi_l, 0.1))
    dpo = np.exp(log_abs_rejected(spoloss.dpo_prob_grad, log_pi_l, 0.1))
    assert dpo[0] == pytest.approx(1.6e44, rel=0.02)
    assert spo[0] == pytest.approx(1.6e45, rel=0.02)


def test_numpy_alone_trains_a_policy() -> None:
    """A softmax over 6 answers descends to SPO's minimum -1/e with `spo_grad` and no autograd."""
    rng = np.random.default_rng(0)
    scores, reference = np.zeros(6), rng.normal(size=6)
    reference -= np.log(np.exp(reference).sum())
    chosen, rejected = np.array([0, 2, 4]), np.array([1, 3, 5])
    for _ in range(4000):
        logps = scores - np.log(np.exp(scores).sum())
        grad = spoloss.spo_grad(
            logps[chosen], logps[rejected], reference[chosen], reference[rejected], beta=0.5
        )
        by_logp = np.zeros(6)
        np.add.at(by_logp, chosen, grad.policy_chosen)
        np.add.at(by_logp, rejected, grad.policy_rejected)
        scores -= 2.0 * (by_logp - np.exp(logps) * by_logp.sum())
    logps = scores - np.log(np.exp(scores).sum())
    final = spoloss.spo_loss(
        logps[chosen], logps[rejected], reference[chosen], reference[rejected], beta=0.5
    )
    assert final == pytest.approx(-np.exp(-1.0), abs=1e-6)
