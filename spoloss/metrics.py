"""Layer 2: what to log about a batch of pairs."""

from __future__ import annotations

from spoloss._arrays import ArrayT, cast, detach, is_number, namespace, per_pair, quiet, reduce
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
    """Means over the batch under TRL's key names, and the two shares that SPO users watch.

    | key | mean over the pairs of |
    |---|---|
    | rewards/chosen, rewards/rejected | beta * log(pi / pi_ref) |
    | rewards/margins | x = beta * h, the difference of the two |
    | rewards/accuracies | x > 0 (a tie, as at step 0, counts as wrong) |
    | rewards/margins_below_0 | x < 0: on SPO's steep side, mis-ordered |
    | rewards/margins_above_1 | x > reward_gap (1 where unknown): past SPO's target, pulled back |
    | logps/chosen, logps/rejected | the policy's log-probability, nats |

    """
    chosen, rejected = implicit_rewards(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
    )
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
    weights = per_pair("weights", weights, chosen, positive=False)
    weights = xp.full_like(chosen, weights) if is_number(weights) else detach(weights)
    total = reduce(weights, "mean")
    return {
        # Not weights * value alone: 0 times the nan of a padded pair would be nan.
        key: reduce(xp.where(weights == 0.0, 0.0, weights * value), "mean") / total
        for key, value in values.items()
    }
