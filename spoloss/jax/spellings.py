"""The fused losses by name: `linear_pair_loss` with the losses of `spoloss.losses`."""

from __future__ import annotations

from jax import Array
from jax.sharding import Mesh

from spoloss.jax._mesh import Axis
from spoloss.jax.fused import LinearPairLoss, linear_pair_loss, no_logps
from spoloss.losses import DPO, SPO, Squared
from spoloss.pairs import beta_for_gap


def linear_spo_loss(
    chosen_hidden: Array,
    rejected_hidden: Array,
    weight: Array,
    chosen_labels: Array,
    rejected_labels: Array,
    reference_chosen_logps: Array | float,
    reference_rejected_logps: Array | float,
    *,
    beta: Array | float = 0.1,
    reward_gap: Array | float | None = None,
    linear_below: float | None = None,
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
    """Stable Preference Optimization (Tan 2025, eq. 6) from hidden states, in one pass.

        l = -x * e^(-x),   x = beta * h / reward_gap

    h is the difference of the log-ratios log(pi / pi_ref) of the chosen and the rejected sequence.
    Loss and gradients come from one pass over the tokens, and the logits of all tokens never exist
    together: see `linear_pair_loss`.

    Args:
      chosen_hidden: last hidden states of the chosen sequences, shape [P, T, D], real floating.
      rejected_hidden: last hidden states of the rejected sequences, shape [P, T', D]; T' may differ
        from T.
      weight: the head's weight, shape [V, D], in the dtype of the hidden states. Flax keeps a
        kernel [D, V]: pass `kernel.T`. For padding rows of the vocabulary pass a bias that is -inf
        there.
      chosen_labels: token ids of the chosen sequences, shape [P, T], integer. Those equal to
        `ignore_index` (prompt, padding) do not count, and their hidden states may hold nan. A label
        outside [0, V) makes its log-probability nan.
      rejected_labels: token ids of the rejected sequences, shape [P, T'], integer.
      reference_chosen_logps: log pi_ref(y_w|x), summed over tokens, nats, shape [P]; 0.0 for no
        reference.
      reference_rejected_logps: log pi_ref(y_l|x), summed over tokens, nats, shape [P]; 0.0 for no
        reference.
      beta: inverse of the target margin, 1 / nats, > 0: a number or shape [P].
      reward_gap: known reward difference r_w - r_l > 0: a number or shape [P]. None is 1, the
        paper's choice for an unknown gap.
      linear_below: x0 < 1; for x < x0 the loss continues along its tangent. None is equation 6. A
        number.
      bias: the head's bias, shape [V].
      weights: factor of each pair, of its NLL too: a number or shape [P]. A pair of weight 0 adds
        nothing, whatever its hidden states hold. "mean" still divides by P.
      nll_weight: factor of the chosen sequences' negative log-likelihood per token, which is added
        to the loss, >= 0. A number.
      reduction: "mean", "sum" or "none". Static under `jax.jit`.
      ignore_index: the label to leave out. Static under `jax.jit`.
      shift: position t predicts label t + 1, as Transformers lays them out. False: the caller has
        shifted already, and position t predicts label t. Static under `jax.jit`.
      average: log-probabilities per token in place of sums; the reference's must then be averages
        too. Static under `jax.jit`.
      softcap: the model's final logit soft-capping (Gemma), > 0; None is no capping. A number.
      logit_scale: factor of the logits (Cohere; for Granite 1 / logits_scaling), not 0. A number.
      temperature: divisor of the logits, > 0. A number.
      chunk_size: tokens of a tile, whose logits exist in float32 at a time. None for tiles of 64
        MiB on a CPU and 1 GiB elsewhere, but of at least 256 tokens.
      chosen_cu_seqlens: offsets of P chosen sequences that lie one after another, without padding,
        in one row (then the hidden states are [1, T, D] and the labels [1, T]), shape [P + 1],
        integer, rising from 0 to T. Offsets out of order give nan.
      rejected_cu_seqlens: the same for the rejected sequences; both sides are packed or neither is.
      mesh: the devices over which the arrays are split; None for one device. With a mesh the
        computation runs under `jax.shard_map` and gathers neither hidden states nor weight.
      batch_axis: the mesh axis or axes over which the pairs are split: P must be a multiple of
        their size.
      vocab_axis: the mesh axis or axes over which the rows of `weight` and `bias` are split: V must
        be a multiple of their size.

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps). The loss is 0-d, or shape [P] with "none",
      at least float32, and differentiable once by reverse mode: by the hidden states, weight, bias,
      references, beta, reward_gap and weights. The log-probabilities are constants.

    Raises:
      TypeError: an array is not a JAX array or has a dtype that does not fit, or an option is not a
        number.
      ValueError: a shape or a number does not fit, the reduction does not exist, or mesh and axes
        do not go together.
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
        beta=beta_for_gap(beta, reward_gap, no_logps(weight, chosen_labels, chosen_cu_seqlens)),
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


def linear_dpo_loss(
    chosen_hidden: Array,
    rejected_hidden: Array,
    weight: Array,
    chosen_labels: Array,
    rejected_labels: Array,
    reference_chosen_logps: Array | float,
    reference_rejected_logps: Array | float,
    *,
    beta: Array | float = 0.1,
    label_smoothing: float = 0.0,
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
    """Direct Preference Optimization (DPO eq. 7, arXiv:2305.18290) from hidden states, in one pass.

        l = -(1 - e) * log s(x) - e * log s(-x),   x = beta * h,  s the logistic function

    h is the difference of the log-ratios log(pi / pi_ref) of the chosen and the rejected sequence.
    Loss and gradients come from one pass over the tokens, and the logits of all tokens never exist
    together: see `linear_pair_loss`.

    Args:
      chosen_hidden: last hidden states of the chosen sequences, shape [P, T, D], real floating.
      rejected_hidden: last hidden states of the rejected sequences, shape [P, T', D]; T' may differ
        from T.
      weight: the head's weight, shape [V, D], in the dtype of the hidden states. Flax keeps a
        kernel [D, V]: pass `kernel.T`. For padding rows of the vocabulary pass a bias that is -inf
        there.
      chosen_labels: token ids of the chosen sequences, shape [P, T], integer. Those equal to
        `ignore_index` (prompt, padding) do not count, and their hidden states may hold nan. A label
        outside [0, V) makes its log-probability nan.
      rejected_labels: token ids of the rejected sequences, shape [P, T'], integer.
      reference_chosen_logps: log pi_ref(y_w|x), summed over tokens, nats, shape [P]; 0.0 for no
        reference.
      reference_rejected_logps: log pi_ref(y_l|x), summed over tokens, nats, shape [P]; 0.0 for no
        reference.
      beta: strength of the pull to the reference, 1 / nats, > 0: a number or shape [P].
      label_smoothing: e in [0, 0.5), the share of labels taken to be flipped (conservative DPO). A
        number.
      bias: the head's bias, shape [V].
      weights: factor of each pair, of its NLL too: a number or shape [P]. A pair of weight 0 adds
        nothing, whatever its hidden states hold. "mean" still divides by P.
      nll_weight: factor of the chosen sequences' negative log-likelihood per token, which is added
        to the loss, >= 0. A number.
      reduction: "mean", "sum" or "none". Static under `jax.jit`.
      ignore_index: the label to leave out. Static under `jax.jit`.
      shift: position t predicts label t + 1, as Transformers lays them out. False: the caller has
        shifted already, and position t predicts label t. Static under `jax.jit`.
      average: log-probabilities per token in place of sums; the reference's must then be averages
        too. Static under `jax.jit`.
      softcap: the model's final logit soft-capping (Gemma), > 0; None is no capping. A number.
      logit_scale: factor of the logits (Cohere; for Granite 1 / logits_scaling), not 0. A number.
      temperature: divisor of the logits, > 0. A number.
      chunk_size: tokens of a tile, whose logits exist in float32 at a time. None for tiles of 64
        MiB on a CPU and 1 GiB elsewhere, but of at least 256 tokens.
      chosen_cu_seqlens: offsets of P chosen sequences that lie one after another, without padding,
        in one row (then the hidden states are [1, T, D] and the labels [1, T]), shape [P + 1],
        integer, rising from 0 to T. Offsets out of order give nan.
      rejected_cu_seqlens: the same for the rejected sequences; both sides are packed or neither is.
      mesh: the devices over which the arrays are split; None for one device. With a mesh the
        computation runs under `jax.shard_map` and gathers neither hidden states nor weight.
      batch_axis: the mesh axis or axes over which the pairs are split: P must be a multiple of
        their size.
      vocab_axis: the mesh axis or axes over which the rows of `weight` and `bias` are split: V must
        be a multiple of their size.

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps). The loss is 0-d, or shape [P] with "none",
      at least float32, and differentiable once by reverse mode: by the hidden states, weight, bias,
      references, beta and weights. The log-probabilities are constants.

    Raises:
      TypeError: an array is not a JAX array or has a dtype that does not fit, or an option is not a
        number.
      ValueError: a shape or a number does not fit, the reduction does not exist, or mesh and axes
        do not go together.
    """
    return linear_pair_loss(
        DPO(label_smoothing),
        chosen_hidden,
        rejected_hidden,
        weight,
        chosen_labels,
        rejected_labels,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
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


def linear_squared_loss(
    chosen_hidden: Array,
    rejected_hidden: Array,
    weight: Array,
    chosen_labels: Array,
    rejected_labels: Array,
    reference_chosen_logps: Array | float,
    reference_rejected_logps: Array | float,
    *,
    beta: Array | float = 0.1,
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
    """Squared error to the optimal margin (Tan 2025, section 2.2) from hidden states, in one pass.

        l = (h - reward_gap / beta)^2, in nats^2

    h is the difference of the log-ratios log(pi / pi_ref) of the chosen and the rejected sequence.
    Loss and gradients come from one pass over the tokens, and the logits of all tokens never exist
    together: see `linear_pair_loss`.

    Args:
      chosen_hidden: last hidden states of the chosen sequences, shape [P, T, D], real floating.
      rejected_hidden: last hidden states of the rejected sequences, shape [P, T', D]; T' may differ
        from T.
      weight: the head's weight, shape [V, D], in the dtype of the hidden states. Flax keeps a
        kernel [D, V]: pass `kernel.T`. For padding rows of the vocabulary pass a bias that is -inf
        there.
      chosen_labels: token ids of the chosen sequences, shape [P, T], integer. Those equal to
        `ignore_index` (prompt, padding) do not count, and their hidden states may hold nan. A label
        outside [0, V) makes its log-probability nan.
      rejected_labels: token ids of the rejected sequences, shape [P, T'], integer.
      reference_chosen_logps: log pi_ref(y_w|x), summed over tokens, nats, shape [P]; 0.0 for no
        reference.
      reference_rejected_logps: log pi_ref(y_l|x), summed over tokens, nats, shape [P]; 0.0 for no
        reference.
      beta: inverse of the target margin, 1 / nats, > 0: a number or shape [P].
      reward_gap: known reward difference r_w - r_l > 0: a number or shape [P]. None is 1.
      bias: the head's bias, shape [V].
      weights: factor of each pair, of its NLL too: a number or shape [P]. A pair of weight 0 adds
        nothing, whatever its hidden states hold. "mean" still divides by P.
      nll_weight: factor of the chosen sequences' negative log-likelihood per token, which is added
        to the loss, >= 0. A number.
      reduction: "mean", "sum" or "none". Static under `jax.jit`.
      ignore_index: the label to leave out. Static under `jax.jit`.
      shift: position t predicts label t + 1, as Transformers lays them out. False: the caller has
        shifted already, and position t predicts label t. Static under `jax.jit`.
      average: log-probabilities per token in place of sums; the reference's must then be averages
        too. Static under `jax.jit`.
      softcap: the model's final logit soft-capping (Gemma), > 0; None is no capping. A number.
      logit_scale: factor of the logits (Cohere; for Granite 1 / logits_scaling), not 0. A number.
      temperature: divisor of the logits, > 0. A number.
      chunk_size: tokens of a tile, whose logits exist in float32 at a time. None for tiles of 64
        MiB on a CPU and 1 GiB elsewhere, but of at least 256 tokens.
      chosen_cu_seqlens: offsets of P chosen sequences that lie one after another, without padding,
        in one row (then the hidden states are [1, T, D] and the labels [1, T]), shape [P + 1],
        integer, rising from 0 to T. Offsets out of order give nan.
      rejected_cu_seqlens: the same for the rejected sequences; both sides are packed or neither is.
      mesh: the devices over which the arrays are split; None for one device. With a mesh the
        computation runs under `jax.shard_map` and gathers neither hidden states nor weight.
      batch_axis: the mesh axis or axes over which the pairs are split: P must be a multiple of
        their size.
      vocab_axis: the mesh axis or axes over which the rows of `weight` and `bias` are split: V must
        be a multiple of their size.

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps). The loss is 0-d, or shape [P] with "none",
      at least float32, and differentiable once by reverse mode: by the hidden states, weight, bias,
      references, beta, reward_gap and weights. The log-probabilities are constants.

    Raises:
      TypeError: an array is not a JAX array or has a dtype that does not fit, or an option is not a
        number.
      ValueError: a shape or a number does not fit, the reduction does not exist, or mesh and axes
        do not go together.
    """
    return linear_pair_loss(
        Squared(),
        chosen_hidden,
        rejected_hidden,
        weight,
        chosen_labels,
        rejected_labels,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta_for_gap(beta, reward_gap, no_logps(weight, chosen_labels, chosen_cu_seqlens)),
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


def linear_ipo_loss(
    chosen_hidden: Array,
    rejected_hidden: Array,
    weight: Array,
    chosen_labels: Array,
    rejected_labels: Array,
    reference_chosen_logps: Array | float,
    reference_rejected_logps: Array | float,
    *,
    beta: Array | float = 0.1,
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
    """Identity Preference Optimization (IPO, arXiv:2310.12036) from hidden states, in one pass.

        l = (h - 1 / (2 * beta))^2, in nats^2

    h is the difference of the log-ratios log(pi / pi_ref) of the chosen and the rejected sequence.
    Loss and gradients come from one pass over the tokens, and the logits of all tokens never exist
    together: see `linear_pair_loss`.

    Args:
      chosen_hidden: last hidden states of the chosen sequences, shape [P, T, D], real floating.
      rejected_hidden: last hidden states of the rejected sequences, shape [P, T', D]; T' may differ
        from T.
      weight: the head's weight, shape [V, D], in the dtype of the hidden states. Flax keeps a
        kernel [D, V]: pass `kernel.T`. For padding rows of the vocabulary pass a bias that is -inf
        there.
      chosen_labels: token ids of the chosen sequences, shape [P, T], integer. Those equal to
        `ignore_index` (prompt, padding) do not count, and their hidden states may hold nan. A label
        outside [0, V) makes its log-probability nan.
      rejected_labels: token ids of the rejected sequences, shape [P, T'], integer.
      reference_chosen_logps: log pi_ref(y_w|x), summed over tokens, nats, shape [P]; 0.0 for no
        reference.
      reference_rejected_logps: log pi_ref(y_l|x), summed over tokens, nats, shape [P]; 0.0 for no
        reference.
      beta: strength of the pull to the reference, 1 / nats, > 0: a number or shape [P].
      bias: the head's bias, shape [V].
      weights: factor of each pair, of its NLL too: a number or shape [P]. A pair of weight 0 adds
        nothing, whatever its hidden states hold. "mean" still divides by P.
      nll_weight: factor of the chosen sequences' negative log-likelihood per token, which is added
        to the loss, >= 0. A number.
      reduction: "mean", "sum" or "none". Static under `jax.jit`.
      ignore_index: the label to leave out. Static under `jax.jit`.
      shift: position t predicts label t + 1, as Transformers lays them out. False: the caller has
        shifted already, and position t predicts label t. Static under `jax.jit`.
      average: log-probabilities per token in place of sums; the reference's must then be averages
        too. Static under `jax.jit`.
      softcap: the model's final logit soft-capping (Gemma), > 0; None is no capping. A number.
      logit_scale: factor of the logits (Cohere; for Granite 1 / logits_scaling), not 0. A number.
      temperature: divisor of the logits, > 0. A number.
      chunk_size: tokens of a tile, whose logits exist in float32 at a time. None for tiles of 64
        MiB on a CPU and 1 GiB elsewhere, but of at least 256 tokens.
      chosen_cu_seqlens: offsets of P chosen sequences that lie one after another, without padding,
        in one row (then the hidden states are [1, T, D] and the labels [1, T]), shape [P + 1],
        integer, rising from 0 to T. Offsets out of order give nan.
      rejected_cu_seqlens: the same for the rejected sequences; both sides are packed or neither is.
      mesh: the devices over which the arrays are split; None for one device. With a mesh the
        computation runs under `jax.shard_map` and gathers neither hidden states nor weight.
      batch_axis: the mesh axis or axes over which the pairs are split: P must be a multiple of
        their size.
      vocab_axis: the mesh axis or axes over which the rows of `weight` and `bias` are split: V must
        be a multiple of their size.

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps). The loss is 0-d, or shape [P] with "none",
      at least float32, and differentiable once by reverse mode: by the hidden states, weight, bias,
      references, beta and weights. The log-probabilities are constants.

    Raises:
      TypeError: an array is not a JAX array or has a dtype that does not fit, or an option is not a
        number.
      ValueError: a shape or a number does not fit, the reduction does not exist, or mesh and axes
        do not go together.
    """
    return linear_pair_loss(
        Squared(),
        chosen_hidden,
        rejected_hidden,
        weight,
        chosen_labels,
        rejected_labels,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=2.0 * beta,
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
