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
from spoloss._objective import Constants, Objective
from spoloss._options import check_flag, check_nll_weight
from spoloss.losses import DPO, SPO, MarginLoss, PairLoss, Squared, pairwise
from spoloss.pairs import IPO_GAP
from spoloss.torch._arguments import Completions, Head
from spoloss.torch._checks import prepare
from spoloss.torch._fused import Inputs, LinearPairLoss, fused_loss

__all__ = [
    "Completions",
    "Head",
    "LinearPairLoss",
    "linear_dpo_loss",
    "linear_ipo_loss",
    "linear_pair_loss",
    "linear_spo_loss",
    "linear_squared_loss",
]


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
    pairs, others = (side.count for side in call.sequences)
    check_pairs(pairs, others)
    references = reference_chosen_logps, reference_rejected_logps
    constants = Constants(*references, beta, reward_gap, weights)
    dtype = torch.promote_types(chosen.hidden.dtype, torch.float32)
    like = chosen.hidden.new_zeros(pairs, dtype=dtype)
    constants.check(like)
    left_out = _zero_weights(weights, like)
    sequences = [replace(side, left_out=left_out) for side in call.sequences]
    objective = Objective(loss, nll_weight, reduction, average)
    inputs = Inputs(chosen.hidden, rejected.hidden, head.weight, head.bias)
    return fused_loss(inputs, sequences, objective, constants, call.options)


def linear_spo_loss(
    head: Head,
    chosen: Completions,
    rejected: Completions,
    reference_chosen_logps: Tensor | float,
    reference_rejected_logps: Tensor | float,
    *,
    beta: Tensor | float,
    linear_below: float | None = None,
    reward_gap: Tensor | float | None = None,
    weights: Tensor | float | None = None,
    nll_weight: float = 0.0,
    average: bool = False,
    reduction: str = "mean",
) -> LinearPairLoss:
    """Stable Preference Optimization (SPO) from hidden states, paper eq. 6: see `linear_pair_loss`.

        l = -x * e^(-x),   x = beta * h / reward_gap

    h = (log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x)) is the margin, in
    nats (paper eq. 4). Source: Y. Tan, "A Stable and Principled Loss Function for Direct Language
    Model Alignment", arXiv:2508.07137v1 ("the paper").

    Args:
      head: how hidden states become logits.
      chosen: the chosen completions, P of them.
      rejected: the rejected completions, P of them.
      reference_chosen_logps: log pi_ref(y_w|x), nats, [P]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l|x), nats, [P]; 0.0 for no reference.
      beta: inverse of the target margin, 1 / nats, > 0: a number or [P].
      linear_below: x0 in (-700, 1). For x < x0 the loss continues along its tangent at x0. None is
        equation 6 as published.
      reward_gap: known r_w - r_l, > 0: a number or [P]. The target is reward_gap / beta. None means
        1.
      weights: factor of each pair: a number or [P]. None means 1.
      nll_weight: factor of the chosen completions' negative log-likelihood per token, >= 0.
      average: use log-probabilities per token instead of sums, also for the reference.
      reduction: "mean", "sum" or "none" (the loss of each pair).

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps), as `linear_pair_loss`.

    Raises:
      TypeError: as `linear_pair_loss`, or `linear_below` is not a number.
      ValueError: as `linear_pair_loss`, or `linear_below` is out of range.
    """
    return linear_pair_loss(
        SPO(linear_below),
        head,
        chosen,
        rejected,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        reward_gap=reward_gap,
        weights=weights,
        nll_weight=nll_weight,
        average=average,
        reduction=reduction,
    )


def linear_dpo_loss(
    head: Head,
    chosen: Completions,
    rejected: Completions,
    reference_chosen_logps: Tensor | float,
    reference_rejected_logps: Tensor | float,
    *,
    beta: Tensor | float,
    label_smoothing: float = 0.0,
    weights: Tensor | float | None = None,
    nll_weight: float = 0.0,
    average: bool = False,
    reduction: str = "mean",
) -> LinearPairLoss:
    """Direct Preference Optimization (DPO) from hidden states: see `linear_pair_loss`.

        l = -(1 - e) * log s(x) - e * log s(-x),   x = beta * h,   s(x) = 1 / (1 + e^(-x))

    arXiv:2305.18290, eq. 7, with the margin h in nats, and label smoothing e.

    Args:
      head: how hidden states become logits.
      chosen: the chosen completions, P of them.
      rejected: the rejected completions, P of them.
      reference_chosen_logps: log pi_ref(y_w|x), nats, [P]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l|x), nats, [P]; 0.0 for no reference.
      beta: strength of the pull to the reference, 1 / nats, > 0: a number or [P].
      label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels.
      weights: factor of each pair: a number or [P]. None means 1.
      nll_weight: factor of the chosen completions' negative log-likelihood per token, >= 0.
      average: use log-probabilities per token instead of sums, also for the reference.
      reduction: "mean", "sum" or "none" (the loss of each pair).

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps), as `linear_pair_loss`.

    Raises:
      TypeError: as `linear_pair_loss`, or `label_smoothing` is not a number.
      ValueError: as `linear_pair_loss`, or `label_smoothing` is out of range.
    """
    return linear_pair_loss(
        DPO(label_smoothing),
        head,
        chosen,
        rejected,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        weights=weights,
        nll_weight=nll_weight,
        average=average,
        reduction=reduction,
    )


def linear_squared_loss(
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
    """The squared error of the margin to its target from hidden states: see `linear_pair_loss`.

        l = (h - reward_gap / beta)^2, in nats^2

    Section 2.2 of Y. Tan, "A Stable and Principled Loss Function for Direct Language Model
    Alignment", arXiv:2508.07137v1, with the margin h in nats (eq. 4).

    Args:
      head: how hidden states become logits.
      chosen: the chosen completions, P of them.
      rejected: the rejected completions, P of them.
      reference_chosen_logps: log pi_ref(y_w|x), nats, [P]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l|x), nats, [P]; 0.0 for no reference.
      beta: inverse of the target margin, 1 / nats, > 0: a number or [P].
      reward_gap: known r_w - r_l, > 0: a number or [P]. The target is reward_gap / beta. None means
        1.
      weights: factor of each pair: a number or [P]. None means 1.
      nll_weight: factor of the chosen completions' negative log-likelihood per token, >= 0.
      average: use log-probabilities per token instead of sums, also for the reference.
      reduction: "mean", "sum" or "none" (the loss of each pair).

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps), as `linear_pair_loss`.

    Raises:
      TypeError: as `linear_pair_loss`.
      ValueError: as `linear_pair_loss`.
    """
    return linear_pair_loss(
        Squared(),
        head,
        chosen,
        rejected,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        reward_gap=reward_gap,
        weights=weights,
        nll_weight=nll_weight,
        average=average,
        reduction=reduction,
    )


def linear_ipo_loss(
    head: Head,
    chosen: Completions,
    rejected: Completions,
    reference_chosen_logps: Tensor | float,
    reference_rejected_logps: Tensor | float,
    *,
    beta: Tensor | float,
    weights: Tensor | float | None = None,
    nll_weight: float = 0.0,
    average: bool = False,
    reduction: str = "mean",
) -> LinearPairLoss:
    """Identity Preference Optimization (IPO) from hidden states: see `linear_pair_loss`.

        l = (h - 1 / (2 * beta))^2, in nats^2

    Equation 17 of Azar et al., arXiv:2310.12036, on summed log-probabilities, with the margin h in
    nats; `average=True` gives the averages over tokens that some trainers use.

    Args:
      head: how hidden states become logits.
      chosen: the chosen completions, P of them.
      rejected: the rejected completions, P of them.
      reference_chosen_logps: log pi_ref(y_w|x), nats, [P]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l|x), nats, [P]; 0.0 for no reference.
      beta: strength of the pull to the reference, 1 / nats, > 0: a number or [P].
      weights: factor of each pair: a number or [P]. None means 1.
      nll_weight: factor of the chosen completions' negative log-likelihood per token, >= 0.
      average: use log-probabilities per token instead of sums, also for the reference.
      reduction: "mean", "sum" or "none" (the loss of each pair).

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps), as `linear_pair_loss`.

    Raises:
      TypeError: as `linear_pair_loss`.
      ValueError: as `linear_pair_loss`.
    """
    return linear_pair_loss(
        Squared(),
        head,
        chosen,
        rejected,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        reward_gap=IPO_GAP,
        weights=weights,
        nll_weight=nll_weight,
        average=average,
        reduction=reduction,
    )


def _zero_weights(weights: Tensor | float | None, like: Tensor) -> Tensor | None:
    """Which pairs have weight 0, as booleans of the shape of `like`, or None if none can."""
    if isinstance(weights, Tensor):
        return weights.to(like.device).expand(like.shape) == 0.0
    return None if weights is None or weights != 0.0 else torch.ones_like(like, dtype=torch.bool)
