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
from spoloss.jax._mesh import Split, vary_alike
from spoloss.jax._objective import Constants, Objective
from spoloss.jax._one_pass import one_pass
from spoloss.jax._plan import on_platform
from spoloss.jax._recompute import TokenCall, scaled, token_logps
from spoloss.jax._residuals import Kinds, or_empty, or_none, or_zero
from spoloss.jax._softmax import Head, HeadOptions, HeadSums, Wanted
from spoloss.jax._tokens import Table, rows_for_pairs, rows_for_tokens


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
    inputs, labels = vary_alike((inputs, labels))
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
    found = _one_pass(call, nothing, inputs, labels)
    return _output(call.objective, found.sums, found.lengths, inputs.constants)


def _forward(call: PairCall, *primals: Any) -> tuple[Output, Any]:
    chosen, rejected, weight, bias, _ = primals[0]
    wanted = Wanted(
        (chosen.perturbed, rejected.perturbed),
        weight=weight.perturbed,
        bias=bias is not None and bias.perturbed,
    )
    inputs, labels = custom_vjp_primal_tree_values(primals)  # type: ignore[no-untyped-call]
    found = _one_pass(call, wanted, inputs, labels)
    sums, lengths = found.sums, found.lengths
    kept = Found(
        sums,
        lengths,
        tuple(or_empty(rows, inputs.weight.dtype) for rows in found.directions),
        HeadSums(*(or_empty(total, sums.dtype) for total in found.head)),
    )
    output = _output(call.objective, sums, lengths, inputs.constants)
    return output, (kept, inputs.constants, labels, Kinds.of(inputs[:4]))


def _backward(call: PairCall, residual: Any, upstream: Output) -> tuple[Inputs, None]:
    """The gradients of the pass times the upstream gradient of the loss, 0-d."""
    (sums, lengths, directions, by_head), constants, labels, kinds = residual
    up, objective = upstream.loss, call.objective
    if isinstance(up, SymbolicZero):
        of_constants = jax.tree.map(lambda array: SymbolicZero(jax.typeof(array)), constants)
        zeros = [*(or_zero(None, kind) for kind in kinds.each), of_constants]
        return Inputs(*zeros), None
    scale = reduction_scale(constants.reference_chosen, objective.reduction)
    factor = up.astype(sums.dtype)
    slopes = factor * objective.token_slopes(sums, lengths, constants, scale)
    by_hidden = (
        scaled(or_none(rows), side.spread(slopes[:, i]))
        for i, (rows, side) in enumerate(zip(directions, labels, strict=True))
    )
    totals = (or_none(total) for total in by_head)
    scaled_head = HeadSums(*(None if total is None else factor * total for total in totals))
    _, back = jax.vjp(lambda constants: objective.value(sums, lengths, constants), constants)
    gradients = map(or_zero, (*by_hidden, *scaled_head.like(*kinds.each[2:])), kinds.each)
    return Inputs(*gradients, *back(up)), None


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


class Found(NamedTuple):
    """What the pass over the tokens finds.

    Attributes:
      sums: [P, 2] log-probabilities of both sides, summed over tokens.
      lengths: [P, 2] the number of tokens that count.
      directions: as in `Made`, [P, T, D] or None.
      head: the gradients by weight and bias.
    """

    sums: Array
    lengths: Array
    directions: tuple[Any, ...]
    head: HeadSums


def _one_pass(
    call: PairCall, wanted: Wanted, inputs: Inputs, labels: tuple[Labels, Labels]
) -> Found:
    """The pass over the tokens."""
    # Each device has its own pairs, but the mean is over all pairs.
    scale = reduction_scale(inputs.constants.reference_chosen, call.objective.reduction)
    rows_for = rows_for_pairs if wanted.head else rows_for_tokens

    def with_tiles(rows: int, inputs: Inputs, labels: tuple[Labels, Labels]) -> Found:
        head = Head.of(inputs.weight, inputs.bias, call.head)
        table = Table(labels, call.reading, rows, whole_pairs=wanted.head)
        hidden = tuple(states.reshape(-1, states.shape[2]) for states in inputs[:2])
        zero = labels[0].zero(head.dtype) + labels[1].zero(head.dtype)
        made = one_pass(head, table, hidden, call.objective, inputs.constants, scale, wanted, zero)
        directions = tuple(
            None if rows is None else rows.reshape(states.shape)
            for rows, states in zip(made.directions, inputs[:2], strict=True)
        )
        sums, lengths = table.sum(made.logps) + zero, table.lengths.astype(head.dtype)
        return Found(sums, lengths, directions, made.head)

    def on_device(inputs: Inputs, labels: tuple[Labels, Labels]) -> Found:
        rows = functools.partial(rows_for, labels, call.reading)
        words = len(inputs.weight)
        found: Found = on_platform(with_tiles, rows, words, call.head.chunk_size, inputs, labels)
        return found._replace(head=call.split.sum_pairs(found.head))

    pairs, words = call.split.of_pairs, call.split.of_words
    constants = jax.tree.map(
        lambda array: pairs if array.ndim else call.split.whole, inputs.constants
    )
    side = Labels(pairs, call.split.whole)
    run = call.split.run(
        on_device,
        (Inputs(pairs, pairs, words, words, constants), (side, side)),
        Found(pairs, pairs, pairs, words),
    )
    found: Found = run(inputs, labels)
    return found
