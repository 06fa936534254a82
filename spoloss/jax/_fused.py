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
from spoloss.jax._labels import Sequences
from spoloss.jax._mesh import Split, vary_alike
from spoloss.jax._one_pass import Made, lengths_of, one_pass, sums_of
from spoloss.jax._recompute import in_rows, layout, of_tokens, scaled, token_logps
from spoloss.jax._residuals import Kinds, or_empty, or_none, or_zero
from spoloss.jax._softmax import HeadSums, Projection, Wanted, held
from spoloss.jax._tiles import on_platform
from spoloss.jax._tokens import rows_for_pairs

Sides = tuple[Sequences, ...]
Arrays = tuple[Array, ...]
MaybeArrays = tuple[Array | None, ...]


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
    found = of_tokens(head, hidden, sides, directions=(False, False))
    return _value(objective, found.logps, sides, constants)


def _forward(objective: Objective, *primals: Any) -> tuple[_Output, Any]:
    wanted = Wanted.of(*primals[:2])
    values = custom_vjp_primal_tree_values(primals)  # type: ignore[no-untyped-call]
    head, hidden, sides, weights, constants = values
    if wanted.head:
        made = _one_pass(objective, head, hidden, sides, constants, wanted)
    else:
        found = of_tokens(head, hidden, sides, directions=wanted.hidden)
        made = Made(*found, HeadSums(None, None))
    output = _value(objective, made.logps, sides, constants)
    kept = Made(
        made.logps,
        tuple(or_empty(rows, held(head.weight)) for rows in made.directions),
        HeadSums(*(or_empty(total, made.logps[0].dtype) for total in made.head)),
    )
    empty = jax.tree.map(lambda array: or_empty(None, array.dtype), head)
    kinds = Kinds.of((head.weight, head.bias, *hidden))
    return output, (kept, sides, weights, constants, empty, kinds)


def _backward(objective: Objective, residual: Any, upstream: _Output) -> tuple[Any, ...]:
    """What the forward kept, times the upstream gradient of the loss, 0-d."""
    (tokens, directions, by_head), sides, weights, constants, head, kinds = residual
    up = upstream.loss
    if isinstance(up, SymbolicZero):
        return (None,) * 5
    sums = sums_of(tokens, sides)
    slopes = objective.slopes(sums, lengths_of(sides, sums[0].dtype), constants)
    scale = reduction_scale(sums[0], objective.reduction) * up.astype(sums[0].dtype)
    by_hidden = [
        scaled(or_none(rows), side.weighted(side.spread(scale * slope)), kinds.dtype)
        for slope, rows, side in zip(slopes, directions, sides, strict=True)
    ]
    totals = HeadSums(*map(or_none, by_head))
    by_head = jax.tree.map(lambda total: up.astype(total.dtype) * total, totals)

    def value(weights: MaybeArrays, constants: Constants) -> Array:
        weighted = zip(sides, weights, strict=True)
        again = tuple(replace(side, weights=of_side) for side, of_side in weighted)
        return _value(objective, tokens, again, constants).loss

    _, back = jax.vjp(value, weights, constants)
    weight, bias, *rows = map(or_zero, (*by_head.like(kinds.dtype), *by_hidden), kinds.each)
    of_head = replace(head, weight=weight, bias=bias)
    return of_head, tuple(rows), None, *back(up)


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


def _one_pass(
    objective: Objective,
    head: Head,
    hidden: Arrays,
    sides: Sides,
    constants: Constants,
    wanted: Wanted,
) -> Made:
    """The pass of a trained head over the tokens, on all devices."""
    # Each device has its own pairs, but the mean is over all pairs.
    scale = reduction_scale(constants.reference_chosen, objective.reduction)
    split = Split.of(head)

    def visit(rows: int, head: Head, hidden: Arrays, sides: Sides, constants: Constants) -> Made:
        flat = tuple(states.reshape(-1, states.shape[2]) for states in hidden)
        projection = Projection.of(head)
        made = one_pass(projection, flat, sides, rows, objective, constants, scale, wanted)
        return Made(in_rows(made.logps, sides), in_rows(made.directions, sides), made.head)

    def on_device(head: Head, hidden: Arrays, sides: Sides, constants: Constants) -> Made:
        rows = functools.partial(rows_for_pairs, sides)
        arguments = (head, hidden, sides, constants)
        made: Made = on_platform(visit, rows, len(head.weight), head.chunk_size, *arguments)
        return made._replace(head=split.sum_batch(made.head))

    of_constants = jax.tree.map(lambda a: split.of_batch if a.ndim else split.whole, constants)
    layouts = (*layout(split, head, sides), of_constants)
    run = split.run(on_device, layouts, Made(split.of_batch, split.of_batch, split.of_vocab))
    made: Made = run(head, hidden, sides, constants)
    return made
