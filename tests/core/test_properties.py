"""The mathematics of the losses, as sentences that hypothesis tries to refute.

h is the margin of a pair in nats, x = beta * h, l the loss and s = dl/dh its slope. The law of a
formula is checked in NumPy, because test_losses.py holds every library to the same values. A law
about automatic differentiation, or about the sum over a batch, is checked in each library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

import spoloss
from helpers.backends import BACKENDS, DIFFERENTIABLE, gradients
from helpers.pairs import TwoSided
from spoloss import DPO, SPO, Squared

E = math.e
EPS = float(np.finfo(np.float64).eps)

x_values = st.floats(-30.0, 30.0)
betas = st.floats(0.01, 10.0)
factors = st.floats(0.1, 10.0)
guards = st.floats(-5.0, 0.9)
smoothings = st.floats(0.01, 0.45)
spo = st.builds(SPO, linear_below=st.none() | guards)
dpo = st.builds(DPO, label_smoothing=st.just(0.0) | smoothings)
losses = spo | dpo | st.just(Squared())
fours = arrays(np.float64, (4, 6), elements=st.floats(-6.0, 0.0))
"""Four log-probabilities of six pairs."""


def per_pair(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, 6, elements=elements)


by_library = pytest.mark.parametrize("library", DIFFERENTIABLE)
in_each_library = pytest.mark.parametrize("library", BACKENDS)


def at(function: Callable[..., Any], x: float, beta: float = 1.0) -> float:
    """A loss's value or slope at h = x / beta."""
    return float(function(np.array([x / beta]), beta)[0])


def close(got: Any, want: Any, scale: Any = 1.0, *, library: str = "numpy") -> None:
    """Equal up to a few rounding errors of numbers of the size `scale`."""
    rtol = BACKENDS[library].rtol(1e-9)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol, 1e-2 * rtol * np.max(scale))


# The slope is the derivative


@by_library
@given(losses, x_values, betas)
def test_the_slope_is_the_derivative_of_the_value(
    library: str, loss: Any, x: float, beta: float
) -> None:
    h = np.array([x / beta])
    (derivative,) = gradients(BACKENDS[library], lambda h: loss.value(h, beta).sum(), h)
    slope = loss.slope(h, beta)
    close(derivative, slope, beta * (1.0 + abs(x)) * math.exp(max(-x, 0.0)), library=library)


@given(losses, st.lists(st.floats(-4.0, 4.0), min_size=1, max_size=3), st.floats(0.1, 2.0))
@example(DPO(), [0.0], 0.2)  # where training starts, and abs(x) would have the derivative 0
@example(DPO(label_smoothing=0.1), [0.0], 0.2)
def test_derivatives_by_margin_and_beta_are_limits_of_differences(
    loss: Any, xs: list[float], beta: float
) -> None:
    """The first and the second, which is not defined at the point where the tangent begins."""
    kink = getattr(loss, "linear_below", None)
    assume(kink is None or all(abs(x - kink) > 1e-2 for x in xs))
    h = torch.tensor(xs, dtype=torch.float64).div(beta).requires_grad_()
    inputs = (h, torch.tensor(beta, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(loss.value, inputs)
    assert torch.autograd.gradgradcheck(loss.value, inputs)
    assert torch.autograd.gradcheck(loss.slope, inputs)


@by_library
@given(losses, fours, betas | per_pair(betas), st.sampled_from(("sum", "mean")))
def test_the_gradients_of_the_four_are_s_minus_s_minus_s_and_s(
    library: str, loss: Any, logps: np.ndarray, beta: Any, reduction: str
) -> None:
    """So they add up to 0: no loss of the margin raises both completions."""
    backend = BACKENDS[library]
    theirs = beta if isinstance(beta, float) else backend.array(beta)
    total = lambda *four: spoloss.pair_loss(loss, *four, beta=theirs, reduction=reduction)  # noqa: E731
    found = gradients(backend, total, *logps)
    chosen, rejected = spoloss.pair_grad(loss, *logps, beta=beta, reduction=reduction)
    s = loss.slope(spoloss.log_ratio_margin(*logps), beta) / (6 if reduction == "mean" else 1)
    close(chosen, s, np.abs(s))
    np.testing.assert_array_equal(rejected, -chosen)
    for got, sign in zip(found, (1.0, -1.0, -1.0, 1.0), strict=True):
        close(got, sign * s, np.abs(s).max() + np.max(beta), library=library)


@by_library
@given(fours, betas, per_pair(st.floats(-2.0, 2.0)))
def test_a_loss_of_two_log_ratios_has_two_slopes_and_the_references_take_them_back(
    library: str, logps: np.ndarray, beta: float, weights: np.ndarray
) -> None:
    backend, options = BACKENDS[library], {"beta": beta, "reward_gap": 2.0, "reduction": "sum"}
    total = lambda *four: spoloss.pair_loss(  # noqa: E731
        TwoSided(), *four, weights=backend.array(weights), **options
    )
    found = gradients(backend, total, *logps)
    grad = spoloss.pair_grad(TwoSided(), *logps, weights=weights, **options)
    slopes = TwoSided().slopes(logps[0] - logps[2], logps[1] - logps[3], beta / 2.0)
    for got, slope in zip(grad, slopes, strict=True):
        close(got, weights * slope, np.abs(slope).max())
    signed = (*grad, -grad.policy_chosen, -grad.policy_rejected)
    for got, want in zip(found, signed, strict=True):
        close(got, want, np.abs(want).max() + beta, library=library)


# SPO: l = -x e^-x


@given(x_values, betas)
def test_spo_has_its_minimum_minus_1_over_e_at_x_1(x: float, beta: float) -> None:
    least = at(SPO().value, 1.0, beta)
    assert least == pytest.approx(-1.0 / E, rel=1e-14)
    assert at(SPO().value, x, beta) >= least - EPS
    assert at(SPO().slope, x, beta) * (x - 1.0) >= 0.0


@given(x_values, x_values)
def test_spo_is_convex_below_2_and_concave_above(a: float, b: float) -> None:
    low, high = sorted((a, b))
    rise = at(SPO().slope, high) - at(SPO().slope, low)
    assert rise >= 0.0 or high > 2.0
    assert rise <= 0.0 or low < 2.0


@given(st.floats(1.0, 700.0), st.floats(1.0, 700.0))
def test_past_the_target_spo_rises_to_0_where_it_began(a: float, b: float) -> None:
    """To be "too confident" costs as much as no training at all, and 1/e more than the target."""
    low, high = sorted((a, b))
    assert at(SPO().value, low) <= at(SPO().value, high) * (1.0 - 4.0 * EPS) < 0.0
    assert at(SPO().value, np.inf) == at(SPO().value, 0.0) == 0.0


@given(st.floats(1.0, 700.0), betas)
def test_spo_pulls_back_hardest_at_2_with_a_slope_of_e_to_the_minus_2(
    x: float, beta: float
) -> None:
    hardest = beta * E**-2
    assert at(SPO().slope, 2.0, beta) == pytest.approx(hardest, rel=1e-14)
    assert at(SPO().slope, x, beta) <= hardest * (1.0 + 4.0 * EPS)


@given(st.floats(-700.0, 0.0))
def test_below_0_spo_grows_like_e_to_the_size_of_x_and_has_no_bound(x: float) -> None:
    size = abs(x)
    close(at(SPO().value, x), size * math.exp(size), size * math.exp(size))
    close(at(SPO().slope, x), -(1.0 + size) * math.exp(size), (1.0 + size) * math.exp(size))


@pytest.mark.parametrize(("dtype", "last"), [(np.float32, -84.3), (np.float64, -703.2)])
def test_where_spo_overflows(dtype: type, last: float) -> None:
    value = SPO().value(np.array([last + 0.1, last - 0.1], dtype), 1.0)
    np.testing.assert_array_equal(np.isfinite(value), [True, False])
    np.testing.assert_array_equal(SPO().slope(np.array([last - 2.0], dtype), 1.0), -np.inf)


@given(x_values, guards, betas)
def test_the_guard_is_the_tangent_below_x0_and_spo_above_it(
    x: float, x0: float, beta: float
) -> None:
    guarded, plain = SPO(linear_below=x0), SPO()
    value, slope = at(guarded.value, x, beta), at(guarded.slope, x, beta)
    if x > x0 + 1e-9:
        assert value == at(plain.value, x, beta)
        assert slope == at(plain.slope, x, beta)
    if x < x0 - 1e-9:
        steepness = (x0 - 1.0) * math.exp(-x0)
        tangent = -x0 * math.exp(-x0) + steepness * (x - x0)
        close(value, tangent, abs(tangent) + 1.0)
        close(slope, beta * steepness, beta)
        assert value <= at(plain.value, x, beta) * (1.0 + 1e-12) + 1e-12
    assert abs(slope) <= beta * max((1.0 - x0) * math.exp(-x0), E**-2) * (1.0 + 4.0 * EPS)


@pytest.mark.parametrize(("k", "mean", "deviation"), [(3, 1.01, 0.36), (32, 0.94, 0.64)])
def test_where_ranked_completions_lead(k: int, mean: float, deviation: float) -> None:
    """The gaps of K ranked completions add up, so the x of their pairs cannot all be 1."""
    better, worse = np.triu_indices(k, 1)

    def of_scores(scores: np.ndarray) -> tuple[float, np.ndarray]:
        x, gradient = scores[better] - scores[worse], np.zeros(k)
        np.add.at(gradient, better, SPO().slope(x, 1.0))
        np.add.at(gradient, worse, -SPO().slope(x, 1.0))
        return float(SPO().value(x, 1.0).sum()), gradient

    found = minimize(of_scores, -np.arange(k) / k, jac=True).x
    x = found[better] - found[worse]
    assert (x.mean(), x.std()) == pytest.approx((mean, deviation), abs=6e-3)
    if k == 3:
        assert sorted(x) == pytest.approx([0.76, 0.76, 1.52], abs=6e-3)


# DPO: l = -log s(x)


@given(x_values, x_values, betas)
def test_dpo_falls_at_every_margin_and_never_faster_than_beta(
    a: float, b: float, beta: float
) -> None:
    low, high = sorted((a, b))
    assert at(DPO().value, high, beta) <= at(DPO().value, low, beta)
    assert -beta <= at(DPO().slope, low, beta) <= at(DPO().slope, high, beta) < 0.0


@given(st.floats(40.0, 1e12), betas)
def test_dpo_has_no_minimum_its_slope_is_minus_e_to_the_minus_x(x: float, beta: float) -> None:
    sign, log_abs = DPO().log_slope(np.array([x / beta]), beta)
    assert sign == -1.0
    close(log_abs, math.log(beta) - x, x)


@given(x_values, betas)
def test_dpo_differs_from_its_mirror_by_minus_x(x: float, beta: float) -> None:
    close(at(DPO().value, x, beta) - at(DPO().value, -x, beta), -x, 1.0 + abs(x))


@given(x_values, smoothings, betas)
def test_smoothing_mixes_both_labels_with_the_minimum_at_their_log_odds(
    x: float, e: float, beta: float
) -> None:
    smooth, target = DPO(label_smoothing=e), math.log((1.0 - e) / e)
    mixture = (1.0 - e) * at(DPO().value, x, beta) + e * at(DPO().value, -x, beta)
    close(at(smooth.value, x, beta), mixture, 1.0 + abs(x))
    assert abs(at(smooth.slope, target, beta)) <= 1e-14 * beta
    assert at(smooth.slope, x, beta) * (x - target) >= -1e-13 * beta


@given(st.floats(-5.0, 5.0), st.floats(-5.0, 5.0), betas)
def test_with_labels_of_bradley_and_terry_dpo_leads_to_the_gap(
    x: float, gap: float, beta: float
) -> None:
    """The labels agree with probability s(gap). Then the expected loss is smallest at x = gap."""
    right = 1.0 / (1.0 + math.exp(-gap))
    slope = right * at(DPO().slope, x, beta) - (1.0 - right) * at(DPO().slope, -x, beta)
    assert slope * (x - gap) >= -1e-13 * beta


# The squared loss: l = (h - 1 / beta)^2


@given(x_values, betas)
def test_the_squared_loss_is_the_squared_distance_to_1_over_beta(x: float, beta: float) -> None:
    close(at(Squared().value, 1.0 + x, beta), (x / beta) ** 2, ((1.0 + abs(x)) / beta) ** 2)
    close(at(Squared().slope, 1.0 + x, beta), 2.0 * x / beta, (1.0 + abs(x)) / beta)


@given(fours, betas)
def test_ipo_is_the_squared_loss_at_twice_the_beta(logps: np.ndarray, beta: float) -> None:
    pc, pr, rc, rr = logps
    want = np.mean(((pc - pr) - (rc - rr) - 1.0 / (2.0 * beta)) ** 2)
    close(spoloss.ipo_loss(*logps, beta=beta), want, want)
    close(spoloss.squared_loss(*logps, beta=2.0 * beta), want, want)
    close(spoloss.squared_loss(*logps, beta=beta, reward_gap=0.5), want, want)


# One loss beside another


@given(st.floats(-0.05, 0.05), betas)
def test_near_the_reference_spo_is_half_of_dpo_at_4_beta_and_ipo(x: float, beta: float) -> None:
    """log(1 + e^-4x) = log 2 + 2 l + x^3 + ..., and (x - 1/2)^2 = 1/4 + l + x^3 / 2 + ..."""
    assert at(DPO().slope, 0.0, 4.0 * beta) == 2.0 * at(SPO().slope, 0.0, beta)
    value, h = at(SPO().value, x, beta), np.array([x / beta])
    dpo_rest = float(DPO().value(h, 4.0 * beta)[0]) - math.log(2.0) - 2.0 * value
    ipo_rest = beta**2 * float(Squared().value(h, 2.0 * beta)[0]) - 0.25 - value
    assert abs(dpo_rest - x**3) <= 4.0 * x**4 + 4.0 * EPS
    assert abs(ipo_rest - x**3 / 2.0) <= x**4 + 4.0 * EPS


@given(st.floats(0.0, 300.0))
def test_where_the_slopes_of_spo_and_dpo_vanish_that_of_spo_is_larger(x: float) -> None:
    """From x = 1.866 on; below 0 it is the larger one too, and there without bound."""
    crossing = float(mpmath.findroot(lambda x: (x - 1) * (1 + mpmath.exp(-x)) - 1, 2))
    assert crossing == pytest.approx(1.866, abs=5e-4)
    above = crossing + 1e-6 + x
    assert at(SPO().slope, above) > -at(DPO().slope, above) > 0.0
    assert at(SPO().slope, -x) <= math.exp(x) * 2.0 * at(DPO().slope, 0.0)


@given(st.floats(-20.0, 30.0))
def test_the_curvature_of_dpo_is_bounded_and_that_of_spo_is_not(x: float) -> None:
    """With respect to x: 2 - x times e^-x for SPO; between 0 and 1/4 for DPO."""
    curvature = {}
    for loss in (SPO(), DPO()):
        h = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss.value(h, 1.0).sum(), h, create_graph=True)
        curvature[type(loss)] = float(torch.autograd.grad(slope.sum(), h)[0])
    close(curvature[SPO], (2.0 - x) * math.exp(-x), (2.0 + abs(x)) * math.exp(-x))
    assert 0.0 < curvature[DPO] <= 0.25


# Laws that every loss keeps


@given(spo | dpo, x_values, betas, factors)
def test_beta_is_the_unit_of_the_margin(loss: Any, x: float, beta: float, factor: float) -> None:
    size = (1.0 + abs(x)) * math.exp(max(-x, 0.0))
    close(at(loss.value, x, beta), at(loss.value, x, beta * factor), size)
    steeper = at(loss.slope, x, beta * factor)
    close(steeper, factor * at(loss.slope, x, beta), beta * factor * size)


@given(x_values, betas, factors)
def test_the_squared_loss_is_measured_in_squared_nats(x: float, beta: float, factor: float) -> None:
    want = factor**2 * at(Squared().value, x, beta * factor)
    close(at(Squared().value, x, beta), want, ((1.0 + abs(x)) / beta) ** 2)


@given(fours, st.floats(0.01, 1.0), factors)
def test_a_reward_gap_is_a_smaller_beta(logps: np.ndarray, beta: float, gap: float) -> None:
    """So the target moves to gap / beta, with a wrong guess of the gap as well."""
    for function in (spoloss.spo_loss, spoloss.squared_loss):
        got = function(*logps, beta=beta, reward_gap=gap, reduction="none")
        want = function(*logps, beta=beta / gap, reduction="none")
        close(got, want, np.abs(want).max() + 1.0)


@given(losses, fours, st.floats(-50.0, 50.0))
def test_only_the_difference_of_the_log_ratios_counts(
    loss: Any, logps: np.ndarray, shift: float
) -> None:
    pc, pr, rc, rr = logps
    want = spoloss.pair_loss(loss, pc, pr, rc, rr, beta=0.5)
    for moved in (
        (pc + shift, pr, rc + shift, rr),
        (pc, pr + shift, rc, rr + shift),
        (pc + shift, pr + shift, rc, rr),
        (pc, pr, rc + shift, rr + shift),
    ):
        close(spoloss.pair_loss(loss, *moved, beta=0.5), want, abs(want) + 100.0)


@given(losses, fours)
def test_swapping_the_completions_negates_the_margin(loss: Any, logps: np.ndarray) -> None:
    pc, pr, rc, rr = logps
    h = spoloss.log_ratio_margin(pc, pr, rc, rr)
    np.testing.assert_array_equal(h, (pc - rc) - (pr - rr))  # equation 4
    got = spoloss.pair_loss(loss, pr, pc, rr, rc, beta=0.5, reduction="none")
    close(got, loss.value(-h, 0.5), np.abs(got) + 1.0)


@in_each_library
@given(losses, fours, st.permutations(range(6)), per_pair(st.floats(-2.0, 2.0)))
def test_a_batch_is_its_pairs_in_any_order_each_times_its_weight(
    library: str, loss: Any, logps: np.ndarray, order: list[int], weights: np.ndarray
) -> None:
    array, h = BACKENDS[library].array, (logps[0] - logps[2]) - (logps[1] - logps[3])
    each = weights * loss.value(h, 0.5)
    shuffled = [array(np.ascontiguousarray(column[order])) for column in logps]
    options = {"beta": 0.5, "weights": array(weights[order])}
    for reduction, want in (("none", each[order]), ("sum", each.sum()), ("mean", each.sum() / 6)):
        got = spoloss.pair_loss(loss, *shuffled, reduction=reduction, **options)
        close(got, want, np.abs(each).sum() + 1.0, library=library)


@given(losses, st.sampled_from((-np.inf, np.inf)), betas)
def test_value_and_slope_approach_their_values_at_infinity(
    loss: Any, infinity: float, beta: float
) -> None:
    """A forbidden token gives log pi = -inf, and no loss may become nan there."""
    far = math.copysign(1e300, infinity)
    for function in (loss.value, loss.slope):
        limit, nearly = at(function, infinity, beta), at(function, far, beta)
        diverges = math.isinf(limit) and limit * nearly > 1e100
        assert diverges or limit == pytest.approx(nearly, rel=1e-12)


# What the losses do to a policy: sections 2.1 and 3.1 of the paper


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 5.0))
def test_the_optimal_policy_has_the_margins_of_equation_5(seed: int, beta: float) -> None:
    """The policy pi_ref e^(r / beta) / Z maximises E[r] - beta KL. Its margins are gaps / beta."""
    rng = np.random.default_rng(seed)
    known, reward = np.log(rng.dirichlet(np.ones(6))), rng.normal(size=6)
    best = known + reward / beta
    best -= np.logaddexp.reduce(best)
    scores = torch.tensor(best, requires_grad=True)
    policy = scores.log_softmax(0)
    objective = (
        policy.exp() * (torch.tensor(reward) - beta * (policy - torch.tensor(known)))
    ).sum()
    (gradient,) = torch.autograd.grad(objective, scores)
    close(gradient, 0.0)
    won, lost = np.triu_indices(6, 1)
    h = spoloss.log_ratio_margin(best[won], best[lost], known[won], known[lost])
    close(h, (reward[won] - reward[lost]) / beta, 10.0 / beta)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 5.0), st.floats(0.05, 1.0))
def test_a_step_of_dpo_on_one_pair_raises_the_chosen_completion(
    seed: int, spread: float, beta: float
) -> None:
    """Section 3.1 says that it forces both down. Of a softmax over a table it never does."""
    scores = torch.tensor(np.random.default_rng(seed).normal(size=(1, 8)) * spread)
    scores.requires_grad_()
    policy, zero = scores.log_softmax(-1), torch.zeros(1, dtype=torch.float64)
    loss = spoloss.dpo_loss(policy[:, 0], policy[:, 1], zero, zero, beta=beta)
    (gradient,) = torch.autograd.grad(loss, scores)
    stepped = (scores - gradient).log_softmax(-1)
    assert stepped[0, 0] > policy[0, 0]
    assert stepped[0, 1] < policy[0, 1]


@given(st.integers(0, 2**32 - 1), st.floats(-3.0, 8.0), spo | st.just(Squared()))
def test_on_one_pair_every_loss_moves_a_network_along_one_line(
    seed: int, x: float, loss: Any
) -> None:
    """Below its target SPO moves it as DPO does, and above the target the other way."""
    assume(abs(x - 1.0) > 1e-3)
    random = torch.Generator().manual_seed(seed)
    inputs, layer = (torch.randn(*shape, generator=random).double() for shape in ((5,), (9, 5)))
    layer.requires_grad_()
    policy = torch.tanh(layer @ inputs).log_softmax(-1)
    # The reference sets where the pair stands.
    reference = policy[:1].detach() - x / 0.1, policy[1:2].detach()

    def direction(loss: Any) -> torch.Tensor:
        value = spoloss.pair_loss(loss, policy[:1], policy[1:2], *reference, beta=0.1)
        gradient = torch.autograd.grad(value, layer, retain_graph=True)[0].ravel()
        return gradient / gradient.norm()

    cosine = float(torch.dot(direction(DPO()), direction(loss)))
    assert cosine == pytest.approx(1.0 if x < 1.0 else -1.0, abs=1e-9)
