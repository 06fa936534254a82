"""Layer 2: metrics of a batch of pairs, for logging."""

from __future__ import annotations

from spoloss._arrays import ArrayT, cast, detach, filled, namespace, per_pair, quiet, reduce
from spoloss.pairs import implicit_rewards


@quiet
def preference_metrics(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
    reward_gap: ArrayT | float | None = None,
    weights: ArrayT | float | None = None,
) -> dict[str, ArrayT]:
    """Metrics of a batch of pairs for logging, under the names that TRL uses.

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) is the margin, in nats:
    y_w is the chosen completion, y_l the rejected one, pi the policy and pi_ref the reference.

    | key | mean over the pairs of |
    |---|---|
    | rewards/chosen | beta * (log pi(y_w) - log pi_ref(y_w)), the implicit reward |
    | rewards/rejected | beta * (log pi(y_l) - log pi_ref(y_l)) |
    | rewards/margins | x = beta * h, the difference of the two |
    | rewards/accuracies | 1 if x > 0, else 0; a tie, as in the first step, counts 0 |
    | rewards/margins_below_0 | 1 if x < 0: in the wrong order, on the steep side of SPO |
    | rewards/margins_above_1 | 1 if x > reward_gap: above the target, where SPO pulls back |
    | logps/chosen | log pi(y_w), in nats |
    | logps/rejected | log pi(y_l), in nats |

    With `weights`, each mean is sum(weights * values) / sum(weights). The losses divide by B, but
    here a batch that is half padding would then show half the accuracy.

    Args:
      policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
      policy_rejected_logps: log pi(y_l), nats, [B].
      reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
      beta: strength of the pull to the reference, 1 / nats, > 0: a number or [B].
      reward_gap: known r_w - r_l, the target of x: a number or [B]. None means 1.
      weights: weight of each pair in the means: a number or [B]. 0 leaves a pair out, even if its
        log-probabilities, beta or reward gap are nan or inf. None means 1.

    Returns:
      A dict of 0-d arrays on the device of the log-probabilities, without a synchronisation.
      Automatic differentiation treats them as constants. float64 if any of the four is, else
      float32. nan for an empty batch or for weights that sum to 0.

    Raises:
      TypeError: an array is not real floating point, or from another library than the first.
      ValueError: the shapes differ, or a number is out of range (arrays are not inspected).
    """
    policies = policy_chosen_logps, policy_rejected_logps
    references = reference_chosen_logps, reference_rejected_logps
    chosen, rejected = implicit_rewards(*policies, *references, beta=beta)
    margins = chosen - rejected
    target = 1.0 if reward_gap is None else per_pair("reward_gap", reward_gap, chosen)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0.0,
        "rewards/margins_below_0": margins < 0.0,
        "rewards/margins_above_1": margins > target,
        "logps/chosen": detach(policy_chosen_logps),
        "logps/rejected": detach(policy_rejected_logps),
    }
    xp = namespace(chosen)
    values = {key: cast(xp, value, chosen.dtype) for key, value in values.items()}
    if weights is None:
        return {key: reduce(value, "mean") for key, value in values.items()}
    factors = detach(per_pair("weights", weights, chosen, positive=False) * filled(chosen, 1.0))
    total = reduce(factors, "mean")
    return {
        # factors * value alone would be nan for a padded pair, because 0 * nan is nan.
        key: reduce(xp.where(factors == 0.0, 0.0, factors * value), "mean") / total
        for key, value in values.items()
    }
