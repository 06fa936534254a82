"""The fused pair loss behind its public signatures: the checks of a call, and its parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from spoloss._arrays import check_reduction, is_number, per_pair
from spoloss._options import check_head_options, check_nll_weight
from spoloss.jax._checks import check_head, check_labels, make_split
from spoloss.jax._fused import Inputs, PairCall, loss_of_hidden
from spoloss.jax._labels import Labels, Reading
from spoloss.jax._mesh import Axis
from spoloss.jax._objective import Constants, Objective
from spoloss.jax._softmax import HeadOptions, wide
from spoloss.losses import MarginLoss, pairwise
from spoloss.pairs import beta_for_gap, log_ratio_margin


class LinearPairLoss(NamedTuple):
    """The loss, and the policy's log-probabilities, [P] in nats, as constants for metrics."""

    loss: Array
    chosen_logps: Array
    rejected_logps: Array


def checked_pair_loss(
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
    reward_gap: Array | float | None,
    bias: Array | None,
    weights: Array | float | None,
    nll_weight: float,
    reduction: str,
    ignore_index: int,
    shift: bool,
    average: bool,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    chunk_size: int | None,
    chosen_cu_seqlens: Array | None,
    rejected_cu_seqlens: Array | None,
    mesh: Mesh | None,
    batch_axis: Axis,
    vocab_axis: Axis,
) -> LinearPairLoss:
    """`linear_pair_loss` for a loss with a known reward gap."""
    pairwise(loss)
    _check_hashable(loss)
    check_reduction(reduction)
    check_nll_weight(nll_weight)
    check_head_options(softcap, logit_scale, temperature, chunk_size)
    check_head(weight, bias)
    chosen = check_labels("chosen_", chosen_hidden, chosen_labels, chosen_cu_seqlens, weight)
    rejected = check_labels(
        "rejected_", rejected_hidden, rejected_labels, rejected_cu_seqlens, weight
    )
    _check_sides(chosen, rejected)
    constants = _constants(
        jnp.zeros(chosen.sequences, wide(weight)),
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
        reward_gap,
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


def _check_hashable(loss: MarginLoss) -> None:
    try:
        hash(loss)
    except TypeError as error:
        raise TypeError(
            "loss must be hashable, because it is static under jax.jit. Make "
            f"{type(loss).__name__} a frozen dataclass of numbers. Pass values that change from "
            "step to step as beta or weights"
        ) from error


def _check_sides(chosen: Labels, rejected: Labels) -> None:
    if (chosen.cu_seqlens is None) != (rejected.cu_seqlens is None):
        given = "chosen_" if rejected.cu_seqlens is None else "rejected_"
        raise ValueError(
            "chosen_cu_seqlens and rejected_cu_seqlens must both be given or neither, "
            f"got {given}cu_seqlens alone"
        )
    if chosen.sequences != rejected.sequences:
        names = "hidden" if chosen.cu_seqlens is None else "cu_seqlens"
        raise ValueError(
            f"chosen_{names} and rejected_{names} must have the same number of pairs, "
            f"got {chosen.sequences} and {rejected.sequences}"
        )


def _constants(
    like: Array,
    reference_chosen: Any,
    reference_rejected: Any,
    beta: Any,
    reward_gap: Any,
    weights: Any,
) -> Constants:
    """The per-pair arguments as arrays, checked before any computation.

    Args:
      like: [P], in the dtype of the policy's log-probabilities.
      reference_chosen: a number or [P].
      reference_rejected: a number or [P].
      beta: a number, 0-d or [P].
      reward_gap: a number, 0-d, [P] or None.
      weights: a number, 0-d, [P] or None.
    """
    margin = log_ratio_margin(like, like, reference_chosen, reference_rejected)
    references = [
        jnp.full_like(like, float(reference)) if is_number(reference) else reference
        for reference in (reference_chosen, reference_rejected)
    ]
    beta_for_gap(beta, reward_gap, margin)  # checks both, and the range of their ratio
    if weights is not None:
        weights = jnp.asarray(per_pair("weights", weights, margin, positive=False), margin.dtype)
    if reward_gap is not None:
        reward_gap = jnp.asarray(reward_gap, margin.dtype)
    beta = jnp.asarray(beta, margin.dtype)
    return Constants(references[0], references[1], beta, reward_gap, weights)
