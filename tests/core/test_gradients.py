"""Gradients with respect to probabilities: equations 7 and 8 against 60 digits."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest

import spoloss
from helpers.backends import Backend

PROB_GRADS = {
    "spo": (spoloss.spo_prob_grad, {}),
    "spo with a gap": (spoloss.spo_prob_grad, {}),
    "spo guarded": (spoloss.spo_prob_grad, {"linear_below": -1.0}),
    "dpo": (spoloss.dpo_prob_grad, {}),
    "dpo smoothed": (spoloss.dpo_prob_grad, {"label_smoothing": 0.2}),
}


def exact_prob_grad(
    logps: np.ndarray,
    *,
    beta: float,
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
@pytest.mark.parametrize("beta", [1.0, np.repeat([0.1, 1.0, 2.0], 5)], ids=["number", "per pair"])
def test_equations_7_and_8(name: str, beta: Any, backend: Backend) -> None:
    function, options = PROB_GRADS[name]
    rows = [
        [-10.0, -5000.0, -12.0, -11.0],
        [-5000.0, -10.0, -12.0, -11.0],
        [-5000.0, -5000.0, -4990.0, -5001.0],
        [-3.0, -4.0, -3.5, -3.0],
        [-100.0, -120.0, -100.0, -100.0],
    ]
    columns = np.tile(rows, (3, 1)).T
    each = {"beta": beta * np.ones(15)}
    if name == "spo with a gap":
        each["reward_gap"] = np.linspace(0.4, 2.5, 15)
    given = {key: backend.array(array) for key, array in each.items()}
    given |= {"beta": beta} if isinstance(beta, float) else {}
    found = function(*backend.arrays(*columns), **given, **options)
    for i, row in enumerate(columns.T):
        parameters = {key: float(array[i]) for key, array in each.items()}
        exact = exact_prob_grad(row, spo=name.startswith("spo"), **parameters, **options)
        for got, want in zip(found, exact, strict=True):
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
