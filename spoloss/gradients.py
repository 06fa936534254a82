"""Layer 2: the analytic gradients, for NumPy (no autograd) and for checking the others.

By log-probability, where a network's gradient lives: `spo_grad`, `dpo_grad`, `squared_grad`. By
probability, as the paper states them: equations 7 and 8, `dpo_prob_grad` and `spo_prob_grad`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spoloss._arrays import ArrayT, check_reduction, conform, quiet, shares
from spoloss.losses import DPO, SPO, MarginLoss, SignedLog, Squared
from spoloss.pairs import IPO_GAP, LOGPS, beta_for_gap, check_loss, margins, weighted


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
    weights: ArrayT | float | None = None,
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
    return reduced_grad(
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


def dpo_grad(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float = 0.1,
    label_smoothing: float = 0.0,
    weights: ArrayT | float | None = None,
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
    return reduced_grad(
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
    weights: ArrayT | float | None = None,
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
    return reduced_grad(
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


def ipo_grad(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float = 0.1,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> PairGrad:
    """The gradient of `ipo_loss` with the same arguments, by the policy's log-probabilities.

    dl/dh = 2 * (h - 1 / (2 * beta))
    """
    return reduced_grad(
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


def pair_grad(
    loss: MarginLoss,
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> PairGrad:
    """The gradient of `pair_loss` with the same arguments, from the loss's own slope.

    Returns:
      As `spo_grad`.

    Raises:
      TypeError: as `pair_loss`.
      ValueError: as `pair_loss`.
    """
    return reduced_grad(
        loss,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        weights=weights,
        reduction=reduction,
    )


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
        beta=beta,
        reward_gap=reward_gap,
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
        beta=beta,
    )


@quiet
def reduced_grad(
    loss: MarginLoss, *logps: Any, beta: Any, weights: Any, reduction: str, reward_gap: Any = None
) -> PairGrad:
    """`pair_grad` by the four log-probabilities, with a reward gap where the loss takes one."""
    check_loss(loss)
    check_reduction(reduction)
    slopes = shares(weighted(loss.slope, margins(*logps), beta, reward_gap, weights), reduction)
    return PairGrad(slopes, -slopes)


@quiet
def _prob_grad(loss: SPO | DPO, *logps: Any, beta: Any, reward_gap: Any = None) -> PairProbGrad:
    margin = margins(*logps)
    sign, log_abs = loss.log_slope(margin, beta_for_gap(beta, reward_gap, margin))
    # d(log pi)/d(pi) = 1 / pi is a subtraction of logs.
    pc, pr = conform(LOGPS[:2], logps[:2], numbers_from=2)
    return PairProbGrad(SignedLog(sign, log_abs - pc), SignedLog(-sign, log_abs - pr))
