"""`linear_spo_loss`: Stable Preference Optimization from hidden states, in one pass."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor

from spoloss.losses import SPO
from spoloss.torch._fused import LinearPairLoss
from spoloss.torch.fused import linear_pair_loss


def linear_spo_loss(
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    weight: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    reference_chosen_logps: Tensor | float,
    reference_rejected_logps: Tensor | float,
    *,
    beta: Tensor | float = 0.1,
    reward_gap: Tensor | float | None = None,
    linear_below: float | None = None,
    bias: Tensor | None = None,
    weights: Tensor | float | None = None,
    nll_weight: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    shift: bool = True,
    average: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
    vocab_parallel_group: torch.distributed.ProcessGroup | None = None,
) -> LinearPairLoss:
    """Stable Preference Optimization from hidden states, in one pass.

        l = -x * e^(-x),   x = beta * h / reward_gap,
        h = log[pi(y_w|x) / pi_ref(y_w|x)] - log[pi(y_l|x) / pi_ref(y_l|x)]

    Equation 6 of Y. Tan, "A Stable and Principled Loss Function for Direct Language Model
    Alignment", 2025. Each pair's loss has its minimum, -1/e, at h = reward_gap / beta.

    The policy's log-probabilities are computed from the hidden states without ever holding the
    logits. `linear_pair_loss` documents memory and cost.

    Args:
      chosen_hidden: last hidden states of the chosen sequences, [P, T, D], real floating.
      rejected_hidden: last hidden states of the rejected sequences, [P, T', D].
      weight: the head's weight, [V, D], in the dtype of the hidden states. Under DDP, FSDP and
        DeepSpeed, read it inside the forward of the wrapped module.
      chosen_labels: token ids, [P, T], integer. Labels equal to `ignore_index` do not count.
      rejected_labels: token ids of the rejected sequences, [P, T'].
      reference_chosen_logps: log pi_ref(y_w|x), nats, [P]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l|x), nats, [P]; 0.0 for no reference.
      beta: inverse of the target margin, 1 / nats, > 0: a number or [P].
      reward_gap: known reward difference r_w - r_l > 0: a number or [P]. None means 1.
      linear_below: x0 < 1; below it the loss continues along its tangent. None is equation 6.
      bias: the head's bias, [V].
      weights: factor of each pair: a number or [P]. A pair of weight 0 is left out, even if it
        contains nan. "mean" still divides by P.
      nll_weight: factor of the chosen sequences' negative log-likelihood per token, >= 0.
      reduction: "mean", "sum" or "none" (the loss of each pair).
      ignore_index: the label that does not count (prompt, padding).
      shift: True if position t predicts label t + 1; False if you have shifted already.
      average: use log-probabilities per token instead of sums, also for the reference.
      softcap: the model's final logit soft-capping, > 0; None for none.
      logit_scale: factor of the logits, not 0.
      temperature: divisor of the logits, > 0.
      chunk_size: tokens of a tile; None for a size that fits the device.
      chosen_cu_seqlens: offsets [P + 1] of chosen sequences packed in one row, without padding.
      rejected_cu_seqlens: offsets [P + 1] of the rejected sequences; both or neither.
      vocab_parallel_group: the ranks that share a head split over the vocabulary; `weight` and
        `bias` are then this rank's rows.

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps). The loss is differentiable once, by the
      hidden states, weight and bias. The log-probabilities, [P] in nats, are detached.

    Raises:
      TypeError: a dtype does not fit, an option is not a number, or the weight is a DTensor.
      ValueError: a shape, device or number does not fit, a label is outside [0, V), or a constant
        (references, `beta`, `reward_gap`, `weights`) requires a gradient.
      RuntimeError: `vocab_parallel_group` is given under torch.compile(fullgraph=True).
    """
    return linear_pair_loss(
        SPO(linear_below),
        chosen_hidden,
        rejected_hidden,
        weight,
        chosen_labels,
        rejected_labels,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        reward_gap=reward_gap,
        bias=bias,
        weights=weights,
        nll_weight=nll_weight,
        reduction=reduction,
        ignore_index=ignore_index,
        shift=shift,
        average=average,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        chunk_size=chunk_size,
        chosen_cu_seqlens=chosen_cu_seqlens,
        rejected_cu_seqlens=rejected_cu_seqlens,
        vocab_parallel_group=vocab_parallel_group,
    )
