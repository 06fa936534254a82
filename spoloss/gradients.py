"""Floor 2: the analytic gradients, for NumPy (no autograd) and for checking the others.

By log-probability, where a network's gradient lives: `spo_grad`, `dpo_grad`, `squared_grad`. By
probability, as the paper states them: equations 7 and 8, `dpo_prob_grad` and `spo_prob_grad`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spoloss._arrays import ArrayT, check_reduction, conform, per_pair, reduction_scale
from spoloss.losses import DPO, SPO, MarginLoss, SignedLog, Squared
from spoloss.pairs import LOGPS, beta_for_gap, check_loss, log_ratio_margin, weighted


class PairGrad(NamedTuple):
    """Derivatives by the policy's log-probabilities; those by the reference's are the negatives."""

    policy_chosen: Any
    policy_rejected: Any


class PairProbGrad(NamedTuple):
    """Derivatives by the policy's probabilities, as sign and log-magnitude."""

    policy_chosen: SignedLog
    policy_rejected: SignedLog


def spo_grad(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float = 0.1,
    reward_gap: ArrayT | float | None = None,
    linear_below: float | None = None,
    weights: ArrayT | None = None,
    reduction: str = "mean",
) -> PairGrad:
    """The gradient of `spo_loss` with the same arguments, by the policy's log-probabilities.

        dl/dh = beta * (x - 1) * e^(-x),   x = beta * h

    Returns:
      PairGrad(policy_chosen, policy_rejected), shape [B] each. Under "none" it is the gradient of
      each pair's own loss.

    Raises:
      TypeError: as `spo_loss`.
      ValueError: as `spo_loss`.
    """
    return pair_grad(
        SPO(linear_below),
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta_for_gap(beta, reward_gap, policy_chosen_logps),
        weights=weights,
        reduction=reduction,
    )


def dpo_grad(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float = 0.1,
    label_smoothing: float = 0.0,
    weights: ArrayT | None = None,
    reduction: str = "mean",
) -> PairGrad:
    """The gradient of `dpo_loss` with the same arguments, by the policy's log-probabilities.

        dl/dh = -beta * ((1 - e) * s(-x) - e * s(x)),   x = beta * h

    Returns:
      As `spo_grad`.

    Raises:
      TypeError: as `spo_loss`.
      ValueError: as `spo_loss`.
    """
    return pair_grad(
        DPO(label_smoothing),
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        weights=weights,
        reduction=reduction,
    )


def squared_grad(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float = 0.1,
    reward_gap: ArrayT | float | None = None,
    weights: ArrayT | None = None,
    reduction: str = "mean",
) -> PairGrad:
    """The gradient of `squared_loss` with the same arguments, by the policy's log-probabilities.

        dl/dh = 2 * (h - reward_gap / beta)

    Returns:
      As `spo_grad`.

    Raises:
      TypeError: as `spo_loss`.
      ValueError: as `spo_loss`.
    """
    return pair_grad(
        Squared(),
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta_for_gap(beta, reward_gap, policy_chosen_logps),
        weights=weights,
        reduction=reduction,
    )


def pair_grad(
    loss: MarginLoss,
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
    weights: ArrayT | None = None,
    reduction: str = "mean",
) -> PairGrad:
    """The gradient of `pair_loss` with the same arguments, from the loss's own slope.

    Returns:
      As `spo_grad`.

    Raises:
      TypeError: as `pair_loss`.
      ValueError: as `pair_loss`.
    """
    check_loss(loss)
    check_reduction(reduction)
    margin = log_ratio_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    slope = weighted(loss.slope, margin, beta, weights)
    slope = slope * reduction_scale(slope, reduction)
    return PairGrad(slope, -slope)


def spo_prob_grad(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float = 0.1,
    reward_gap: ArrayT | float | None = None,
    linear_below: float | None = None,
) -> PairProbGrad:
    """The derivatives of each pair's SPO loss by the policy's probabilities; paper eq. 8.

        dl/dpi_l = -(x - 1) * e^(-x) * beta / pi_l,    dl/dpi_w = (x - 1) * e^(-x) * beta / pi_w

    As pi_l -> 0 with the rest fixed, |dl/dpi_l| goes like pi_l^(beta - 1) * log(1 / pi_l): it
    vanishes for beta > 1 only, and diverges for the usual beta (the paper says it vanishes).

    Args:
      policy_chosen_logps: as for `spo_loss`; finite.
      policy_rejected_logps: as for `spo_loss`; finite.
      reference_chosen_logps: as for `spo_loss`.
      reference_rejected_logps: as for `spo_loss`.
      beta: as for `spo_loss`.
      reward_gap: as for `spo_loss`.
      linear_below: as for `spo_loss`.

    Returns:
      PairProbGrad(policy_chosen, policy_rejected), each a SignedLog(sign, log_abs) of arrays of
      shape [B]: the derivative is sign * exp(log_abs), which fits no float at sequence
      log-probabilities of -1,000.

    Raises:
      TypeError: as `spo_loss`.
      ValueError: as `spo_loss`.
    """
    return _prob_grad(
        SPO(linear_below),
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta_for_gap(beta, reward_gap, policy_chosen_logps),
    )


def dpo_prob_grad(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float = 0.1,
    label_smoothing: float = 0.0,
) -> PairProbGrad:
    """The derivatives of each pair's DPO loss by the policy's probabilities; paper eq. 7.

        dl/dpi_l = beta * s(-x) / pi_l,    dl/dpi_w = -beta * s(-x) / pi_w    (e = 0)

    As pi_l -> 0 with the rest fixed, |dl/dpi_l| goes like pi_l^(beta - 1).

    Args:
      policy_chosen_logps: as for `spo_loss`; finite.
      policy_rejected_logps: as for `spo_loss`; finite.
      reference_chosen_logps: as for `spo_loss`.
      reference_rejected_logps: as for `spo_loss`.
      beta: as for `dpo_loss`.
      label_smoothing: as for `dpo_loss`.

    Returns:
      As `spo_prob_grad`.

    Raises:
      TypeError: as `dpo_loss`.
      ValueError: as `dpo_loss`.
    """
    return _prob_grad(
        DPO(label_smoothing),
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )


def _prob_grad(loss: SPO | DPO, pc: Any, pr: Any, rc: Any, rr: Any, beta: Any) -> PairProbGrad:
    margin = log_ratio_margin(pc, pr, rc, rr)
    sign, log_abs = loss.log_slope(margin, per_pair("beta", beta, margin))
    # d(log pi)/d(pi) = 1 / pi is a subtraction of logs.
    pc, pr = conform(LOGPS[:2], (pc, pr), numbers_from=2)
    return PairProbGrad(SignedLog(sign, log_abs - pc), SignedLog(-sign, log_abs - pr))
