"""Layer 2: the gradients of the losses in closed form.

They serve NumPy, which has no automatic differentiation, and as a check of other libraries'
autograd. `spo_grad`, `dpo_grad`, `squared_grad`, `ipo_grad` and `pair_grad` return gradients with
respect to the policy's log-probabilities, from which a network backpropagates. `spo_prob_grad` and
`dpo_prob_grad` return derivatives with respect to probabilities, the paper's equations 7 and 8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spoloss._arrays import ArrayT, check_reduction, conform, quiet, shares
from spoloss.losses import DPO, SPO, MarginLoss, PairLoss, SignedLog, Squared, pairwise
from spoloss.pairs import IPO_GAP, LOGPS, beta_for_gap, check_loss, inputs, log_ratios, margins


class PairGrad(NamedTuple):
    """Derivatives of a loss by the policy's log-probabilities, shape [B] each."""

    policy_chosen: Any
    policy_rejected: Any


class PairProbGrad(NamedTuple):
    """Derivatives of each pair's loss by the policy's probabilities, as sign and log-magnitude."""

    policy_chosen: SignedLog
    policy_rejected: SignedLog


def spo_grad(
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
) -> PairGrad:
    """The gradient of `spo_loss` by the log-probabilities, in closed form.

        dl/dh = (beta / reward_gap) * (x - 1) * e^(-x),   x = beta * h / reward_gap

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    dl/dh is the derivative with respect to `policy_chosen_logps`, and -dl/dh the one with respect
    to `policy_rejected_logps`. The function needs no automatic differentiation. l is the paper's
    eq. 6, l = -x * e^(-x).

    Source: Y. Tan, "A Stable and Principled Loss Function for Direct Language Model Alignment",
    arXiv:2508.07137v1 ("the paper").

    Under `jax.jit`, `linear_below` and `reduction` are static arguments.

    Args:
      policy_chosen_logps: log pi(y_w), the policy's log-probability of each chosen completion,
        summed over its tokens, in nats. Shape [B], real floating point.
      policy_rejected_logps: log pi(y_l), the same for the rejected completions. Shape [B].
      reference_chosen_logps: log pi_ref(y_w), the same under the reference model. Shape [B], or the
        number 0.0 to train without a reference.
      reference_rejected_logps: log pi_ref(y_l), the same for the rejected completions. Shape [B],
        or 0.0.
      beta: Inverse of the target margin for a reward gap of 1, in 1 / nats, > 0. A number, or an
        array that is 0-d or of shape [B].
      reward_gap: Known difference of the two rewards, r_w - r_l > 0, which moves the target to
        reward_gap / beta. A number, or an array that is 0-d or of shape [B]. None means 1, the
        paper's choice for an unknown gap. The curvature at the target grows like 1 / reward_gap^2.
        With small gaps, pass `weights=reward_gap**2` and `linear_below`.
      linear_below: x0 in (-700, 1). For x < x0 the loss continues along its tangent at x0, with a
        constant gradient. None is equation 6 as published.
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. It may be
        negative. The gradient of a pair of weight 0 is 0, even if its log-probabilities, beta or
        reward gap are nan or inf, or the gap is 0. None means 1.
      reduction: "mean" or "sum" for the gradient of the reduced loss, "none" for the gradient of
        each pair's own loss. "mean" divides by B, not by the sum of the weights.

    Returns:
      PairGrad(policy_chosen, policy_rejected) of shape [B] each, which are the derivatives with
      respect to `policy_chosen_logps` and `policy_rejected_logps`. The derivatives with respect to
      the reference's log-probabilities are their negatives. float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point or not from the library of
        `policy_chosen_logps`, or `linear_below` is not a number.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
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
    beta: ArrayT | float,
    label_smoothing: float = 0.0,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> PairGrad:
    """The gradient of `dpo_loss` by the log-probabilities, in closed form.

        dl/dh = -beta * ((1 - e) * s(-x) - e * s(x)),   x = beta * h,   s(x) = 1 / (1 + e^(-x))

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    dl/dh is the derivative with respect to `policy_chosen_logps`, and -dl/dh the one with respect
    to `policy_rejected_logps`. The function needs no automatic differentiation. l is the loss of
    eq. 7 in arXiv:2305.18290, which is -log s(x) for e = 0.

    Under `jax.jit`, `label_smoothing` and `reduction` are static arguments.

    Args:
      policy_chosen_logps: log pi(y_w), the policy's log-probability of each chosen completion,
        summed over its tokens, in nats. Shape [B], real floating point.
      policy_rejected_logps: log pi(y_l), the same for the rejected completions. Shape [B].
      reference_chosen_logps: log pi_ref(y_w), the same under the reference model. Shape [B], or the
        number 0.0 to train without a reference.
      reference_rejected_logps: log pi_ref(y_l), the same for the rejected completions. Shape [B],
        or 0.0.
      beta: Strength of the pull to the reference, in 1 / nats, > 0. A number, or an array that is
        0-d or of shape [B].
      label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels
        (conservative DPO).
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. It may be
        negative. The gradient of a pair of weight 0 is 0, even if its log-probabilities or beta are
        nan or inf. None means 1.
      reduction: "mean" or "sum" for the gradient of the reduced loss, "none" for the gradient of
        each pair's own loss. "mean" divides by B, not by the sum of the weights.

    Returns:
      PairGrad(policy_chosen, policy_rejected) of shape [B] each, which are the derivatives with
      respect to `policy_chosen_logps` and `policy_rejected_logps`. The derivatives with respect to
      the reference's log-probabilities are their negatives. float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point or not from the library of
        `policy_chosen_logps`, or `label_smoothing` is not a number.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
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
    beta: ArrayT | float,
    reward_gap: ArrayT | float | None = None,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> PairGrad:
    """The gradient of `squared_loss` by the log-probabilities, in closed form.

        dl/dh = 2 * (h - reward_gap / beta), in nats

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    dl/dh is the derivative with respect to `policy_chosen_logps`, and -dl/dh the one with respect
    to `policy_rejected_logps`. The function needs no automatic differentiation.
    l = (h - reward_gap / beta)^2 is in the paper's section 2.2.

    Source: Y. Tan, "A Stable and Principled Loss Function for Direct Language Model Alignment",
    arXiv:2508.07137v1 ("the paper").

    Under `jax.jit`, `reduction` is a static argument.

    Args:
      policy_chosen_logps: log pi(y_w), the policy's log-probability of each chosen completion,
        summed over its tokens, in nats. Shape [B], real floating point.
      policy_rejected_logps: log pi(y_l), the same for the rejected completions. Shape [B].
      reference_chosen_logps: log pi_ref(y_w), the same under the reference model. Shape [B], or the
        number 0.0 to train without a reference.
      reference_rejected_logps: log pi_ref(y_l), the same for the rejected completions. Shape [B],
        or 0.0.
      beta: Inverse of the target margin for a reward gap of 1, in 1 / nats, > 0. A number, or an
        array that is 0-d or of shape [B].
      reward_gap: Known difference of the two rewards, r_w - r_l > 0, which moves the target to
        reward_gap / beta. A number, or an array that is 0-d or of shape [B]. None means 1, the
        paper's choice for an unknown gap.
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. It may be
        negative. The gradient of a pair of weight 0 is 0, even if its log-probabilities, beta or
        reward gap are nan or inf, or the gap is 0. None means 1.
      reduction: "mean" or "sum" for the gradient of the reduced loss, "none" for the gradient of
        each pair's own loss. "mean" divides by B, not by the sum of the weights.

    Returns:
      PairGrad(policy_chosen, policy_rejected) of shape [B] each, which are the derivatives with
      respect to `policy_chosen_logps` and `policy_rejected_logps`. The derivatives with respect to
      the reference's log-probabilities are their negatives. float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point or not from the library of
        `policy_chosen_logps`.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
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
    beta: ArrayT | float,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> PairGrad:
    """The gradient of `ipo_loss` by the log-probabilities, in closed form.

        dl/dh = 2 * (h - 1 / (2 * beta)), in nats

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    dl/dh is the derivative with respect to `policy_chosen_logps`, and -dl/dh the one with respect
    to `policy_rejected_logps`. The function needs no automatic differentiation.
    l = (h - 1 / (2 * beta))^2 is eq. 17 in arXiv:2310.12036.

    Under `jax.jit`, `reduction` is a static argument.

    Args:
      policy_chosen_logps: log pi(y_w), the policy's log-probability of each chosen completion,
        summed over its tokens, in nats. Shape [B], real floating point.
      policy_rejected_logps: log pi(y_l), the same for the rejected completions. Shape [B].
      reference_chosen_logps: log pi_ref(y_w), the same under the reference model. Shape [B], or the
        number 0.0 to train without a reference.
      reference_rejected_logps: log pi_ref(y_l), the same for the rejected completions. Shape [B],
        or 0.0.
      beta: Half of the inverse of the target margin, in 1 / nats, > 0. A number, or an array that
        is 0-d or of shape [B].
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. It may be
        negative. The gradient of a pair of weight 0 is 0, even if its log-probabilities or beta are
        nan or inf. None means 1.
      reduction: "mean" or "sum" for the gradient of the reduced loss, "none" for the gradient of
        each pair's own loss. "mean" divides by B, not by the sum of the weights.

    Returns:
      PairGrad(policy_chosen, policy_rejected) of shape [B] each, which are the derivatives with
      respect to `policy_chosen_logps` and `policy_rejected_logps`. The derivatives with respect to
      the reference's log-probabilities are their negatives. float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point or not from the library of
        `policy_chosen_logps`.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
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
) -> PairGrad:
    """The gradient of `pair_loss` by the log-probabilities, from the slope of the loss.

        dl/dh = loss.slope(h, beta)

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    dl/dh is the derivative with respect to `policy_chosen_logps`, and -dl/dh the one with respect
    to `policy_rejected_logps`. The function needs no automatic differentiation.

    Under `jax.jit`, `loss` and `reduction` are static arguments.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()`, or an object of your own with the methods
        `value(margin, beta)` and `slope(margin, beta)` (see `MarginLoss`).
      policy_chosen_logps: log pi(y_w), the policy's log-probability of each chosen completion,
        summed over its tokens, in nats. Shape [B], real floating point.
      policy_rejected_logps: log pi(y_l), the same for the rejected completions. Shape [B].
      reference_chosen_logps: log pi_ref(y_w), the same under the reference model. Shape [B], or the
        number 0.0 to train without a reference.
      reference_rejected_logps: log pi_ref(y_l), the same for the rejected completions. Shape [B],
        or 0.0.
      beta: Passed to `loss`, in 1 / nats, > 0. A number, or an array that is 0-d or of shape [B].
      reward_gap: Known r_w - r_l, > 0: beta is divided by it. None means 1.
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. It may be
        negative. The gradient of a pair of weight 0 is 0, even if its log-probabilities or beta are
        nan or inf. None means 1.
      reduction: "mean" or "sum" for the gradient of the reduced loss, "none" for the gradient of
        each pair's own loss. "mean" divides by B, not by the sum of the weights.

    Returns:
      PairGrad(policy_chosen, policy_rejected) of shape [B] each, which are the derivatives with
      respect to `policy_chosen_logps` and `policy_rejected_logps`. The derivatives with respect to
      the reference's log-probabilities are their negatives. float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point or not from the library of
        `policy_chosen_logps`, or `loss` is not a loss object.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
    """
    return reduced_grad(
        loss,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        reward_gap=reward_gap,
        weights=weights,
        reduction=reduction,
    )


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
    """The derivatives of each pair's SPO loss by the policy's probabilities, paper eq. 8.

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
      policy_chosen_logps: log pi(y_w), the policy's log-probability of each chosen completion,
        summed over its tokens, in nats. Shape [B], real floating point, finite.
      policy_rejected_logps: log pi(y_l), the same for the rejected completions. Shape [B], finite.
      reference_chosen_logps: log pi_ref(y_w), the same under the reference model. Shape [B], or the
        number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), the same for the rejected completions. Shape [B],
        or 0.0.
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
      TypeError: An array is not real floating point or not from the library of
        `policy_chosen_logps`, or `linear_below` is not a number.
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
    """The derivatives of each pair's DPO loss by the policy's probabilities, paper eq. 7.

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
      policy_chosen_logps: log pi(y_w), the policy's log-probability of each chosen completion,
        summed over its tokens, in nats. Shape [B], real floating point, finite.
      policy_rejected_logps: log pi(y_l), the same for the rejected completions. Shape [B], finite.
      reference_chosen_logps: log pi_ref(y_w), the same under the reference model. Shape [B], or the
        number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), the same for the rejected completions. Shape [B],
        or 0.0.
      beta: Strength of the pull to the reference, in 1 / nats, > 0. A number, or an array that is
        0-d or of shape [B].
      label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels
        (conservative DPO).

    Returns:
      PairProbGrad(policy_chosen, policy_rejected), each a SignedLog(sign, log_abs) of two arrays of
      shape [B]. The derivative is sign * exp(log_abs), which overflows any float type at the
      log-probabilities of long sequences.

    Raises:
      TypeError: An array is not real floating point or not from the library of
        `policy_chosen_logps`, or `label_smoothing` is not a number.
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
def reduced_grad(
    loss: MarginLoss | PairLoss,
    *logps: Any,
    beta: Any,
    weights: Any,
    reduction: str,
    reward_gap: Any = None,
) -> PairGrad:
    """`pair_grad` of the four log-probabilities, with a reward gap for losses that use one."""
    check_loss(loss)
    check_reduction(reduction)
    of_pairs = pairwise(loss)
    pairs = inputs(of_pairs, log_ratios(*logps), beta, reward_gap, weights)
    slopes = of_pairs.slopes(pairs.chosen, pairs.rejected, pairs.beta)
    return PairGrad(*(shares(pairs.weigh(slope), reduction) for slope in slopes))


@quiet
def _prob_grad(loss: SPO | DPO, *logps: Any, beta: Any, reward_gap: Any = None) -> PairProbGrad:
    margin = margins(*logps)
    sign, log_abs = loss.log_slope(margin, beta_for_gap(beta, reward_gap, margin))
    # d(log pi)/d(pi) = 1 / pi, so subtract log pi.
    pc, pr = conform(LOGPS[:2], logps[:2], numbers_from=2)
    return PairProbGrad(SignedLog(sign, log_abs - pc), SignedLog(-sign, log_abs - pr))
