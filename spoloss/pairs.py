"""Layer 2: from the four log-probabilities of a batch of pairs to a loss.

NumPy raises no warnings here. The mean of no pairs is nan, inf - inf is nan, and overflow gives
inf, as in the other libraries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spoloss._arrays import ArrayT, check_reduction, detach, per_pair, quiet, reduce
from spoloss._inputs import inputs, log_ratios
from spoloss.losses import DPO, SPO, MarginLoss, PairLoss, Squared

IPO_GAP = 0.5
"""IPO is the squared loss at this reward gap: its target is 1 / (2 * beta)."""


class Rewards(NamedTuple):
    """The implicit rewards of a batch of pairs, beta * log(pi / pi_ref), [B] each."""

    chosen: Any
    rejected: Any


def spo_loss(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
    reward_gap: ArrayT | float | None = None,
    linear_below: float | None = None,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """The loss of Stable Preference Optimization (SPO), arXiv:2508.07137v1, eq. 6.

        l = -x * e^(-x),   x = beta * h / reward_gap

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats:
    y_w is the chosen completion, y_l the rejected one, pi the policy, pi_ref the reference (eq. 4).

    The minimum, -1/e per pair, is at h = reward_gap / beta. The loss is 0 if the policy equals the
    reference, and negative in between. Near the reference, SPO(beta) acts like DPO(4 * beta). The
    curvature at the minimum grows like 1 / reward_gap^2. With small gaps, pass
    `weights=reward_gap**2` and `linear_below`.

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: inverse of the target margin for a reward gap of 1, 1 / nats, > 0: a number or [B].
      reward_gap: known difference of the rewards, r_w - r_l > 0: a number or [B]. None means 1.
      linear_below: x0 in (-700, 1), or None. For x < x0 the loss continues along its tangent.
      weights: factor of each pair: a number or [B]. 0 leaves a pair out. None means 1.
      reduction: "mean" over the pairs, "sum" or "none"; static under jax.jit, as `linear_below`.

    Returns:
      The loss: 0-d, or [B] for "none". float64 if any of the four is, else float32.

    Raises:
      TypeError: as `pair_loss`, or `linear_below` is not a number.
      ValueError: as `pair_loss`, or `linear_below` is out of range.
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _loss(SPO(linear_below), *policies, *references, beta, reward_gap, weights, reduction)


def dpo_loss(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
    label_smoothing: float = 0.0,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """The loss of Direct Preference Optimization (DPO), arXiv:2305.18290, eq. 7.

        l = -(1 - e) * log s(x) - e * log s(-x),   x = beta * h,   s(x) = 1 / (1 + e^(-x))

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats:
    y_w is the chosen completion, y_l the rejected one, pi the policy, pi_ref the reference.

    It is log 2 per pair if the policy equals the reference. With e > 0 it is conservative DPO.
    Without label smoothing it decreases everywhere, towards 0.

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: strength of the pull to the reference, 1 / nats, > 0: a number or [B].
      label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels.
      weights: factor of each pair: a number or [B]. 0 leaves a pair out. None means 1.
      reduction: "mean" over the pairs, "sum" or "none"; static under jax.jit, as `label_smoothing`.

    Returns:
      The loss: 0-d, or [B] for "none". float64 if any of the four is, else float32.

    Raises:
      TypeError: as `pair_loss`, or `label_smoothing` is not a number.
      ValueError: as `pair_loss`, or `label_smoothing` is out of range.
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _loss(DPO(label_smoothing), *policies, *references, beta, None, weights, reduction)


def squared_loss(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
    reward_gap: ArrayT | float | None = None,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """The squared error of the margin to its target, arXiv:2508.07137v1, section 2.2.

        l = (h - reward_gap / beta)^2, in nats^2

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats:
    y_w is the chosen completion, y_l the rejected one, pi the policy, pi_ref the reference (eq. 4).

    The minimum, 0, is at h = reward_gap / beta. A gap of 0.5 is IPO (`ipo_loss`).

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: inverse of the target margin for a reward gap of 1, 1 / nats, > 0: a number or [B].
      reward_gap: known difference of the rewards, r_w - r_l > 0: a number or [B]. None means 1.
      weights: factor of each pair: a number or [B]. 0 leaves a pair out. None means 1.
      reduction: "mean" over the pairs, "sum" or "none"; static under jax.jit.

    Returns:
      The loss: 0-d, or [B] for "none". float64 if any of the four is, else float32.

    Raises:
      TypeError: as `pair_loss`.
      ValueError: as `pair_loss`.
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _loss(Squared(), *policies, *references, beta, reward_gap, weights, reduction)


def ipo_loss(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """The loss of Identity Preference Optimization (IPO), arXiv:2310.12036, eq. 17.

        l = (h - 1 / (2 * beta))^2, in nats^2

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats:
    y_w is the chosen completion, y_l the rejected one, pi the policy, pi_ref the reference.

    The minimum, 0, is at h = 1 / (2 * beta): the squared loss with a reward gap of 0.5, or with
    twice the beta. The published loss and this one sum log-probabilities over tokens. Some
    libraries average them.

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: half of the inverse of the target margin, 1 / nats, > 0: a number or [B].
      weights: factor of each pair: a number or [B]. 0 leaves a pair out. None means 1.
      reduction: "mean" over the pairs, "sum" or "none"; static under jax.jit.

    Returns:
      The loss: 0-d, or [B] for "none". float64 if any of the four is, else float32.

    Raises:
      TypeError: as `pair_loss`.
      ValueError: as `pair_loss`.
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _loss(Squared(), *policies, *references, beta, IPO_GAP, weights, reduction)


def pair_loss(
    loss: MarginLoss | PairLoss,
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
    reward_gap: ArrayT | float | None = None,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """A loss of the two log-ratios, or of their difference, reduced over a batch of pairs.

        l = loss.value(u_w, u_l, b),   b = beta / reward_gap

    u_w = log pi(y_w) - log pi_ref(y_w) and u_l = log pi(y_l) - log pi_ref(y_l) are the log-ratios,
    in nats: y_w is the chosen completion, y_l the rejected one, pi the policy and pi_ref the
    reference. For a loss of the margin h = u_w - u_l, l = loss.value(h, b).

    PyTorch, JAX and MLX can differentiate the result. Under `jax.jit`, `loss` and `reduction` are
    static arguments.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()`, or your own `MarginLoss` or `PairLoss`.
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: passed to the loss, 1 / nats, > 0: a number, or an array, 0-d or [B].
      reward_gap: known r_w - r_l, > 0, which divides beta: a number, or an array, 0-d or [B]. None
        means 1.
      weights: factor of each pair: a number, or an array, 0-d or [B]. It may be negative. A pair of
        weight 0 adds nothing to the loss or to any gradient, even if its log-probabilities, beta or
        reward gap are nan or inf, or the gap is 0. The gradient with respect to a weight is the
        loss of its pair, even at weight 0 (0 if that loss is not finite). None means 1.
      reduction: "mean" (the sum over the pairs divided by B, not by the sum of the weights; nan for
        an empty batch), "sum", or "none".

    Returns:
      The loss: 0-d, or [B] for "none". float64 if any of the four is, else float32.

    Raises:
      TypeError: an array is not real floating point, or from another library than the first, or
        `loss` is not a loss object.
      ValueError: the shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _loss(loss, *policies, *references, beta, reward_gap, weights, reduction)


@quiet
def _loss(
    loss: Any, pc: ArrayT, pr: Any, rc: Any, rr: Any, beta: Any, gap: Any, w: Any, reduction: str
) -> ArrayT:
    check_reduction(reduction)
    values = inputs(loss, (pc, pr, rc, rr), beta, gap, w).values()
    return reduce(values, reduction)  # type: ignore[no-any-return]


@quiet
def log_ratio_margin(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
) -> ArrayT:
    """The margin h of each pair, `logits(pi)` in arXiv:2508.07137v1 (eq. 4).

        h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l))

    y_w is the chosen completion, y_l the rejected one, pi the policy and pi_ref the reference.

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.

    Returns:
      h in nats, [B]. float64 if any of the four is, else float32.

    Raises:
      TypeError: an array is not real floating point, or from another library than the first.
      ValueError: the shapes differ.
    """
    policies = policy_chosen_logps, policy_rejected_logps
    chosen, rejected = log_ratios(*policies, reference_chosen_logps, reference_rejected_logps)
    return chosen - rejected  # type: ignore[no-any-return]


@quiet
def implicit_rewards(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
) -> Rewards:
    """The rewards that the policy implies, arXiv:2508.07137v1, eq. 2, without its constant Z.

        r(y) = beta * (log pi(y) - log pi_ref(y))

    y is a completion, pi the policy and pi_ref the reference. Z is the same for both rewards of a
    pair, so it does not change their difference. The result is for logging, and automatic
    differentiation treats it as a constant.

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: strength of the pull to the reference, 1 / nats, > 0: a number or [B].

    Returns:
      Rewards(chosen, rejected), [B] each. float64 if any of the four is, else float32.

    Raises:
      TypeError: an array is not real floating point, or from another library than the first.
      ValueError: the shapes differ, or a number is out of range (arrays are not inspected).
    """
    policies = policy_chosen_logps, policy_rejected_logps
    ratios = log_ratios(*policies, reference_chosen_logps, reference_rejected_logps)
    beta = per_pair("beta", beta, ratios[0])
    return Rewards(*(detach(beta * ratio) for ratio in ratios))
