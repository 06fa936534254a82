"""The derivative rules of the fused pair loss: gradients are made in the forward rule, once.

`jax.custom_vjp` runs the forward rule only under differentiation and says for which arguments, so
that evaluation makes no gradient and a frozen head has none.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.lax import stop_gradient
from jax.tree_util import Partial

from spoloss._arrays import reduction_scale
from spoloss.jax._labels import Labels, Reading
from spoloss.jax._mesh import Split
from spoloss.jax._objective import Constants, Objective
from spoloss.jax._one_pass import Made, one_pass
from spoloss.jax._recompute import TokenCall, scaled, token_logps
from spoloss.jax._softmax import Head, HeadOptions, Wanted
from spoloss.jax._tokens import table_of_pairs


@dataclass(frozen=True)
class PairCall:
    """What is fixed before tracing."""

    objective: Objective
    head: HeadOptions
    reading: Reading
    split: Split


class Inputs(NamedTuple):
    """What may be differentiated."""

    chosen_hidden: Array
    rejected_hidden: Array
    weight: Array
    bias: Array | None
    constants: Constants


class Output(NamedTuple):
    """The loss; and the log-probabilities [P, 2] of both sides, which have no derivative here."""

    loss: Array
    logps: Array


@functools.partial(jax.jit, static_argnums=0)
def loss_of_hidden(call: PairCall, inputs: Inputs, labels: tuple[Labels, Labels]) -> Output:
    """Hidden states of both sides, [P, T, D], to the loss."""
    if call.objective.reduction == "none":
        # A trained head's gradient mixes the pairs, so each pair's upstream gradient comes first.
        return _by_tokens(call, inputs, labels)
    return _fused(call, inputs, labels)


def _by_tokens(call: PairCall, inputs: Inputs, labels: tuple[Labels, Labels]) -> Output:
    """By the log-probabilities of tokens, whose rule is at its best for a frozen head."""
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
    return _by_tokens(call, inputs, labels)


def _forward(call: PairCall, *primals: Any) -> tuple[Output, Any]:
    """The loss, and its own backward rule."""
    chosen, rejected, weight, bias, _ = primals[0]
    wanted = Wanted(
        (chosen.perturbed, rejected.perturbed),
        weight=weight.perturbed,
        bias=bias is not None and bias.perturbed,
    )
    inputs, labels = custom_vjp_primal_tree_values(primals)  # type: ignore[no-untyped-call]
    if wanted.weight or wanted.bias:
        made, lengths = _one_pass(call, wanted, inputs, labels)
        back = Partial(  # type: ignore[no-untyped-call]
            functools.partial(_scale, call), made, lengths, inputs, labels
        )
        return _output(call.objective, made.sums, lengths, inputs.constants), back
    inputs = jax.tree.map(lambda p: p.value if p.perturbed else stop_gradient(p.value), primals[0])
    return jax.vjp(lambda inputs: _by_tokens(call, inputs, labels), inputs)


def _one_pass(
    call: PairCall, wanted: Wanted, inputs: Inputs, labels: tuple[Labels, Labels]
) -> tuple[Made, Array]:
    """The pass over the tokens, and how many of each sequence count, [P, 2]."""
    # Each device sees its own pairs, but a mean is over all of them.
    scale = reduction_scale(inputs.constants.reference_chosen, call.objective.reduction)

    def on_device(inputs: Inputs, labels: tuple[Labels, Labels]) -> tuple[Made, Array]:
        head = Head.of(inputs.weight, inputs.bias, call.head)
        table = table_of_pairs(labels, call.reading, len(head.weight), call.head.chunk_size)
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


def _scale(
    call: PairCall,
    made: Made,
    lengths: Array,
    inputs: Inputs,
    labels: tuple[Labels, Labels],
    upstream: Output,
) -> tuple[Inputs]:
    """The gradients of the pass times the loss's upstream gradient, 0-d."""
    up, constants = upstream.loss, inputs.constants
    scale = reduction_scale(constants.reference_chosen, call.objective.reduction)
    slopes = up * call.objective.token_slopes(made.sums, lengths, constants, scale)
    by_hidden = (
        scaled(directions, side.spread(slopes[:, i]))
        for i, (directions, side) in enumerate(zip(made.directions, labels, strict=True))
    )
    by_head = jax.tree.map(lambda total: up * total, made.head).like(inputs.weight, inputs.bias)
    _, back = jax.vjp(lambda c: call.objective.value(made.sums, lengths, c), constants)
    gradients: tuple[Any, ...] = (*by_hidden, *by_head, *back(up))
    return (Inputs(*gradients),)


def _backward(call: PairCall, back: Any, upstream: Output) -> tuple[Inputs, None]:  # noqa: ARG001
    upstream = jax.tree.map(
        lambda up: jnp.zeros(up.shape, up.dtype) if isinstance(up, SymbolicZero) else up,
        upstream,
        is_leaf=lambda up: isinstance(up, SymbolicZero),
    )
    (by_inputs,) = back(upstream)
    return by_inputs, None


_fused.defvjp(_forward, _backward, symbolic_zeros=True)
