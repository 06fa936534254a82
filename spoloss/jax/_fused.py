"""The derivative rules of the fused pair loss. The forward rule computes the gradients, once.

`jax.custom_vjp` runs the forward rule only under differentiation, and passes which arguments are
differentiated. So an evaluation computes no gradient, and neither does a frozen head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from spoloss._arrays import reduction_scale
from spoloss.jax._labels import Labels, Reading
from spoloss.jax._mesh import Split
from spoloss.jax._objective import Constants, Objective
from spoloss.jax._one_pass import Made, one_pass
from spoloss.jax._recompute import TokenCall, scaled, token_logps
from spoloss.jax._residuals import or_empty, or_none, or_zero
from spoloss.jax._softmax import Head, HeadOptions, HeadSums, Wanted
from spoloss.jax._tokens import table_of_pairs, table_of_tokens


@dataclass(frozen=True)
class PairCall:
    """The static part of a call, known before tracing."""

    objective: Objective
    head: HeadOptions
    reading: Reading
    split: Split


class Inputs(NamedTuple):
    """The differentiable arguments."""

    chosen_hidden: Array
    rejected_hidden: Array
    weight: Array
    bias: Array | None
    constants: Constants


class Output(NamedTuple):
    """The loss, and the log-probabilities [P, 2] of both sides, without derivatives."""

    loss: Array
    logps: Array


@functools.partial(jax.jit, static_argnums=0)
def loss_of_hidden(call: PairCall, inputs: Inputs, labels: tuple[Labels, Labels]) -> Output:
    """The loss from the hidden states of both sides, [P, T, D]."""
    if call.objective.reduction == "none":
        # A trained head's gradient sums over pairs, so it needs all upstream gradients first.
        return _by_tokens(call, inputs, labels)
    return _fused(call, inputs, labels)


def _by_tokens(call: PairCall, inputs: Inputs, labels: tuple[Labels, Labels]) -> Output:
    """The same from token log-probabilities, which accept one upstream gradient per pair."""
    token_call = TokenCall(call.head, call.reading, call.split)
    sums, lengths = [], []
    for hidden, side in zip(inputs[:2], labels, strict=True):
        logps = token_logps(token_call, hidden, inputs.weight, inputs.bias, side)
        sums.append(side.sum(logps))
        lengths.append(side.sum(side.targets(call.reading)[1]).astype(logps.dtype))
    return _output(
        call.objective, jnp.stack(sums, axis=1), jnp.stack(lengths, axis=1), inputs.constants
    )


def _output(objective: Objective, sums: Array, lengths: Array, constants: Constants) -> Output:
    return Output(objective.value(sums, lengths, constants), objective.logps(sums, lengths))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(call: PairCall, inputs: Inputs, labels: tuple[Labels, Labels]) -> Output:
    nothing = Wanted((False, False), weight=False, bias=False)
    made, lengths = _one_pass(call, nothing, inputs, labels)
    return _output(call.objective, made.sums, lengths, inputs.constants)


def _forward(call: PairCall, *primals: Any) -> tuple[Output, Any]:
    chosen, rejected, weight, bias, _ = primals[0]
    wanted = Wanted(
        (chosen.perturbed, rejected.perturbed),
        weight=weight.perturbed,
        bias=bias is not None and bias.perturbed,
    )
    inputs, labels = custom_vjp_primal_tree_values(primals)  # type: ignore[no-untyped-call]
    made, lengths = _one_pass(call, wanted, inputs, labels)
    kept = Made(
        made.sums,
        tuple(or_empty(rows, inputs.weight.dtype) for rows in made.directions),
        HeadSums(*(or_empty(total, made.sums.dtype) for total in made.head)),
    )
    output = _output(call.objective, made.sums, lengths, inputs.constants)
    return output, (kept, lengths, inputs, labels)


def _backward(call: PairCall, residual: Any, upstream: Output) -> tuple[Inputs, None]:
    """The gradients of the pass times the upstream gradient of the loss, 0-d."""
    (sums, directions, by_head), lengths, inputs, labels = residual
    up, constants, objective = upstream.loss, inputs.constants, call.objective
    if isinstance(up, SymbolicZero):
        return jax.tree.map(functools.partial(or_zero, None), inputs), None
    scale = reduction_scale(constants.reference_chosen, objective.reduction)
    slopes = up * objective.token_slopes(sums, lengths, constants, scale)
    by_hidden = (
        scaled(or_none(rows), side.spread(slopes[:, i]))
        for i, (rows, side) in enumerate(zip(directions, labels, strict=True))
    )
    totals = (or_none(total) for total in by_head)
    scaled_head = HeadSums(*(None if total is None else up * total for total in totals))
    _, back = jax.vjp(lambda constants: objective.value(sums, lengths, constants), constants)
    gradients = map(
        or_zero, (*by_hidden, *scaled_head.like(inputs.weight, inputs.bias)), inputs[:4]
    )
    return Inputs(*gradients, *back(up)), None


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


def _one_pass(
    call: PairCall, wanted: Wanted, inputs: Inputs, labels: tuple[Labels, Labels]
) -> tuple[Made, Array]:
    """The pass over the tokens, and the number of tokens that count in each sequence, [P, 2]."""
    # Each device has its own pairs, but the mean is over all pairs.
    scale = reduction_scale(inputs.constants.reference_chosen, call.objective.reduction)

    def on_device(inputs: Inputs, labels: tuple[Labels, Labels]) -> tuple[Made, Array]:
        head = Head.of(inputs.weight, inputs.bias, call.head)
        table_of = table_of_pairs if wanted.head else table_of_tokens
        table = table_of(labels, call.reading, len(head.weight), call.head.chunk_size)
        hidden = tuple(states.reshape(-1, states.shape[2]) for states in inputs[:2])
        zero = labels[0].zero(head.dtype) + labels[1].zero(head.dtype)
        made = one_pass(head, table, hidden, call.objective, inputs.constants, scale, wanted, zero)
        directions = tuple(
            None if rows is None else rows.reshape(states.shape)
            for rows, states in zip(made.directions, inputs[:2], strict=True)
        )
        by_head = call.split.sum_pairs(made.head)
        return Made(made.sums, directions, by_head), table.lengths.astype(head.dtype)

    pairs, words = call.split.of_pairs, call.split.of_words
    constants = jax.tree.map(
        lambda array: pairs if array.ndim else call.split.whole, inputs.constants
    )
    side = Labels(pairs, call.split.whole)
    run = call.split.run(
        on_device,
        (Inputs(pairs, pairs, words, words, constants), (side, side)),
        (Made(pairs, pairs, words), pairs),
    )
    made, lengths = run(inputs, labels)
    return made, lengths
