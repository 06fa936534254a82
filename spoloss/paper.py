"""Layer 2: the paper's equations 7 and 8, the derivatives with respect to probabilities.

They are for reading the paper beside numbers. Networks backpropagate from the derivatives with
respect to log-probabilities (`spoloss.gradients`), which stay in the range of floating point.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spoloss._arrays import ArrayT, conform, quiet
from spoloss._inputs import LOGPS, beta_for_gap, margins
from spoloss.losses import DPO, SPO, SignedLog


class PairProbGrad(NamedTuple):
    """Derivatives of each pair's loss with respect to the policy's probabilities.

    Attributes:
      policy_chosen: The derivative with respect to pi(y_w), as sign and log-magnitude.
      policy_rejected: The derivative with respect to pi(y_l).
    """

    policy_chosen: SignedLog
    policy_rejected: SignedLog


def spo_prob_grad(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
    reward_gap: ArrayT | float | None = None,
    linear_below: float | None = None,
) -> PairProbGrad:
    """The derivatives of each pair's SPO loss with respect to probabilities, paper eq. 8.

        dl/dpi(y_l) = -b * (x - 1) * e^(-x) / pi(y_l),   x = b * h,   b = beta / reward_gap
        dl/dpi(y_w) =  b * (x - 1) * e^(-x) / pi(y_w)

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    As pi(y_l) -> 0 with the rest fixed, |dl/dpi(y_l)| behaves like pi(y_l)^(b - 1) * log(1 /
    pi(y_l)). The paper says that it vanishes. That is true only for b > 1, and for the usual beta
    it diverges.

    Source: Y. Tan, "A Stable and Principled Loss Function for Direct Language Model Alignment",
    arXiv:2508.07137v1 ("the paper").

    Under `jax.jit`, `linear_below` is a static argument.

    Args:
      policy_chosen_logps: log pi(y_w) of each pair, summed over the tokens, in nats, finite. [B].
      policy_rejected_logps: log pi(y_l), finite. Shape [B].
      reference_chosen_logps: log pi_ref(y_w). Shape [B], or the number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l). Shape [B], or 0.0.
      beta: Inverse of the target margin for a reward gap of 1, in 1 / nats, > 0. A number, or an
        array that is 0-d or of shape [B].
      reward_gap: Known difference of the two rewards, r_w - r_l > 0, which moves the target to
        reward_gap / beta. A number, or an array that is 0-d or of shape [B]. None means 1, the
        paper's choice for an unknown gap.
      linear_below: x0 in (-700, 1). For x < x0 the loss continues along its tangent at x0, where
        dl/dx = -(1 - x0) * e^(-x0). None is equation 6 as published.

    Returns:
      PairProbGrad(policy_chosen, policy_rejected), each a SignedLog(sign, log_abs) of two arrays of
      shape [B]. The derivative is sign * exp(log_abs), which overflows any float type at the
      log-probabilities of long sequences.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first, or
        `linear_below` is not a number.
      ValueError: The shapes differ, or a number is out of range (arrays are not inspected).
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
    beta: ArrayT | float,
    label_smoothing: float = 0.0,
) -> PairProbGrad:
    """The derivatives of each pair's DPO loss with respect to probabilities, paper eq. 7.

        dl/dpi(y_l) =  beta * s(-x) / pi(y_l),   x = beta * h,   s(x) = 1 / (1 + e^(-x))
        dl/dpi(y_w) = -beta * s(-x) / pi(y_w)

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    With label smoothing e, (1 - e) * s(-x) - e * s(x) replaces s(-x). As pi(y_l) -> 0 with the rest
    fixed, |dl/dpi(y_l)| behaves like pi(y_l)^(beta - 1).

    Source: Y. Tan, "A Stable and Principled Loss Function for Direct Language Model Alignment",
    arXiv:2508.07137v1 ("the paper").

    Under `jax.jit`, `label_smoothing` is a static argument.

    Args:
      policy_chosen_logps: log pi(y_w) of each pair, summed over the tokens, in nats, finite. [B].
      policy_rejected_logps: log pi(y_l), finite. Shape [B].
      reference_chosen_logps: log pi_ref(y_w). Shape [B], or the number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l). Shape [B], or 0.0.
      beta: Strength of the pull to the reference, in 1 / nats, > 0. A number, or an array that is
        0-d or of shape [B].
      label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels
        (conservative DPO).

    Returns:
      PairProbGrad(policy_chosen, policy_rejected), each a SignedLog(sign, log_abs) of two arrays of
      shape [B]. The derivative is sign * exp(log_abs), which overflows any float type at the
      log-probabilities of long sequences.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first, or
        `label_smoothing` is not a number.
      ValueError: The shapes differ, or a number is out of range (arrays are not inspected).
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
def _prob_grad(loss: SPO | DPO, *logps: Any, beta: Any, reward_gap: Any = None) -> PairProbGrad:
    margin = margins(*logps)
    sign, log_abs = loss.log_slope(margin, beta_for_gap(beta, reward_gap, margin))
    # d(log pi)/d(pi) = 1 / pi, so subtract log pi.
    pc, pr = conform(LOGPS[:2], logps[:2], numbers_from=2)
    return PairProbGrad(SignedLog(sign, log_abs - pc), SignedLog(-sign, log_abs - pr))
