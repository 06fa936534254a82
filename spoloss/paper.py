"""Layer 2: the paper's equations 7 and 8, the derivatives with respect to probabilities.

They are for reading the paper beside numbers. Networks backpropagate from the derivatives with
respect to log-probabilities (`spoloss.gradients`), which stay in the range of floating point.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spoloss._arrays import ArrayT, conform, quiet
from spoloss._inputs import LOGPS, beta_for_gap
from spoloss.losses import DPO, SPO, SignedLog
from spoloss.pairs import log_ratio_margin


class PairProbGrad(NamedTuple):
    """Derivatives of each pair's loss with respect to pi(y_w) and pi(y_l), as `SignedLog`."""

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
    """The derivatives of `spo_loss` with respect to probabilities, arXiv:2508.07137v1, eq. 8.

        dl/dpi(y_l) = -b * (x - 1) * e^(-x) / pi(y_l),   x = b * h,   b = beta / reward_gap
        dl/dpi(y_w) =  b * (x - 1) * e^(-x) / pi(y_w)

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats:
    y_w is the chosen completion, y_l the rejected one, pi the policy, pi_ref the reference (eq. 4).

    As pi(y_l) -> 0 with the rest fixed, |dl/dpi(y_l)| behaves like pi(y_l)^(b - 1) * log(1 /
    pi(y_l)). The paper says that it vanishes. That is true only for b > 1, and for the usual beta
    it diverges.

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, finite, [B].
      policy_rejected_logps: log pi(y_l), nats, finite, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: inverse of the target margin for a reward gap of 1, 1 / nats, > 0: a number or [B].
      reward_gap: known difference of the rewards, r_w - r_l > 0: a number or [B]. None means 1.
      linear_below: x0 in (-700, 1), or None. For x < x0 the loss continues along its tangent.
        Static under jax.jit.

    Returns:
      PairProbGrad(policy_chosen, policy_rejected), each a SignedLog(sign, log_abs) of arrays, [B].
      The derivative is sign * exp(log_abs), which overflows any float type for long sequences.

    Raises:
      TypeError: as `log_ratio_margin`, or `linear_below` is not a number.
      ValueError: as `log_ratio_margin`, or a number is out of range (arrays are not inspected).
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _prob_grad(SPO(linear_below), *policies, *references, beta=beta, reward_gap=reward_gap)


def dpo_prob_grad(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
    label_smoothing: float = 0.0,
) -> PairProbGrad:
    """The derivatives of `dpo_loss` with respect to probabilities, arXiv:2508.07137v1, eq. 7.

        dl/dpi(y_l) =  beta * s(-x) / pi(y_l),   x = beta * h,   s(x) = 1 / (1 + e^(-x))
        dl/dpi(y_w) = -beta * s(-x) / pi(y_w)

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats:
    y_w is the chosen completion, y_l the rejected one, pi the policy, pi_ref the reference (eq. 4).

    With label smoothing e, (1 - e) * s(-x) - e * s(x) replaces s(-x). As pi(y_l) -> 0 with the rest
    fixed, |dl/dpi(y_l)| behaves like pi(y_l)^(beta - 1).

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, finite, [B].
      policy_rejected_logps: log pi(y_l), nats, finite, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: strength of the pull to the reference, 1 / nats, > 0: a number or [B].
      label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels.
        Static under jax.jit.

    Returns:
      PairProbGrad(policy_chosen, policy_rejected), each a SignedLog(sign, log_abs) of arrays, [B].
      The derivative is sign * exp(log_abs), which overflows any float type for long sequences.

    Raises:
      TypeError: as `log_ratio_margin`, or `label_smoothing` is not a number.
      ValueError: as `log_ratio_margin`, or a number is out of range (arrays are not inspected).
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _prob_grad(DPO(label_smoothing), *policies, *references, beta=beta)


@quiet
def _prob_grad(loss: SPO | DPO, *logps: Any, beta: Any, reward_gap: Any = None) -> PairProbGrad:
    margin = log_ratio_margin(*logps)
    sign, log_abs = loss.log_slope(margin, beta_for_gap(beta, reward_gap, margin))
    # d(log pi)/d(pi) = 1 / pi, so subtract log pi.
    pc, pr = conform(LOGPS[:2], logps[:2], numbers_from=2)
    return PairProbGrad(SignedLog(sign, log_abs - pc), SignedLog(-sign, log_abs - pr))
