"""Floor 2: from the four log-probabilities of a batch of pairs to a loss.

The four come in the order that DPO's reference code set and most trainers follow:
policy chosen, policy rejected, reference chosen, reference rejected. Each is the summed
log-probability of a completion, in nats, of shape [B].
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spoloss._arrays import ArrayT, check_reduction, conform, detach, namespace, per_pair, reduce
from spoloss.losses import DPO, SPO, MarginLoss, Squared

LOGPS = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
)


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
    weights: ArrayT | None = None,
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
    beta = beta_for_gap(beta, reward_gap, policy_chosen_logps)
    return pair_loss(
        SPO(linear_below),
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
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
    weights: ArrayT | None = None,
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
    weights: ArrayT | None = None,
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
    beta = beta_for_gap(beta, reward_gap, policy_chosen_logps)
    return pair_loss(
        Squared(),
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
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
    weights: ArrayT | None = None,
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
    check_loss(loss)
    check_reduction(reduction)
    margin = log_ratio_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return reduce(weighted(loss.value, margin, beta, weights), reduction)  # type: ignore[no-any-return]


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
    chosen, rejected = log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return chosen - rejected  # type: ignore[no-any-return]


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


def log_ratios(
    policy_chosen_logps: Any,
    policy_rejected_logps: Any,
    reference_chosen_logps: Any,
    reference_rejected_logps: Any,
) -> tuple[Any, Any]:
    """log(pi / pi_ref) of the chosen and of the rejected completions, after all checks."""
    pc, pr, rc, rr = conform(
        LOGPS,
        (
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
        ),
        numbers_from=2,
    )
    return pc - rc, pr - rr


def beta_for_gap(beta: Any, reward_gap: Any, logps: Any) -> Any:
    """A known gap is a beta per pair: the target reward_gap / beta is 1 / (beta / reward_gap)."""
    if reward_gap is None:
        return beta
    return per_pair("beta", beta, logps) / per_pair("reward_gap", reward_gap, logps)


def weighted(function: Any, margin: Any, beta: Any, weights: Any) -> Any:
    """A loss's value or slope for each pair, times the pair's weight."""
    beta = per_pair("beta", beta, margin)
    if weights is None:
        return function(margin, beta)
    weights = per_pair("weights", weights, margin, positive=False)
    # A pair of weight 0 may hold inf or nan (padding): 0 times that would be nan.
    margin = namespace(margin).where(weights == 0.0, 0.0, margin)
    return weights * function(margin, beta)


def check_loss(loss: Any) -> None:
    """Refuse what is no loss object, such as a name or a class.

    Raises:
      TypeError: `loss` is a class, or lacks `value` or `slope`.
    """
    if isinstance(loss, type) or not (hasattr(loss, "value") and hasattr(loss, "slope")):
        raise TypeError(
            f"loss must be an object with value and slope, such as SPO() or DPO(), got {loss!r}"
        )
