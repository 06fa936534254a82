"""The loss from hidden states in one pass, without the logits: `linear_pair_loss`.

`fused_spo`, `fused_dpo` and `fused_squared` have the same for the losses by name.
"""

from __future__ import annotations

from jax import Array
from jax.sharding import Mesh

from spoloss.jax._call import LinearPairLoss, checked_pair_loss
from spoloss.jax._mesh import Axis
from spoloss.losses import MarginLoss


def linear_pair_loss(
    loss: MarginLoss,
    chosen_hidden: Array,
    rejected_hidden: Array,
    weight: Array,
    chosen_labels: Array,
    rejected_labels: Array,
    reference_chosen_logps: Array | float,
    reference_rejected_logps: Array | float,
    *,
    beta: Array | float,
    reward_gap: Array | float | None = None,
    bias: Array | None = None,
    weights: Array | float | None = None,
    nll_weight: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    shift: bool = True,
    average: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    chosen_cu_seqlens: Array | None = None,
    rejected_cu_seqlens: Array | None = None,
    mesh: Mesh | None = None,
    batch_axis: Axis = None,
    vocab_axis: Axis = None,
) -> LinearPairLoss:
    """A loss of the margin and its gradients from hidden states, in one pass without the logits.

        h      = (log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))   (eq. 4)
        logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap) / temperature
        loss   = l(h) + nll_weight * NLL,    NLL = -log pi(y_w|x) / (number of its tokens)

    Equation 4 is from Y. Tan, "A Stable and Principled Loss Function for Direct Language Model
    Alignment", 2025. The result equals `pair_loss` of `linear_logps`, with three matrix products
    per token instead of four, because the forward computes the gradients. Without differentiation,
    only the loss is computed. With a frozen head there are two products and no gradient of the
    weight's size.

    Memory in addition to the gradients: the float32 logits of one tile. Pairs share a tile. A pair
    that is longer than a tile is cut into tiles, which needs one more float32 array of the weight's
    size. `reduction="none"` with a trained head computes the logits twice.

    Under `jax.jit`, `loss` and all arguments after `beta` that are not arrays are static.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()` or an object of your own with `value` and `slope`.
        It must be hashable, like a frozen dataclass. Pass values that change from step to step as
        `beta` or `weights`.
      chosen_hidden: last hidden states of the chosen sequences, [P, T, D], real floating.
      rejected_hidden: last hidden states of the rejected sequences, [P, T', D].
      weight: the head's weight, [V, D], in the dtype of the hidden states. For a Flax kernel
        [D, V], pass `kernel.T`. If some rows are padding, pass a bias that is -inf there.
      chosen_labels: token ids, [P, T], integer. Labels equal to `ignore_index` (prompt, padding) do
        not count and cost nothing, and their hidden states may be nan. A label outside [0, V) makes
        its log-probability nan.
      rejected_labels: token ids of the rejected sequences, [P, T'].
      reference_chosen_logps: log pi_ref(y_w|x), nats, [P]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l|x), nats, [P]; 0.0 for no reference.
      beta: what the loss takes as beta, 1 / nats, > 0: a number or [P].
      reward_gap: known reward difference r_w - r_l > 0: a number or [P]. The loss is then evaluated
        with beta / reward_gap. None means 1.
      bias: the head's bias, [V].
      weights: factor of each pair and of its NLL: a number or [P]. A pair of weight 0 adds nothing
        to the loss or the gradients, even if it contains nan. "mean" still divides by P.
      nll_weight: factor of the chosen sequences' negative log-likelihood per token, >= 0.
      reduction: "mean", "sum" or "none" (the loss of each pair).
      ignore_index: the label that does not count.
      shift: True if position t predicts label t + 1, as in the batches of Transformers. False if
        you have shifted already, so position t predicts label t.
      average: use log-probabilities per token instead of sums, also for the reference.
      softcap: the model's final logit soft-capping (Gemma), > 0; None for none.
      logit_scale: factor of the logits, not 0 (Cohere; for Granite 1 / logits_scaling).
      temperature: divisor of the logits, > 0.
      chunk_size: the largest number of tokens per tile. None for 64 MiB of float32 logits on a CPU
        and 1 GiB on other devices, but at least 256 tokens.
      chosen_cu_seqlens: offsets of P chosen sequences that are packed into one row without padding,
        [P + 1], integer, rising from 0 to T. `chosen_hidden` is then [1, T, D] and `chosen_labels`
        [1, T]. Offsets out of order make the loss nan.
      rejected_cu_seqlens: the same for the rejected sequences; both or neither.
      mesh: the devices that share the work, or None for one device. With a mesh, the computation
        runs under `jax.shard_map`, which gathers neither the hidden states nor the weight.
      batch_axis: the mesh axis, or axes, over which the pairs are split. P must be a multiple of
        their size.
      vocab_axis: the mesh axis, or axes, over which the rows of `weight` and `bias` are split. V
        must be a multiple of their size.

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps). The loss is differentiable once by reverse
      mode: by the hidden states, weight, bias, references, `beta` and `weights`. The
      log-probabilities, [P] in nats, are constants.

    Raises:
      TypeError: an argument is not a JAX array, a dtype does not fit, `loss` is not a hashable loss
        object, or an option is not a number.
      ValueError: a shape or a number does not fit, `reduction` is unknown, or `mesh` and the axes
        do not fit together.
    """
    return checked_pair_loss(
        loss,
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
        mesh=mesh,
        batch_axis=batch_axis,
        vocab_axis=vocab_axis,
    )
