"""Layer 2: from the four log-probabilities of a batch of pairs to a loss.

The four come in the order of DPO's reference code, which most trainers follow: policy chosen,
policy rejected, reference chosen, reference rejected. Each is the log-probability of a completion,
summed over its tokens, in nats, as an array of shape [B].

NumPy raises no warnings here. The mean of no pairs is nan, inf - inf is nan, and overflow gives
inf, as in the other libraries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spoloss._arrays import ArrayT, check_reduction, detach, per_pair, quiet, reduce
from spoloss._inputs import inputs, log_ratios, margins, value_of
from spoloss.losses import DPO, SPO, MarginLoss, PairLoss, Squared, pairwise

IPO_GAP = 0.5
"""IPO is the squared loss at this reward gap: its target is 1 / (2 * beta)."""


class Rewards(NamedTuple):
    """The implicit rewards of a batch of pairs, shape [B] each.

    Attributes:
      chosen: beta * log(pi / pi_ref) of the chosen completions.
      rejected: The same of the rejected completions.
    """

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
    """The loss of Stable Preference Optimization (SPO), paper eq. 6.

        l = -x * e^(-x),   x = beta * h / reward_gap

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    The loss has its minimum, -1/e per pair, at h = reward_gap / beta. It is 0 if the policy equals
    the reference, and negative in between. Near the reference, SPO(beta) acts like DPO(4 * beta).

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
        reward_gap / beta. A number, or an array that is 0-d or of shape [B]. None means 1, the
        paper's choice for an unknown gap. The curvature at the target grows like 1 / reward_gap^2.
        With small gaps, pass `weights=reward_gap**2` and `linear_below`.
      linear_below: x0 in (-700, 1). For x < x0 the loss continues along its tangent at x0, where
        dl/dx = -(1 - x0) * e^(-x0). None is equation 6 as published.
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. It may be
        negative. A pair of weight 0 adds nothing to the loss or to any gradient, even if its
        log-probabilities, beta or reward gap are nan or inf, or the gap is 0. The gradient with
        respect to a weight is the loss of its pair, even at weight 0 (0 if that loss is not
        finite). None is 1.
      reduction: "mean" (the sum over the pairs divided by B, not by the sum of the weights; nan for
        an empty batch), "sum", or "none".

    Returns:
      The loss, which is 0-d, or of shape [B] with reduction="none". float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first, or
        `linear_below` is not a number.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
    """
    return pair_loss(
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
    beta: ArrayT | float,
    label_smoothing: float = 0.0,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """The loss of Direct Preference Optimization (DPO), arXiv:2305.18290, eq. 7.

        l = -(1 - e) * log s(x) - e * log s(-x),   x = beta * h,   s(x) = 1 / (1 + e^(-x))

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    It is log 2 per pair if the policy equals the reference. Without label smoothing it decreases
    everywhere, towards 0.

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
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. It may be
        negative. A pair of weight 0 adds nothing to the loss or to any gradient, even if its
        log-probabilities or beta are nan or inf. The gradient with respect to a weight is the loss
        of its pair, even at weight 0 (0 if that loss is not finite). None means 1.
      reduction: "mean" (the sum over the pairs divided by B, not by the sum of the weights; nan for
        an empty batch), "sum", or "none".

    Returns:
      The loss, which is 0-d, or of shape [B] with reduction="none". float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first, or
        `label_smoothing` is not a number.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
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
    beta: ArrayT | float,
    reward_gap: ArrayT | float | None = None,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """The squared error of the margin to its target, paper section 2.2.

        l = (h - reward_gap / beta)^2, in nats^2

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    The loss has its minimum, 0, at h = reward_gap / beta. A gap of 0.5 is IPO (`ipo_loss`).

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
        reward_gap / beta. A number, or an array that is 0-d or of shape [B]. None means 1, the
        paper's choice for an unknown gap.
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. It may be
        negative. A pair of weight 0 adds nothing to the loss or to any gradient, even if its
        log-probabilities, beta or reward gap are nan or inf, or the gap is 0. The gradient with
        respect to a weight is the loss of its pair, even at weight 0 (0 if that loss is not
        finite). None is 1.
      reduction: "mean" (the sum over the pairs divided by B, not by the sum of the weights; nan for
        an empty batch), "sum", or "none".

    Returns:
      The loss, which is 0-d, or of shape [B] with reduction="none". float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
    """
    return pair_loss(
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
    beta: ArrayT | float,
    weights: ArrayT | float | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """The loss of Identity Preference Optimization (IPO), arXiv:2310.12036, eq. 17.

        l = (h - 1 / (2 * beta))^2, in nats^2

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats
    (paper eq. 4): y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy
    and pi_ref the reference.

    The loss has its minimum, 0, at h = 1 / (2 * beta). It is the squared loss with a reward gap of
    0.5, or with twice the beta. Some libraries average log-probabilities over tokens for IPO. The
    published loss and this one sum them.

    Under `jax.jit`, `reduction` is a static argument.

    Args:
      policy_chosen_logps: log pi(y_w) of each pair, summed over the tokens, in nats. Shape [B].
      policy_rejected_logps: log pi(y_l). Shape [B].
      reference_chosen_logps: log pi_ref(y_w). Shape [B], or the number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l). Shape [B], or 0.0.
      beta: Half of the inverse of the target margin, in 1 / nats, > 0. A number, or an array that
        is 0-d or of shape [B].
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. It may be
        negative. A pair of weight 0 adds nothing to the loss or to any gradient, even if its
        log-probabilities or beta are nan or inf. The gradient with respect to a weight is the loss
        of its pair, even at weight 0 (0 if that loss is not finite). None means 1.
      reduction: "mean" (the sum over the pairs divided by B, not by the sum of the weights; nan for
        an empty batch), "sum", or "none".

    Returns:
      The loss, which is 0-d, or of shape [B] with reduction="none". float64 if any of the four
      log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first.
      ValueError: The shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
    """
    return pair_loss(
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
    in nats: y_w is the chosen completion of a pair and y_l the rejected one, pi is the policy and
    pi_ref the reference. A loss of the margin h = u_w - u_l is called as loss.value(h, b).

    PyTorch, JAX and MLX can differentiate the result.

    Under `jax.jit`, `loss` and `reduction` are static arguments.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()`, or an object of your own with the methods
        `value(margin, beta)` and `slope(margin, beta)` (see `MarginLoss`), or
        `value(chosen, rejected, beta)` and `slopes(chosen, rejected, beta)` (see `PairLoss`).
      policy_chosen_logps: log pi(y_w) of each pair, summed over the tokens, in nats. Shape [B].
      policy_rejected_logps: log pi(y_l). Shape [B].
      reference_chosen_logps: log pi_ref(y_w). Shape [B], or the number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l). Shape [B], or 0.0.
      beta: Passed to `loss`, in 1 / nats, > 0. A number, or an array that is 0-d or of shape [B].
      reward_gap: Known difference of the two rewards, r_w - r_l > 0, by which beta is divided. A
        number, or an array that is 0-d or of shape [B]. None means 1.
      weights: Factor of each pair: a number, or an array that is 0-d or of shape [B]. It may be
        negative. A pair of weight 0 adds nothing to the loss or to any gradient, even if its
        log-probabilities or beta are nan or inf. The gradient with respect to a weight is the loss
        of its pair, even at weight 0 (0 if that loss is not finite). None means 1.
      reduction: "mean" (the sum over the pairs divided by B, not by the sum of the weights; nan for
        an empty batch), "sum", or "none".

    Returns:
      The loss, which is 0-d, or of shape [B] with reduction="none". float64 if any of the four
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
    values = pairs.weigh(value_of(of_pairs, pairs.chosen, pairs.rejected, pairs.beta))
    return reduce(values, reduction)  # type: ignore[no-any-return]


@quiet
def log_ratio_margin(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
) -> ArrayT:
    """The margin h of each pair, `logits(pi)` in the paper (eq. 4).

        h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l))

    y_w is the chosen completion and y_l the rejected one; pi is the policy and pi_ref the
    reference.

    Source: Y. Tan, "A Stable and Principled Loss Function for Direct Language Model Alignment",
    arXiv:2508.07137v1 ("the paper").

    Args:
      policy_chosen_logps: log pi(y_w) of each pair, summed over the tokens, in nats. Shape [B].
      policy_rejected_logps: log pi(y_l). Shape [B].
      reference_chosen_logps: log pi_ref(y_w). Shape [B], or the number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l). Shape [B], or 0.0.

    Returns:
      h in nats, shape [B]. float64 if any of the four log-probabilities is float64, else float32.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first.
      ValueError: The shapes differ.
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
    """The rewards that the policy implies, paper eq. 2 without its constant Z.

        r(y) = beta * (log pi(y) - log pi_ref(y))

    y is a completion, pi the policy and pi_ref the reference. The constant Z is the same for both
    rewards of a pair, so it does not change their difference. The result is for logging, and
    automatic differentiation treats it as a constant.

    Source: Y. Tan, "A Stable and Principled Loss Function for Direct Language Model Alignment",
    arXiv:2508.07137v1 ("the paper").

    Args:
      policy_chosen_logps: log pi(y_w) of each pair, summed over the tokens, in nats. Shape [B].
      policy_rejected_logps: log pi(y_l). Shape [B].
      reference_chosen_logps: log pi_ref(y_w). Shape [B], or the number 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l). Shape [B], or 0.0.
      beta: Strength of the pull to the reference, in 1 / nats, > 0. A number, or an array that is
        0-d or of shape [B].

    Returns:
      Rewards(chosen, rejected), shape [B] each. float64 if any of the four log-probabilities is,
      else float32.

    Raises:
      TypeError: An array is not real floating point, or from another library than the first.
      ValueError: The shapes differ, or a number is out of range (arrays are not inspected).
    """
    chosen, rejected = log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    beta = per_pair("beta", beta, chosen)
    return Rewards(detach(beta * chosen), detach(beta * rejected))
