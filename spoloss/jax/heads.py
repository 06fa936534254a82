"""Losses from hidden states, without ever holding the logits.

`Head` says how hidden states become logits, and `Completions` says which tokens count. Every option
is documented there, once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from spoloss._arrays import check_reduction, is_number
from spoloss._checks import check_pairs
from spoloss._linear_losses import LinearLosses
from spoloss._objective import Constants, Objective
from spoloss._options import check_flag, check_nll_weight
from spoloss.jax._arguments import Completions, Head
from spoloss.jax._checks import prepare
from spoloss.jax._fused import LinearPairLoss, fused_loss
from spoloss.jax._labels import sequences_of
from spoloss.jax._softmax import wide
from spoloss.losses import MarginLoss, PairLoss, pairwise


def linear_pair_loss(
    loss: MarginLoss | PairLoss,
    head: Head,
    chosen: Completions,
    rejected: Completions,
    reference_chosen_logps: Array | float,
    reference_rejected_logps: Array | float,
    *,
    beta: Array | float,
    reward_gap: Array | float | None = None,
    weights: Array | float | None = None,
    nll_weight: float = 0.0,
    average: bool = False,
    reduction: str = "mean",
) -> LinearPairLoss:
    """Any loss of the two log-ratios from hidden states, without the logits.

        loss = (l(u_w, u_l) + nll_weight * NLL) * weight,
        u    = log pi(y|x) / pi_ref(y|x) of each side,    NLL = -log pi(y_w|x) per token

    The result equals `pair_loss` of `linear_logps`. With N the tokens that count, a call takes
    4NDV FLOPs if the head is not differentiated, for any loss: the forward keeps each token's
    direction, an array like the hidden states, and the backward scales it. With a head that is
    differentiated it takes 6NDV, and 8NDV for `reduction="none"`. Without differentiation it takes
    2NDV. A pair that is longer than a tile needs two float32 arrays of the weight's size beside its
    gradient.

    Under `jax.jit`, `loss`, `nll_weight`, `average` and `reduction` are static.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()`, or your own `MarginLoss` or `PairLoss`. It must be
        hashable, like a frozen dataclass. Pass values that change from step to step as `beta` or
        `weights`.
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
      LinearPairLoss(loss, chosen_logps, rejected_logps). The loss is differentiable once in reverse
      mode with respect to hidden states, weight and bias, and with respect to `beta`,
      `reward_gap`, `weights`, references and `token_weights`. The log-probabilities, [P] in nats,
      are constants.

    Raises:
      TypeError: a dtype does not fit, an option has another type, an argument is not a JAX array,
        or `loss` is not a hashable loss object.
      ValueError: a shape or a number does not fit, or the mesh, its axes and the arrays do not fit
        together.
    """
    pairwise(loss)
    _check_hashable(loss)
    check_reduction(reduction)
    check_nll_weight(nll_weight)
    check_flag("average", average)
    prepare(head, {"chosen": chosen, "rejected": rejected})
    check_pairs(_count(chosen), _count(rejected))
    references = reference_chosen_logps, reference_rejected_logps
    constants = Constants(*references, beta, reward_gap, weights)
    like = constants.check(jnp.zeros(_count(chosen), wide(chosen.hidden)))
    objective = Objective(loss, float(nll_weight), reduction, bool(average))
    constants = _as_arrays(constants, like)
    found: LinearPairLoss = _pair_loss(objective, head, chosen, rejected, constants)
    return found


_losses: LinearLosses[Head, Completions, Array, LinearPairLoss] = LinearLosses(linear_pair_loss)
linear_spo_loss = _losses.linear_spo_loss
linear_dpo_loss = _losses.linear_dpo_loss
linear_squared_loss = _losses.linear_squared_loss
linear_ipo_loss = _losses.linear_ipo_loss


@functools.partial(jax.jit, static_argnums=0)
def _pair_loss(
    objective: Objective,
    head: Head,
    chosen: Completions,
    rejected: Completions,
    constants: Constants,
) -> LinearPairLoss:
    sides = (sequences_of(chosen), sequences_of(rejected))
    return fused_loss(objective, head, (chosen.hidden, rejected.hidden), sides, constants)


def _check_hashable(loss: MarginLoss | PairLoss) -> None:
    try:
        hash(loss)
    except TypeError as error:
        raise TypeError(
            "loss must be hashable, because it is static under jax.jit. Make "
            f"{type(loss).__name__} a frozen dataclass of numbers. Pass values that change from "
            "step to step as beta or weights"
        ) from error


def _count(side: Completions) -> int:
    """The number of completions."""
    return len(side.labels) if side.cu_seqlens is None else len(side.cu_seqlens) - 1


def _as_arrays(constants: Constants, like: Array) -> Constants:
    """The numbers of each pair as arrays, for `jax.jit`: references as [P], others as they are."""
    *references, beta, reward_gap, weights = constants
    return Constants(
        *(jnp.full_like(like, float(r)) if is_number(r) else r for r in references),
        *(None if n is None else jnp.asarray(n, like.dtype) for n in (beta, reward_gap, weights)),
    )
