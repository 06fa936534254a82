"""The loss from hidden states, with the rules of its derivatives: in one pass if possible.

With a frozen head, the forward keeps each token's direction, for any loss. With a trained head, one
pass computes the gradients in the forward, so it needs the factor of each pair in the loss. With
`reduction="none"` these factors are only known in the backward, which computes the logits again.

`jax.custom_vjp` runs the forward rule only under differentiation, and passes with respect to what.
So an evaluation computes no gradient, and neither does a frozen head.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from spoloss._arrays import reduction_scale
from spoloss._objective import Constants, Objective
from spoloss.jax._arguments import Head
from spoloss.jax._mesh import vary_alike
from spoloss.jax._one_pass import OnePass, lengths_of, sums_of
from spoloss.jax._recompute import (
    Arrays,
    Found,
    MaybeArrays,
    Sides,
    of_tokens,
    on_devices,
    scaled,
    token_logps,
)
from spoloss.jax._residuals import Kinds, or_empty, or_none
from spoloss.jax._softmax import HeadSums, Wanted, held


class LinearPairLoss(NamedTuple):
    """The loss, and the policy's log-probabilities for metrics.

    Attributes:
      loss: 0-d, or [P] with `reduction="none"`.
      chosen_logps: log pi(y_w|x), [P], nats, constant under differentiation.
      rejected_logps: log pi(y_l|x), [P], nats, constant under differentiation.
    """

    loss: Array
    chosen_logps: Array
    rejected_logps: Array


def fused_loss(
    objective: Objective, head: Head, hidden: Arrays, sides: Sides, constants: Constants
) -> LinearPairLoss:
    """The loss of a batch of pairs from the hidden states of both sides, [B, T, D]."""
    head, hidden, sides, constants = vary_alike((head, hidden, sides, constants))
    if objective.reduction == "none":
        # A trained head's gradient sums over pairs, so it needs all upstream gradients first.
        tokens = token_logps(head, hidden, sides)
        loss, logps = _value(objective, tokens, sides, constants)
    else:
        weights = tuple(side.weights for side in sides)
        loss, logps = _fused(objective, head, hidden, sides, weights, constants)
    return LinearPairLoss(loss, *lax.stop_gradient(logps))


class _Output(NamedTuple):
    """The loss, and the log-probabilities [P] of both sides."""

    loss: Array
    logps: Arrays


def _value(objective: Objective, tokens: Arrays, sides: Sides, constants: Constants) -> _Output:
    """The loss from the log-probabilities of tokens, [B, T] by side."""
    sums = sums_of(tokens, sides)
    lengths = lengths_of(sides, sums[0].dtype)
    return _Output(objective.value(sums, lengths, constants), objective.logps(sums, lengths))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    objective: Objective,
    head: Head,
    hidden: Arrays,
    sides: Sides,
    weights: MaybeArrays,
    constants: Constants,
) -> _Output:
    """The loss. `weights` are the sides' token weights, all of a side that has a derivative."""
    del weights
    tokens = of_tokens(head, hidden, sides, (False, False)).logps
    return _value(objective, tokens, sides, constants)


def _forward(objective: Objective, *primals: Any) -> tuple[_Output, Any]:
    wanted = Wanted.of(*primals[:2])
    values = custom_vjp_primal_tree_values(primals)  # type: ignore[no-untyped-call]
    head, hidden, sides, weights, constants = values
    if wanted.head:
        # Each device has its own pairs, but the mean is over all pairs.
        scale = reduction_scale(constants.reference_chosen, objective.reduction)
        find = lambda visit, constants: OnePass(visit, objective, constants, scale).run()  # noqa: E731
        found = on_devices(find, wanted, head, hidden, sides, constants, whole_pairs=True)
    else:
        found = of_tokens(head, hidden, sides, wanted.hidden)
    kept = Found(
        found.logps,
        tuple(or_empty(rows, held(head.weight)) for rows in found.by_hidden),
        HeadSums(*(or_empty(total, found.logps[0].dtype) for total in found.by_head)),
    )
    output = _value(objective, found.logps, sides, constants)
    return output, (kept, sides, weights, constants, Kinds.of(head, hidden))


def _backward(objective: Objective, residual: Any, upstream: _Output) -> tuple[Any, ...]:
    """What the forward kept, times the upstream gradient of the loss, 0-d."""
    (tokens, directions, by_head), sides, weights, constants, kinds = residual
    up = upstream.loss
    if isinstance(up, SymbolicZero):
        return (None,) * 5
    sums = sums_of(tokens, sides)
    slopes = objective.slopes(sums, lengths_of(sides, sums[0].dtype), constants)
    scale = reduction_scale(sums[0], objective.reduction) * up.astype(sums[0].dtype)
    by_hidden = tuple(
        scaled(or_none(rows), side.weighted(side.spread(scale * slope)))
        for slope, rows, side in zip(slopes, directions, sides, strict=True)
    )
    totals = HeadSums(*map(or_none, by_head))
    by_head = jax.tree.map(lambda total: up.astype(total.dtype) * total, totals)

    def value(weights: MaybeArrays, constants: Constants) -> Array:
        weighted = zip(sides, weights, strict=True)
        again = tuple(replace(side, weights=of_side) for side, of_side in weighted)
        return _value(objective, tokens, again, constants).loss

    _, back = jax.vjp(value, weights, constants)
    return *kinds.gradients(by_head, by_hidden), None, *back(up)


_fused.defvjp(_forward, _backward, symbolic_zeros=True)
