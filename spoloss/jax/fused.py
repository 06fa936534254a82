"""The fused loss of the margin, in JAX: from hidden states to the loss, never the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from spoloss._arrays import check_reduction, is_number, per_pair
from spoloss._options import check_head_options, check_nll_weight
from spoloss.jax._checks import check_head, check_hidden, check_labels, make_split
from spoloss.jax._labels import Labels, Reading
from spoloss.jax._mesh import Axis
from spoloss.jax._objective import Constants, Objective
from spoloss.jax._pair_rule import Inputs, PairCall, loss_of_hidden
from spoloss.jax._softmax import HeadOptions, wide
from spoloss.losses import MarginLoss
from spoloss.pairs import check_loss, log_ratio_margin


class LinearPairLoss(NamedTuple):
    """The loss, and the policy's log-probabilities [P] in nats, constants, for metrics."""

    loss: Array
    chosen_logps: Array
    rejected_logps: Array


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
    """A loss of the margin from hidden states, in one pass: loss and gradients, never the logits.

        logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap) / temperature
        h      = (log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))
        loss   = l(h) + nll_weight * NLL,    NLL = -log pi(y_w|x) / (number of its tokens)

    Under differentiation the forward pass makes the gradients, tile by tile, and the backward pass
    scales them: three matrix products per token, where a head that computes its logits again needs
    four. Memory beyond the gradients is the float32 logits of one tile. Pairs share a tile; a pair
    that is longer than one needs a second float32 array of the weight's size. With a frozen head
    there are two products and no array of that size. Tokens with ignored labels are never worked
    on. Without differentiation nothing but the loss is computed. `reduction="none"` with a trained
    head computes the logits twice, because each pair's upstream gradient has to come first.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()` or an object of your own with `value` and `slope`.
        Static under `jax.jit`, so it must be hashable, as a frozen dataclass is. What changes from
        step to step goes through `beta` and `weights`.
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
      beta: passed to the loss, 1 / nats, > 0: a number or shape [P].
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
      TypeError: an array is not a JAX array or has a dtype that does not fit, `loss` is no hashable
        loss object, or an option is not a number.
      ValueError: a shape or a number does not fit, the reduction does not exist, or mesh and axes
        do not go together.
    """
    check_loss(loss)
    _check_hashable(loss)
    check_reduction(reduction)
    check_nll_weight(nll_weight)
    check_head_options(softcap, logit_scale, temperature, chunk_size)
    check_head(weight, bias)
    check_hidden("chosen_hidden", chosen_hidden, weight)
    check_hidden("rejected_hidden", rejected_hidden, weight)
    chosen = check_labels(
        "chosen_labels",
        chosen_labels,
        "chosen_hidden",
        chosen_hidden,
        "chosen_cu_seqlens",
        chosen_cu_seqlens,
    )
    rejected = check_labels(
        "rejected_labels",
        rejected_labels,
        "rejected_hidden",
        rejected_hidden,
        "rejected_cu_seqlens",
        rejected_cu_seqlens,
    )
    _check_pairs(chosen, rejected)
    constants = _constants(
        no_logps(weight, chosen_labels, chosen_cu_seqlens),
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
        weights,
    )
    split = make_split(mesh, batch_axis, vocab_axis, weight, chosen)
    call = PairCall(
        Objective(loss, float(nll_weight), bool(average), reduction),
        HeadOptions(softcap, logit_scale, temperature, chunk_size, split.words_axis),
        Reading(int(ignore_index), bool(shift)),
        split,
    )
    inputs = Inputs(chosen_hidden, rejected_hidden, weight, bias, constants)
    value, logps = loss_of_hidden(call, inputs, (chosen, rejected))
    logps = lax.stop_gradient(logps)
    return LinearPairLoss(value, logps[:, 0], logps[:, 1])


def no_logps(weight: Array, labels: Array, cu_seqlens: Array | None) -> Array:
    """Zeros in the place of the P log-probabilities, of which the checks want shape and dtype."""
    return jnp.zeros(Labels(labels, cu_seqlens).sequences, wide(weight))


def _check_hashable(loss: MarginLoss) -> None:
    try:
        hash(loss)
    except TypeError as error:
        raise TypeError(
            f"loss must be hashable, for it is static under jax.jit: make {type(loss).__name__} "
            "a frozen dataclass of numbers; what changes goes through beta and weights"
        ) from error


def _check_pairs(chosen: Labels, rejected: Labels) -> None:
    if (chosen.cu_seqlens is None) != (rejected.cu_seqlens is None):
        raise ValueError("chosen_cu_seqlens and rejected_cu_seqlens go together: pass both or none")
    if chosen.sequences != rejected.sequences:
        raise ValueError(
            "chosen and rejected must hold the same number of pairs, "
            f"got {chosen.sequences} and {rejected.sequences}"
        )


def _constants(
    logps: Array, reference_chosen: Any, reference_rejected: Any, beta: Any, weights: Any
) -> Constants:
    """What is given per pair as arrays, checked before any work as `pair_loss` does after it."""
    log_ratio_margin(logps, logps, reference_chosen, reference_rejected)
    references = [
        jnp.full_like(logps, float(reference)) if is_number(reference) else reference
        for reference in (reference_chosen, reference_rejected)
    ]
    beta = jnp.asarray(per_pair("beta", beta, logps), logps.dtype)
    if weights is not None:
        weights = jnp.asarray(per_pair("weights", weights, logps, positive=False), logps.dtype)
    return Constants(*references, beta, weights)
