"""Token log-probabilities with the rules of their derivatives, for any loss.

With a frozen head, the forward keeps each token's direction, which the backward scales. With a
trained head, the factor of each token in the loss is only known in the backward, so the backward
computes every tile again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.typing import DTypeLike

from spoloss.jax._arguments import Head
from spoloss.jax._labels import Sequences
from spoloss.jax._mesh import Split, vary_alike
from spoloss.jax._residuals import Kinds, marks_of, or_empty, or_none, or_zero, wanted_of
from spoloss.jax._softmax import HeadSums, Projection, Wanted, held
from spoloss.jax._tiles import on_platform
from spoloss.jax._tokens import Table, Tile, rows_for_tokens

Sides = tuple[Sequences, ...]
Arrays = tuple[Array, ...]


class OfTokens(NamedTuple):
    """What one visit of the tokens finds.

    Attributes:
      logps: for each side, the log-probability of each token, [B, T]; 0 where none counts.
      directions: for each side, the derivative of each token's log-probability with respect to its
        hidden state, [B, T, D]; or None.
    """

    logps: Arrays
    directions: tuple[Array | None, ...]


def token_logps(head: Head, hidden: Arrays, sides: Sides) -> Arrays:
    """For each side, the log-probability of each token, [B, T], without token weights."""
    sides = tuple(replace(side, weights=None) for side in sides)
    return _token_logps(*vary_alike((head, hidden, sides)))


@jax.custom_vjp
def _token_logps(head: Head, hidden: Arrays, sides: Sides) -> Arrays:
    return of_tokens(head, hidden, sides, directions=(False,) * len(sides)).logps


def of_tokens(
    head: Head, hidden: Arrays, sides: Sides, *, directions: tuple[bool, ...]
) -> OfTokens:
    """Log-probabilities of tokens and, for the sides that want them, their directions."""

    def visit(rows: int, head: Head, hidden: Arrays, sides: Sides) -> OfTokens:
        projection, table = Projection.of(head), Table(sides, rows, whole_pairs=False)
        flat = tuple(states.reshape(-1, states.shape[2]) for states in hidden)

        def step(tile: Tile, found: OfTokens) -> OfTokens:
            softmax = projection.softmax(table.states(flat, tile), tile.targets, tile.filled)
            logps = table.store(found.logps, softmax.logps, tile)
            if not any(directions):
                return OfTokens(logps, found.directions)
            rows = projection.directions(softmax)
            return OfTokens(logps, table.store(found.directions, rows, tile))

        nothing = OfTokens(
            tuple(
                jnp.broadcast_to(side.zero(projection.dtype), side.targets.size) for side in sides
            ),
            tuple(
                jnp.zeros_like(states, held(states)) if wanted else None
                for states, wanted in zip(flat, directions, strict=True)
            ),
        )
        return table.visit_all(step, nothing)

    def on_device(head: Head, hidden: Arrays, sides: Sides) -> OfTokens:
        found = _on_platform(visit, head, hidden, sides)
        return OfTokens(in_rows(found.logps, sides), in_rows(found.directions, sides))

    split = Split.of(head)
    layouts = layout(split, head, sides)
    found: OfTokens = split.run(on_device, layouts, split.of_batch)(head, hidden, sides)
    return found


def layout(split: Split, head: Head, sides: Sides) -> tuple[Any, Any, Any]:
    """The layouts of head, hidden states and sides on the mesh."""
    of_batch, of_vocab = split.of_batch, split.of_vocab
    of_sides = tuple(side.layout(of_batch, split.whole) for side in sides)
    return replace(head, weight=of_vocab, bias=of_vocab), of_batch, of_sides


def _on_platform(
    visit: Callable[..., Any], head: Head, hidden: Arrays, sides: Sides, *others: Any
) -> Any:
    rows = functools.partial(rows_for_tokens, sides)
    vocabulary = len(head.weight)
    return on_platform(visit, rows, vocabulary, head.chunk_size, head, hidden, sides, *others)


def in_rows(arrays: tuple[Any, ...], sides: Sides) -> tuple[Any, ...]:
    """Arrays [N, ...] of sides as [B, T, ...]."""
    return tuple(
        None if array is None else array.reshape(*side.targets.shape, *array.shape[1:])
        for array, side in zip(arrays, sides, strict=True)
    )


def _forward(head: Any, hidden: Any, sides: Any) -> tuple[Arrays, Any]:
    wanted = Wanted.of(head, hidden)
    head, hidden, sides = custom_vjp_primal_tree_values((head, hidden, sides))  # type: ignore[no-untyped-call]
    kinds = Kinds.of((head.weight, head.bias, *hidden))
    at_once = tuple(want and not wanted.head for want in wanted.hidden)
    found = of_tokens(head, hidden, sides, directions=at_once)
    read = (head, hidden, sides)
    if not wanted.head:
        read = jax.tree.map(lambda array: or_empty(None, array.dtype), read)
    kept = tuple(or_empty(rows, held(head.weight)) for rows in found.directions)
    return found.logps, (marks_of(wanted), kept, read, kinds)


def _backward(residual: Any, upstream: tuple[Array | SymbolicZero, ...]) -> tuple[Any, Any, None]:
    marks, directions, (head, hidden, sides), kinds = residual
    wanted, by_head = wanted_of(marks), HeadSums(None, None)
    by_hidden: tuple[Array | None, ...] = (None,) * len(hidden)
    if wanted.head:
        factors = tuple(
            jnp.zeros(side.targets.shape, up.dtype) if isinstance(up, SymbolicZero) else up
            for up, side in zip(upstream, sides, strict=True)
        )
        by_hidden, by_head = _visit_again(head, hidden, sides, factors, wanted)
    else:
        by_hidden = tuple(
            None if isinstance(up, SymbolicZero) else scaled(or_none(rows), up, kinds.dtype)
            for rows, up in zip(directions, upstream, strict=True)
        )
    weight, bias, *rows = map(or_zero, (*by_head, *by_hidden), kinds.each)
    return replace(head, weight=weight, bias=bias), tuple(rows), None


def scaled(directions: Array | None, factor: Array, dtype: DTypeLike) -> Array | None:
    """Directions [B, T, D] times a factor [B, T] or [B, 1]. A factor of 0 gives 0 even for nan."""
    if directions is None:
        return None
    factor = factor[..., None]
    product = directions.astype(factor.dtype) * factor
    return jnp.where(factor == 0.0, 0.0, product).astype(dtype)


def _visit_again(
    head: Head, hidden: Arrays, sides: Sides, factors: Arrays, wanted: Wanted
) -> tuple[tuple[Array | None, ...], HeadSums]:
    """The gradients with respect to hidden states and head from the upstream gradients [B, T]."""
    Carry = tuple[tuple[Array | None, ...], HeadSums]

    def visit(rows: int, head: Head, hidden: Arrays, sides: Sides, factors: Arrays) -> Carry:
        projection, table = Projection.of(head), Table(sides, rows, whole_pairs=False)
        flat = tuple(states.reshape(-1, states.shape[2]) for states in hidden)
        of_all = jnp.concatenate([factor.reshape(-1) for factor in factors])

        def step(tile: Tile, carry: Carry) -> Carry:
            by_hidden, by_head = carry
            factor = of_all.at[tile.token].get(mode="fill", fill_value=0)
            states = table.states(flat, tile)
            softmax = projection.softmax(states, tile.targets, factor != 0.0)
            if any(wanted.hidden):
                rows = factor[:, None] * projection.directions(softmax)
                by_hidden = table.store(by_hidden, rows, tile)
            return by_hidden, projection.add(by_head, softmax, states, factor)

        zeros = tuple(
            jnp.zeros_like(states) if want else None
            for states, want in zip(flat, wanted.hidden, strict=True)
        )
        return table.visit_all(step, (zeros, projection.zeros(wanted)))

    split = Split.of(head)

    def on_device(head: Head, hidden: Arrays, sides: Sides, factors: Arrays) -> Carry:
        by_hidden, by_head = _on_platform(visit, head, hidden, sides, factors)
        of_head = split.sum_batch(by_head).like(head.weight.dtype)
        return in_rows(by_hidden, sides), of_head

    layouts = (*layout(split, head, sides), split.of_batch)
    run = split.run(on_device, layouts, (split.of_batch, split.of_vocab))
    found: Carry = run(head, hidden, sides, factors)
    return found


_token_logps.defvjp(_forward, _backward, symbolic_zeros=True)
