"""Layer 2: from the four log-probabilities of a batch of pairs to a loss.

The four come in the order that DPO's reference code set and most trainers follow:
policy chosen, policy rejected, reference chosen, reference rejected. Each is the summed
log-probability of a completion, in nats, of shape [B].
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from spoloss._arrays import (
    ArrayT,
    check_positive,
    check_reduction,
    conform,
    detach,
    is_number,
    namespace,
    per_pair,
    quiet,
    reduce,
)
from spoloss.losses import DPO, SPO, MarginLoss, Squared

LOGPS = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
)

IPO_GAP = 0.5
"""IPO is the squared loss at this reward gap: its target is 1 / (2 * beta)."""


class Rewards(NamedTuple):
    """The implicit rewards beta * log(pi / pi_ref) of both sides, shape [B] each."""

    chosen: Any
    rejected: Any


def spo_loss(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float = 0.1,
    reward_gap: ArrayT | float | None = None,
    linear_below: float | None = None,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """Stable Preference Optimization (Tan 2025; not predict-then-optimize), paper eq. 6.

        l = -x * e^(-x),   x = beta * h / reward_gap

    h is `log_ratio_margin` of the four. Smallest, -1/e per pair, at h = reward_gap / beta. It is 0
    where the policy equals the reference, and negative values are good ones. Near the reference
    SPO(beta) acts like DPO(4 * beta).

    Args:
      policy_chosen_logps: log pi(y_w|x), summed over tokens, nats. Shape [B], real floating.
      policy_rejected_logps: log pi(y_l|x), likewise.
      reference_chosen_logps: log pi_ref(y_w|x), likewise; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l|x), likewise; 0.0 for no reference.
      beta: inverse of the target margin, 1 / nats, > 0: a number or shape [B].
      reward_gap: known reward difference r_w - r_l > 0: a number or shape [B]. None is 1, the
        paper's choice for an unknown gap. Small gaps are steep: see `weights` and `linear_below`.
      linear_below: x0 < 1; for x < x0 the loss continues along its tangent, with slope
        -beta * (1 - x0) * e^(-x0). None is equation 6. Static under `jax.jit`.
      weights: factor of each pair, shape [B]. A pair of weight 0 is left out, whatever its
        log-probabilities hold. "mean" still divides by B.
      reduction: "mean", "sum" or "none". Static under `jax.jit`.

    Returns:
      The reduced loss, 0-d, or shape [B] with "none"; float32, or float64 if the input is.

    Raises:
      TypeError: an argument is not a real floating array, or of another library than the first.
      ValueError: shapes differ, a number is out of range, or the reduction does not exist.
    """
    return reduced_loss(
        SPO(linear_below),
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        reward_gap=reward_gap,
        weights=weights,
        reduction=reduction,
    )


def dpo_loss(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float = 0.1,
    label_smoothing: float = 0.0,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """Direct Preference Optimization, DPO eq. 7 (arXiv:2305.18290).

        l = -(1 - e) * log s(x) - e * log s(-x),   x = beta * h,  s the logistic function

    Args:
      policy_chosen_logps: as for `spo_loss`.
      policy_rejected_logps: as for `spo_loss`.
      reference_chosen_logps: as for `spo_loss`.
      reference_rejected_logps: as for `spo_loss`.
      beta: strength of the pull to the reference, 1 / nats, > 0: a number or shape [B].
      label_smoothing: e in [0, 0.5), the share of labels taken to be flipped (conservative DPO).
        Static under `jax.jit`.
      weights: as for `spo_loss`.
      reduction: as for `spo_loss`.

    Returns:
      As `spo_loss`.

    Raises:
      TypeError: as `spo_loss`.
      ValueError: as `spo_loss`.
    """
    return pair_loss(
        DPO(label_smoothing),
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        weights=weights,
        reduction=reduction,
    )


def squared_loss(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float = 0.1,
    reward_gap: ArrayT | float | None = None,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """Squared error to the optimal margin, the candidate of the paper's section 2.2.

        l = (h - reward_gap / beta)^2, in nats^2

    `reward_gap=0.5` is Identity Preference Optimization (IPO, arXiv:2310.12036) on summed
    log-probabilities.

    Args:
      policy_chosen_logps: as for `spo_loss`.
      policy_rejected_logps: as for `spo_loss`.
      reference_chosen_logps: as for `spo_loss`.
      reference_rejected_logps: as for `spo_loss`.
      beta: inverse of the target margin, 1 / nats, > 0: a number or shape [B].
      reward_gap: known reward difference r_w - r_l > 0: a number or shape [B]. None is 1.
      weights: as for `spo_loss`.
      reduction: as for `spo_loss`.

    Returns:
      As `spo_loss`.

    Raises:
      TypeError: as `spo_loss`.
      ValueError: as `spo_loss`.
    """
    return reduced_loss(
        Squared(),
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        reward_gap=reward_gap,
        weights=weights,
        reduction=reduction,
    )


def ipo_loss(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float = 0.1,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """Identity Preference Optimization (IPO).

    l = (h - 1 / (2 * beta))^2
    """
    return reduced_loss(
        Squared(),
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        reward_gap=IPO_GAP,
        weights=weights,
        reduction=reduction,
    )


def pair_loss(
    loss: MarginLoss,
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """Any loss of the margin, reduced over a batch of pairs; PyTorch and JAX differentiate it.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()` or an object of your own with `value` and `slope`.
      policy_chosen_logps: as for `spo_loss`.
      policy_rejected_logps: as for `spo_loss`.
      reference_chosen_logps: as for `spo_loss`.
      reference_rejected_logps: as for `spo_loss`.
      beta: handed to the loss, 1 / nats, > 0: a number or shape [B].
      weights: as for `spo_loss`.
      reduction: as for `spo_loss`.

    Returns:
      As `spo_loss`.

    Raises:
      TypeError: as `spo_loss`, or `loss` is no loss object.
      ValueError: as `spo_loss`.
    """
    return reduced_loss(
        loss,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        weights=weights,
        reduction=reduction,
    )


@quiet
def log_ratio_margin(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
) -> ArrayT:
    """The margin h, `logits(pi)` of paper eq. 4.

        h = (log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))

    Args:
      policy_chosen_logps: as for `spo_loss`.
      policy_rejected_logps: as for `spo_loss`.
      reference_chosen_logps: as for `spo_loss`.
      reference_rejected_logps: as for `spo_loss`.

    Returns:
      h in nats, shape [B]; float32, or float64 if the input is.

    Raises:
      TypeError: an argument is not a real floating array, or of another library than the first.
      ValueError: the shapes differ.
    """
    return margins(  # type: ignore[no-any-return]
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )


@quiet
def implicit_rewards(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
) -> Rewards:
    """The rewards that the policy implies, r = beta * log(pi / pi_ref) (paper eq. 2 without Z).

    Args:
      policy_chosen_logps: as for `spo_loss`.
      policy_rejected_logps: as for `spo_loss`.
      reference_chosen_logps: as for `spo_loss`.
      reference_rejected_logps: as for `spo_loss`.
      beta: 1 / nats, > 0: a number or shape [B].

    Returns:
      Rewards(chosen, rejected), shape [B] each, constants to autograd (for logging).

    Raises:
      TypeError: as `spo_loss`.
      ValueError: as `spo_loss`.
    """
    chosen, rejected = log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    beta = per_pair("beta", beta, chosen)
    return Rewards(detach(beta * chosen), detach(beta * rejected))


@quiet
def reduced_loss(
    loss: MarginLoss,
    *logps: ArrayT | float,
    beta: ArrayT | float,
    weights: ArrayT | float | None,
    reduction: str,
    reward_gap: ArrayT | float | None = None,
) -> ArrayT:
    """`pair_loss` of the four log-probabilities, with a reward gap where the loss takes one."""
    check_loss(loss)
    check_reduction(reduction)
    values = weighted(loss.value, margins(*logps), beta, reward_gap, weights)
    return reduce(values, reduction)  # type: ignore[no-any-return]


def log_ratios(*logps: Any) -> tuple[Any, Any]:
    """log(pi / pi_ref) of the chosen and of the rejected completions, after all checks."""
    pc, pr, rc, rr = conform(LOGPS, logps, numbers_from=2)
    return pc - rc, pr - rr


def margins(*logps: Any) -> Any:
    """The margin of each pair, after all checks."""
    chosen, rejected = log_ratios(*logps)
    return chosen - rejected


def beta_for_gap(beta: Any, reward_gap: Any, logps: Any) -> Any:
    """The beta of each pair: a known gap has its target at reward_gap / beta, as beta / gap has."""
    beta = per_pair("beta", beta, logps)
    if reward_gap is None:
        return beta
    beta = beta / per_pair("reward_gap", reward_gap, logps)
    if is_number(beta):
        check_positive("beta / reward_gap", beta)
    return beta


def weighted(function: Any, margin: Any, beta: Any, reward_gap: Any, weights: Any) -> Any:
    """A loss's value or slope for each pair, times the pair's weight."""
    if weights is None:
        return function(margin, beta_for_gap(beta, reward_gap, margin))
    xp = namespace(margin)
    weights = per_pair("weights", weights, margin, positive=False)
    if is_number(weights):
        weights = xp.full_like(margin, weights)
    # 0 * inf and 0 * nan are nan, in derivatives too, so what weight 0 leaves out must be finite.
    # Finite pairs of weight 0 stay as they are: the derivative by the weight is their loss.
    usable = _usable(function, margin, beta, reward_gap)
    lost = xp.logical_and(weights == 0.0, xp.logical_not(usable))
    margin, beta, reward_gap = (
        value if value is None or is_number(value) else xp.where(lost, 1.0, value)
        for value in (margin, beta, reward_gap)
    )
    values = function(margin, beta_for_gap(beta, reward_gap, margin))
    return weights * xp.where(lost, 0.0, values)


def _usable(function: Any, margin: Any, beta: Any, reward_gap: Any) -> Any:
    """Where a pair's value is finite, and the derivatives of what it is made of."""
    beta = beta_for_gap(beta, reward_gap, margin)
    terms = [margin, beta, function(margin, beta)]
    if reward_gap is not None:
        terms.append(beta / per_pair("reward_gap", reward_gap, margin))
    xp = namespace(margin)
    finite = (xp.isfinite(term) for term in terms if not is_number(term))
    return functools.reduce(xp.logical_and, finite)


def check_loss(loss: Any) -> None:
    """Refuse what is no loss object, such as a name or a class.

    Raises:
      TypeError: `loss` is a class, or lacks `value` or `slope`.
    """
    if isinstance(loss, type) or not (hasattr(loss, "value") and hasattr(loss, "slope")):
        raise TypeError(
            f"loss must be an object with value and slope, such as SPO() or DPO(), got {loss!r}"
        )
