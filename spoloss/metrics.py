"""Floor 2: what to log about a batch of pairs."""

from __future__ import annotations

from typing import Any

from spoloss._arrays import ArrayT, cast, detach, namespace
from spoloss.pairs import implicit_rewards


def preference_metrics(
    policy_chosen_logps: ArrayT,
    policy_rejected_logps: ArrayT,
    reference_chosen_logps: ArrayT | float,
    reference_rejected_logps: ArrayT | float,
    *,
    beta: ArrayT | float,
) -> dict[str, ArrayT]:
    """Means over the batch under TRL's key names, and the two shares that SPO users watch.

    | key | mean over the pairs of |
    |---|---|
    | rewards/chosen, rewards/rejected | beta * log(pi / pi_ref) |
    | rewards/margins | x = beta * h, the difference of the two |
    | rewards/accuracies | x > 0 (a tie, as at step 0, counts as wrong) |
    | rewards/margins_below_0 | x < 0: on SPO's steep side, mis-ordered |
    | rewards/margins_above_1 | x > 1: past SPO's target, pulled back |
    | logps/chosen, logps/rejected | the policy's log-probability, nats |

    Args:
      policy_chosen_logps: as for `spo_loss`.
      policy_rejected_logps: as for `spo_loss`.
      reference_chosen_logps: as for `spo_loss`.
      reference_rejected_logps: as for `spo_loss`.
      beta: 1 / nats, > 0: a number or shape [B].

    Returns:
      name -> 0-d array, constant to autograd, still on its device: nothing here waits for it.

    Raises:
      TypeError: as `spo_loss`.
      ValueError: as `spo_loss`.
    """
    chosen, rejected = implicit_rewards(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
    )
    xp = namespace(chosen)

    def mean(array: Any) -> Any:
        return xp.mean(cast(xp, array, chosen.dtype))

    margins = chosen - rejected
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean(margins > 0.0),
        "rewards/margins_below_0": mean(margins < 0.0),
        "rewards/margins_above_1": mean(margins > 1.0),
        "logps/chosen": mean(detach(policy_chosen_logps)),
        "logps/rejected": mean(detach(policy_rejected_logps)),
    }
