"""Losses from hidden states, without ever holding the logits.

`Head` says how hidden states become logits, and `Completions` says which tokens count. Every option
is documented there, once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spoloss._arrays import check_reduction
from spoloss._checks import check_pairs
from spoloss._linear_losses import LinearLosses
from spoloss._objective import Constants, Objective
from spoloss._options import check_flag, check_nll_weight
from spoloss.losses import MarginLoss, PairLoss, pairwise
from spoloss.torch._arguments import Completions, Head
from spoloss.torch._checks import prepare
from spoloss.torch._fused import Inputs, LinearPairLoss, fused_loss


def linear_pair_loss(
    loss: MarginLoss | PairLoss,
    head: Head,
    chosen: Completions,
    rejected: Completions,
    reference_chosen_logps: Tensor | float,
    reference_rejected_logps: Tensor | float,
    *,
    beta: Tensor | float,
    reward_gap: Tensor | float | None = None,
    weights: Tensor | float | None = None,
    nll_weight: float = 0.0,
    average: bool = False,
    reduction: str = "mean",
) -> LinearPairLoss:
    """Any loss of the two log-ratios from hidden states, without the logits.

        loss = (l(u_w, u_l) + nll_weight * NLL) * weight,
        u    = log pi(y|x) / pi_ref(y|x) of each side,    NLL = -log pi(y_w|x) per token

    The result equals `pair_loss` of `linear_logps`. With N the tokens that count, a call takes
    4NDV FLOPs with a frozen head, for any loss: the forward keeps each token's direction, an array
    like the hidden states, and the backward scales it. With a head that requires a gradient it
    takes 6NDV, and 8NDV for `reduction="none"` and under torch.compile. Without a gradient it takes
    2NDV. With a trained head, a pair longer than a tile takes one more array of the weight's size,
    and two or more such pairs take two.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()`, or your own `MarginLoss` or `PairLoss`.
      head: how hidden states become logits.
      chosen: the chosen completions, P of them.
      rejected: the rejected completions, P of them, in the order of the chosen ones. They may
        differ from the chosen ones in length, packing, `ignore_index` and `shift`.
      reference_chosen_logps: log pi_ref(y_w|x), nats, [P]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l|x), nats, [P]; 0.0 for no reference.
      beta: passed to the loss, 1 / nats, > 0: a number or [P].
      reward_gap: known r_w - r_l, > 0: a number or [P]. It divides beta. None means 1.
      weights: factor of each pair: a number or [P]. A pair of weight 0 is left out, even if it
        contains nan, which its log-probabilities then show. "mean" still divides by P. None means
        1.
      nll_weight: factor of the chosen completions' negative log-likelihood per token, >= 0.
      average: use log-probabilities per token instead of sums, also for the reference.
      reduction: "mean", "sum" or "none" (the loss of each pair).

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps). The loss is differentiable once with
      respect to hidden states, weight and bias, and with respect to `beta`, `reward_gap`,
      `weights`, references and `token_weights`. The log-probabilities, [P] in nats, are detached.

    Raises:
      TypeError: a dtype does not fit, an option has another type, an argument is not a tensor, or
        the weight is a sharded DTensor.
      ValueError: a shape, device or number does not fit, a label is outside [0, V), a token weight
        is negative or not finite, ZeRO-3 has partitioned the weight, or the ranks of
        `vocab_parallel_group` do not agree.
      RuntimeError: `vocab_parallel_group` is given under torch.compile(fullgraph=True).
    """
    pairwise(loss)
    check_reduction(reduction)
    check_nll_weight(nll_weight)
    check_flag("average", average)
    sides = {"chosen": chosen, "rejected": rejected}
    call = prepare(head, sides)
    check_pairs(*(side.count for side in call.sequences))
    references = reference_chosen_logps, reference_rejected_logps
    constants = Constants(*references, beta, reward_gap, weights)
    dtype = torch.promote_types(chosen.hidden.dtype, torch.float32)
    like = chosen.hidden.new_zeros(call.sequences[0].count, dtype=dtype)
    constants.check(like)
    left_out = _zero_weights(weights, like)
    sequences = [replace(side, left_out=left_out) for side in call.sequences]
    objective = Objective(loss, nll_weight, reduction, average)
    inputs = Inputs(chosen.hidden, rejected.hidden, head.weight, head.bias)
    return fused_loss(inputs, sequences, objective, constants, call.options)


_losses: LinearLosses[Head, Completions, Tensor, LinearPairLoss] = LinearLosses(linear_pair_loss)
linear_spo_loss = _losses.linear_spo_loss
linear_dpo_loss = _losses.linear_dpo_loss
linear_squared_loss = _losses.linear_squared_loss
linear_ipo_loss = _losses.linear_ipo_loss


def _zero_weights(weights: Tensor | float | None, like: Tensor) -> Tensor | None:
    """Which pairs have weight 0, as booleans of the shape of `like`, or None if none can."""
    if isinstance(weights, Tensor):
        return weights.to(like.device).expand(like.shape) == 0.0
    return None if weights is None or weights != 0.0 else torch.ones_like(like, dtype=torch.bool)
