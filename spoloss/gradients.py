"""Layer 2: the gradients of the losses in closed form.

They serve NumPy, which has no automatic differentiation, and as a check of other libraries'
autograd. A network backpropagates from the gradients with respect to log-probabilities.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spoloss._arrays import ArrayT, check_reduction, quiet, shares
from spoloss._inputs import inputs, log_ratios, slopes_of
from spoloss.losses import DPO, SPO, MarginLoss, PairLoss, Squared, pairwise
from spoloss.pairs import IPO_GAP


class PairGrad(NamedTuple):
    """Derivatives of a loss with respect to the policy's log-probabilities, shape [B] each.

    Attributes:
      policy_chosen: The derivative with respect to `policy_chosen_logps`.
      policy_rejected: The derivative with respect to `policy_rejected_logps`.
    """

    policy_chosen: Any
    policy_rejected: Any


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
    """The gradient of `spo_loss` with respect to the log-probabilities, in closed form.

        dl/dh = (beta / reward_gap) * (x - 1) * e^(-x),   x = beta * h / reward_gap

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    dl/dh is the derivative with respect to `policy_chosen_logps`, and -dl/dh the one with respect
    to `policy_rejected_logps`. l is the paper's eq. 6, l = -x * e^(-x).

    Source: Y. Tan, "A Stable and Principled Loss Function for Direct Language Model Alignment",
    arXiv:2508.07137v1 ("the paper").

    Under `jax.jit`, `linear_below` and `reduction` are static arguments.

    Args:
      policy_chosen_logps: log pi(y_w) of each pair, summed over the tokens, in nats. Shape [B].
      policy_rejected_logps: log pi(y_l). Shape [B].
      reference_chosen_logps: log pi_ref(y_w). Shape [B], or the number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l). Shape [B], or 0.0.
      beta: Inverse of the target margin for a reward gap of 1, in 1 / nats, > 0. A number, or an
        array that is 0-d or of shape [B].
      reward_gap: Known difference of the two rewards, r_w - r_l > 0, which moves the target to
        reward_gap / beta. A number, or an array that is 0-d or of shape [B]. None means 1.
      linear_below: x0 in (-700, 1). For x < x0 the loss continues along its tangent at x0, with a
        constant gradient. None is equation 6 as published.
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. The gradient
        of a pair of weight 0 is 0, even if the pair holds nan or inf. None means 1.
      reduction: "mean" or "sum" for the gradient of the reduced loss, "none" for the gradient of
        each pair's own loss. "mean" divides by B, not by the sum of the weights.

    Returns:
      PairGrad(policy_chosen, policy_rejected) of shape [B] each. The derivatives with respect to
      the reference's log-probabilities are their negatives. float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first, or
        `linear_below` is not a number.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
    """
    return pair_grad(
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
    """The gradient of `dpo_loss` with respect to the log-probabilities, in closed form.

        dl/dh = -beta * ((1 - e) * s(-x) - e * s(x)),   x = beta * h,   s(x) = 1 / (1 + e^(-x))

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    dl/dh is the derivative with respect to `policy_chosen_logps`, and -dl/dh the one with respect
    to `policy_rejected_logps`. l is the loss of eq. 7 in
    arXiv:2305.18290, which is -log s(x) for e = 0.

    Under `jax.jit`, `label_smoothing` and `reduction` are static arguments.

    Args:
      policy_chosen_logps: log pi(y_w) of each pair, summed over the tokens, in nats. Shape [B].
      policy_rejected_logps: log pi(y_l). Shape [B].
      reference_chosen_logps: log pi_ref(y_w). Shape [B], or the number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l). Shape [B], or 0.0.
      beta: Strength of the pull to the reference, in 1 / nats, > 0. A number, or an array that is
        0-d or of shape [B].
      label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels
        (conservative DPO).
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. The gradient
        of a pair of weight 0 is 0, even if the pair holds nan or inf. None means 1.
      reduction: "mean" or "sum" for the gradient of the reduced loss, "none" for the gradient of
        each pair's own loss. "mean" divides by B, not by the sum of the weights.

    Returns:
      PairGrad(policy_chosen, policy_rejected) of shape [B] each. The derivatives with respect to
      the reference's log-probabilities are their negatives. float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first, or
        `label_smoothing` is not a number.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
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
    beta: ArrayT | float,
    reward_gap: ArrayT | float | None = None,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> PairGrad:
    """The gradient of `squared_loss` with respect to the log-probabilities, in closed form.

        dl/dh = 2 * (h - reward_gap / beta), in nats

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    dl/dh is the derivative with respect to `policy_chosen_logps`, and -dl/dh the one with respect
    to `policy_rejected_logps`. l = (h - reward_gap / beta)^2 is in
    the paper's section 2.2.

    Source: Y. Tan, "A Stable and Principled Loss Function for Direct Language Model Alignment",
    arXiv:2508.07137v1 ("the paper").

    Under `jax.jit`, `reduction` is a static argument.

    Args:
      policy_chosen_logps: log pi(y_w) of each pair, summed over the tokens, in nats. Shape [B].
      policy_rejected_logps: log pi(y_l). Shape [B].
      reference_chosen_logps: log pi_ref(y_w). Shape [B], or the number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l). Shape [B], or 0.0.
      beta: Inverse of the target margin for a reward gap of 1, in 1 / nats, > 0. A number, or an
        array that is 0-d or of shape [B].
      reward_gap: Known difference of the two rewards, r_w - r_l > 0, which moves the target to
        reward_gap / beta. A number, or an array that is 0-d or of shape [B]. None means 1.
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. The gradient
        of a pair of weight 0 is 0, even if the pair holds nan or inf. None means 1.
      reduction: "mean" or "sum" for the gradient of the reduced loss, "none" for the gradient of
        each pair's own loss. "mean" divides by B, not by the sum of the weights.

    Returns:
      PairGrad(policy_chosen, policy_rejected) of shape [B] each. The derivatives with respect to
      the reference's log-probabilities are their negatives. float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
    """
    return pair_grad(
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
    """The gradient of `ipo_loss` with respect to the log-probabilities, in closed form.

        dl/dh = 2 * (h - 1 / (2 * beta)), in nats

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    dl/dh is the derivative with respect to `policy_chosen_logps`, and -dl/dh the one with respect
    to `policy_rejected_logps`. l = (h - 1 / (2 * beta))^2 is eq. 17
    in arXiv:2310.12036.

    Under `jax.jit`, `reduction` is a static argument.

    Args:
      policy_chosen_logps: log pi(y_w) of each pair, summed over the tokens, in nats. Shape [B].
      policy_rejected_logps: log pi(y_l). Shape [B].
      reference_chosen_logps: log pi_ref(y_w). Shape [B], or the number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l). Shape [B], or 0.0.
      beta: Half of the inverse of the target margin, in 1 / nats, > 0. A number, or an array that
        is 0-d or of shape [B].
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. The gradient
        of a pair of weight 0 is 0, even if the pair holds nan or inf. None means 1.
      reduction: "mean" or "sum" for the gradient of the reduced loss, "none" for the gradient of
        each pair's own loss. "mean" divides by B, not by the sum of the weights.

    Returns:
      PairGrad(policy_chosen, policy_rejected) of shape [B] each. The derivatives with respect to
      the reference's log-probabilities are their negatives. float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
    """
    return pair_grad(
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


@quiet
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
    """The gradient of `pair_loss` with respect to the log-probabilities, from the loss's slopes.

        (dl/du_w, dl/du_l) = loss.slopes(u_w, u_l, b),   b = beta / reward_gap

    u_w = log pi(y_w) - log pi_ref(y_w) and u_l = log pi(y_l) - log pi_ref(y_l) are the log-ratios,
    in nats: y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy and
    pi_ref the reference. For a loss of the margin h = u_w - u_l the two slopes are dl/dh and
    -dl/dh, with dl/dh = loss.slope(h, b).

    The function needs no automatic differentiation, so it serves NumPy, and as a check of others.

    Under `jax.jit`, `loss` and `reduction` are static arguments.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()`, or an object of your own (see `MarginLoss` and
        `PairLoss`).
      policy_chosen_logps: log pi(y_w) of each pair, summed over the tokens, in nats. Shape [B].
      policy_rejected_logps: log pi(y_l). Shape [B].
      reference_chosen_logps: log pi_ref(y_w). Shape [B], or the number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l). Shape [B], or 0.0.
      beta: Passed to `loss`, in 1 / nats, > 0. A number, or an array that is 0-d or of shape [B].
      reward_gap: Known difference of the two rewards, r_w - r_l > 0, by which beta is divided. A
        number, or an array that is 0-d or of shape [B]. None means 1.
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. The gradient
        of a pair of weight 0 is 0, even if the pair holds nan or inf. None means 1.
      reduction: "mean" or "sum" for the gradient of the reduced loss, "none" for the gradient of
        each pair's own loss. "mean" divides by B, not by the sum of the weights.

    Returns:
      PairGrad(policy_chosen, policy_rejected) of shape [B] each. The derivatives with respect to
      the reference's log-probabilities are their negatives. float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first, or
        `loss` is not a loss object.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
    """
    of_pairs = pairwise(loss)
    check_reduction(reduction)
    logps = policy_chosen_logps, policy_rejected_logps, reference_chosen_logps
    pairs = inputs(
        of_pairs, log_ratios(*logps, reference_rejected_logps), beta, reward_gap, weights
    )
    slopes = slopes_of(of_pairs, pairs.chosen, pairs.rejected, pairs.beta)
    return PairGrad(*(shares(pairs.weigh(slope), reduction) for slope in slopes))
