"""Layer 2: the gradients of the losses in closed form."""

from __future__ import annotations

from typing import Any, NamedTuple

from spoloss._arrays import ArrayT, check_reduction, quiet, shares
from spoloss._inputs import inputs
from spoloss.losses import DPO, SPO, MarginLoss, PairLoss, Squared
from spoloss.pairs import IPO_GAP


class PairGrad(NamedTuple):
    """Derivatives of a loss with respect to the policy's two log-probabilities, [B] each."""

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
    """The gradient of `spo_loss` (arXiv:2508.07137v1, eq. 6), in closed form.

        dl/dh = (beta / reward_gap) * (x - 1) * e^(-x),   x = beta * h / reward_gap

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats:
    y_w is the chosen completion, y_l the rejected one, pi the policy, pi_ref the reference (eq. 4).

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: inverse of the target margin for a reward gap of 1, 1 / nats, > 0: a number or [B].
      reward_gap: known difference of the rewards, r_w - r_l > 0: a number or [B]. None means 1.
      linear_below: x0 in (-700, 1), or None. For x < x0 the loss continues along its tangent.
      weights: factor of each pair: a number or [B]. 0 leaves a pair out. None means 1.
      reduction: "mean" or "sum" of the loss to differentiate, or "none" for each pair's own loss.
        Static under jax.jit, as `linear_below`.

    Returns:
      PairGrad(policy_chosen, policy_rejected), [B] each: dl/dh and -dl/dh of each pair, times its
      weight, divided by B for "mean". float64 if any of the four is, else float32.

    Raises:
      TypeError: as `pair_grad`, or `linear_below` is not a number.
      ValueError: as `pair_grad`, or `linear_below` is out of range.
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _grad(SPO(linear_below), *policies, *references, beta, reward_gap, weights, reduction)


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
    """The gradient of `dpo_loss` (arXiv:2305.18290, eq. 7), in closed form.

        dl/dh = -beta * ((1 - e) * s(-x) - e * s(x)),   x = beta * h,   s(x) = 1 / (1 + e^(-x))

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats:
    y_w is the chosen completion, y_l the rejected one, pi the policy, pi_ref the reference.

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: strength of the pull to the reference, 1 / nats, > 0: a number or [B].
      label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels.
      weights: factor of each pair: a number or [B]. 0 leaves a pair out. None means 1.
      reduction: "mean" or "sum" of the loss to differentiate, or "none" for each pair's own loss.
        Static under jax.jit, as `label_smoothing`.

    Returns:
      PairGrad(policy_chosen, policy_rejected), [B] each: dl/dh and -dl/dh of each pair, times its
      weight, divided by B for "mean". float64 if any of the four is, else float32.

    Raises:
      TypeError: as `pair_grad`, or `label_smoothing` is not a number.
      ValueError: as `pair_grad`, or `label_smoothing` is out of range.
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _grad(DPO(label_smoothing), *policies, *references, beta, None, weights, reduction)


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
    """The gradient of `squared_loss` (arXiv:2508.07137v1, section 2.2), in closed form.

        dl/dh = 2 * (h - reward_gap / beta), in nats

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats:
    y_w is the chosen completion, y_l the rejected one, pi the policy, pi_ref the reference (eq. 4).

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: inverse of the target margin for a reward gap of 1, 1 / nats, > 0: a number or [B].
      reward_gap: known difference of the rewards, r_w - r_l > 0: a number or [B]. None means 1.
      weights: factor of each pair: a number or [B]. 0 leaves a pair out. None means 1.
      reduction: "mean" or "sum" of the loss to differentiate, or "none" for each pair's own loss.
        Static under jax.jit.

    Returns:
      PairGrad(policy_chosen, policy_rejected), [B] each: dl/dh and -dl/dh of each pair, times its
      weight, divided by B for "mean". float64 if any of the four is, else float32.

    Raises:
      TypeError: as `pair_grad`.
      ValueError: as `pair_grad`.
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _grad(Squared(), *policies, *references, beta, reward_gap, weights, reduction)


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
    """The gradient of `ipo_loss` (arXiv:2310.12036, eq. 17), in closed form.

        dl/dh = 2 * (h - 1 / (2 * beta)), in nats

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats:
    y_w is the chosen completion, y_l the rejected one, pi the policy, pi_ref the reference.

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: half of the inverse of the target margin, 1 / nats, > 0: a number or [B].
      weights: factor of each pair: a number or [B]. 0 leaves a pair out. None means 1.
      reduction: "mean" or "sum" of the loss to differentiate, or "none" for each pair's own loss.
        Static under jax.jit.

    Returns:
      PairGrad(policy_chosen, policy_rejected), [B] each: dl/dh and -dl/dh of each pair, times its
      weight, divided by B for "mean". float64 if any of the four is, else float32.

    Raises:
      TypeError: as `pair_grad`.
      ValueError: as `pair_grad`.
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _grad(Squared(), *policies, *references, beta, IPO_GAP, weights, reduction)


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
    in nats: y_w is the chosen completion, y_l the rejected one, pi the policy and pi_ref the
    reference. For a loss of the margin h = u_w - u_l they are dl/dh and -dl/dh, with
    dl/dh = loss.slope(h, b).

    No automatic differentiation takes part, so this serves NumPy, and checks other libraries. Under
    `jax.jit`, `loss` and `reduction` are static arguments.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()`, or your own `MarginLoss` or `PairLoss`.
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: passed to the loss, 1 / nats, > 0: a number, or an array, 0-d or [B].
      reward_gap: known r_w - r_l, > 0, which divides beta: a number, or an array, 0-d or [B]. None
        means 1.
      weights: factor of each pair: a number, or an array, 0-d or [B]. The gradient of a pair of
        weight 0 is 0, even if the pair holds nan or inf. None means 1.
      reduction: "mean" or "sum" for the gradient of the reduced loss, "none" for the gradient of
        each pair's own loss. "mean" divides by B, not by the sum of the weights.

    Returns:
      PairGrad(policy_chosen, policy_rejected), [B] each. The derivatives with respect to the
      reference's log-probabilities are their negatives. float64 if any of the four is, else
      float32.

    Raises:
      TypeError: an array is not real floating point, or from another library than the first, or
        `loss` is not a loss object.
      ValueError: the shapes differ, a number is out of range (arrays are not inspected), or
        `reduction` is unknown.
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    return _grad(loss, *policies, *references, beta, reward_gap, weights, reduction)


@quiet
def _grad(
    loss: Any, pc: Any, pr: Any, rc: Any, rr: Any, beta: Any, gap: Any, w: Any, reduction: str
) -> PairGrad:
    check_reduction(reduction)
    slopes = inputs(loss, (pc, pr, rc, rr), beta, gap, w).slopes()
    return PairGrad(*(shares(slope, reduction) for slope in slopes))
