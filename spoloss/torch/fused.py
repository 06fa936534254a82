"""The loss from hidden states in one pass, without the logits: `linear_pair_loss`.

`fused_spo`, `fused_dpo` and `fused_squared` have the same for the losses by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from spoloss._arrays import check_reduction, per_pair
from spoloss._options import check_nll_weight
from spoloss.losses import MarginLoss
from spoloss.pairs import beta_for_gap, check_loss, log_ratio_margin
from spoloss.torch._checks import Side, head_options, sequences_of
from spoloss.torch._fused import Inputs, LinearPairLoss, fused_loss
from spoloss.torch._labels import IGNORED, sum_sequences, targets_of
from spoloss.torch._objective import Objective, zero_weights
from spoloss.torch._tokens import Sequences


def linear_pair_loss(
    loss: MarginLoss,
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    weight: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    reference_chosen_logps: Tensor | float,
    reference_rejected_logps: Tensor | float,
    *,
    beta: Tensor | float,
    reward_gap: Tensor | float | None = None,
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
    """A loss of the margin and its gradients from hidden states, in one pass without the logits.

        h      = (log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))   (eq. 4)
        logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap) / temperature
        loss   = l(h) + nll_weight * NLL,    NLL = -log pi(y_w|x) / (number of its tokens)

    Equation 4 is from Y. Tan, "A Stable and Principled Loss Function for Direct Language Model
    Alignment", 2025. The result equals `pair_loss` of `linear_logps`, with three matrix products
    per token instead of four, because the forward computes the gradients.

    Memory in addition to the gradients: with a frozen head, one block of a tile's logits. With a
    trained head, one whole tile. Pairs share a tile of up to 32 MiB of float32 (1 GiB on CUDA) and
    at least 128 tokens. A longer pair uses a tile of up to 64 MiB (2 GiB) or the weight's size in
    float32, whichever is larger. An even longer pair is cut into tiles. Unless it is the first pair
    and there is no NLL, it needs one more float32 array of the weight's size. `reduction="none"`
    with a trained head computes the logits twice, and so does torch.compile.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()` or an object of your own with `value` and `slope`.
      chosen_hidden: last hidden states of the chosen sequences, shape [P, T, D], real floating.
      rejected_hidden: last hidden states of the rejected sequences, shape [P, T', D].
      weight: the head's weight, shape [V, D], in the dtype of the hidden states. Under DDP, FSDP
        and DeepSpeed, read it inside the forward of the wrapped module. Outside, its gradient is
        not synchronised, and no error is raised. It does not include a LoRA adapter on the head.
      chosen_labels: token ids, shape [P, T], integer. Labels equal to `ignore_index` (prompt,
        padding) do not count and cost nothing. Others must lie in [0, V).
      rejected_labels: token ids of the rejected sequences, shape [P, T'].
      reference_chosen_logps: log pi_ref(y_w|x), nats, shape [P]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l|x), nats, shape [P]; 0.0 for no reference.
      beta: passed to the loss, 1 / nats, > 0: a number or shape [P].
      reward_gap: known reward difference r_w - r_l > 0: a number or [P]. The loss is then evaluated
        with beta / reward_gap. None means 1.
      bias: the head's bias, shape [V].
      weights: factor of each pair and of its NLL: a number or shape [P]. A pair of weight 0 adds
        nothing to the loss or the gradients, even if it contains nan. "mean" still divides by P.
      nll_weight: factor of the chosen sequences' negative log-likelihood per token, >= 0.
      reduction: "mean", "sum" or "none" (the loss of each pair).
      ignore_index: the label that does not count.
      shift: True if position t predicts label t + 1, as in the batches of Transformers. False if
        you have shifted already, so position t predicts label t.
      average: use log-probabilities per token instead of sums, also for the reference.
      softcap: the model's final logit soft-capping (Gemma), > 0; None for none.
      logit_scale: factor of the logits, not 0 (Cohere; for Granite 1 / logits_scaling).
      temperature: divisor of the logits, > 0.
      chunk_size: tokens per tile; None for the sizes above.
      chosen_cu_seqlens: offsets of P chosen sequences that are packed into one row without padding,
        shape [P + 1], int32 or int64, rising from 0 to T. `chosen_hidden` is then [1, T, D] and
        `chosen_labels` [1, T].
      rejected_cu_seqlens: the same for the rejected sequences; both or neither.
      vocab_parallel_group: the ranks that share a head split over the vocabulary. `weight` and
        `bias` are then this rank's rows (for a DTensor: `to_local()`), in the order of the ranks,
        in shards of any size. Hidden states, labels and the upstream gradient must be equal on all
        ranks. The loss and the gradients by the hidden states are then equal too.

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps). The loss is differentiable once, by the
      hidden states, weight and bias. The log-probabilities, [P] in nats, are detached.

    Raises:
      TypeError: a dtype does not fit, an option is not a number, `loss` is not a loss object, or
        the weight is a sharded DTensor.
      ValueError: a shape, device or number does not fit, a label is outside [0, V), offsets are out
        of order, a constant (references, `beta`, `reward_gap`, `weights`) requires a gradient, the
        weight is partitioned by ZeRO-3, or the ranks of `vocab_parallel_group` do not agree or have
        too few rows for the labels.
      RuntimeError: `vocab_parallel_group` is given under torch.compile(fullgraph=True).
    """
    check_loss(loss)
    check_reduction(reduction)
    check_nll_weight(nll_weight)
    sides = [
        Side("chosen_", chosen_hidden, chosen_labels, chosen_cu_seqlens),
        Side("rejected_", rejected_hidden, rejected_labels, rejected_cu_seqlens),
    ]
    options = head_options(
        sides,
        weight,
        bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        chunk_size=chunk_size,
        ignore_index=ignore_index,
        vocab_parallel_group=vocab_parallel_group,
    )
    _check_sides(*sides)
    constants = {
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
        "beta": beta,
        "reward_gap": reward_gap,
        "weights": weights,
    }
    like = _like_margins(
        chosen_hidden, sequences_of(sides[0]), reference_chosen_logps, reference_rejected_logps
    )
    _check_constants(like, constants)
    sequences = [
        Sequences(
            f"{side.prefix}labels",
            targets_of(side.labels, ignore_index, shift=shift, cu_seqlens=side.cu_seqlens),
            ignore_index,
            side.cu_seqlens,
            zero_weights(weights, like),
        )
        for side in sides
    ]
    lengths = [sum_sequences(side.targets != IGNORED, side.cu_seqlens) for side in sequences]
    objective = Objective(
        loss,
        reference_chosen_logps,
        reference_rejected_logps,
        beta_for_gap(beta, reward_gap, like),
        weights,
        nll_weight,
        reduction,
        average,
        torch.stack(lengths),
    )
    inputs = Inputs(chosen_hidden, rejected_hidden, weight, bias)
    return fused_loss(inputs, sequences, objective, options)


def _like_margins(hidden: Tensor, pairs: int, *references: Tensor | float) -> Tensor:
    """An array of the margins' shape [P], dtype and device, to check other arguments against."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    for reference in references:
        if isinstance(reference, Tensor) and reference.is_floating_point():
            dtype = torch.promote_types(dtype, reference.dtype)
    return hidden.new_zeros(pairs, dtype=dtype)


def _check_sides(chosen: Side, rejected: Side) -> None:
    """Check that the two sides form pairs."""
    if (chosen.cu_seqlens is None) != (rejected.cu_seqlens is None):
        given = "chosen_" if rejected.cu_seqlens is None else "rejected_"
        raise ValueError(
            f"chosen_cu_seqlens and rejected_cu_seqlens must both be given or neither, "
            f"got {given}cu_seqlens alone"
        )
    if sequences_of(chosen) != sequences_of(rejected):
        names = "hidden" if chosen.cu_seqlens is None else "cu_seqlens"
        raise ValueError(
            f"chosen_{names} and rejected_{names} must have the same number of pairs, "
            f"got {sequences_of(chosen)} and {sequences_of(rejected)}"
        )


def _check_constants(like: Tensor, constants: dict[str, Any]) -> None:
    """Check the constant arguments before any computation. `pair_loss` would check them after."""
    for name, value in constants.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient, because the fused loss computes none for it. "
                "Detach it, or use linear_logps and pair_loss"
            )
    references = (constants["reference_chosen_logps"], constants["reference_rejected_logps"])
    log_ratio_margin(like, like, *references)
    beta_for_gap(constants["beta"], constants["reward_gap"], like)
    if constants["weights"] is not None:
        per_pair("weights", constants["weights"], like, positive=False)
