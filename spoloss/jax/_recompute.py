"""Token log-probabilities with the rules of their derivatives, for any loss.

With a frozen head, the forward keeps each token's direction, which the backward scales. With a
trained head, the factor of each token in the loss is only known in the backward, so the backward
computes every tile again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from spoloss.jax._arguments import Head
from spoloss.jax._labels import Sequences
from spoloss.jax._mesh import Split, vary_alike
from spoloss.jax._residuals import Kinds, marks_of, or_empty, or_none, wanted_of
from spoloss.jax._softmax import HeadSums, Projection, Softmax, Wanted, held
from spoloss.jax._tiles import on_platform
from spoloss.jax._tokens import Table, Tile, rows_for_pairs, rows_for_tokens

Sides = tuple[Sequences, ...]
Arrays = tuple[Array, ...]
MaybeArrays = tuple[Array | None, ...]


class Found(NamedTuple):
    """What a visit of the tokens finds.

    Attributes:
      logps: for each side, the log-probability of each token, [B, T]; 0 where none counts.
      by_hidden: for each side, one row per token, [B, T, D], or None: the direction, which is the
        derivative of its log-probability with respect to its hidden state, or its gradient.
      by_head: the gradients with respect to weight and bias.
    """

    logps: Arrays
    by_hidden: MaybeArrays
    by_head: HeadSums


def token_logps(head: Head, hidden: Arrays, sides: Sides) -> Arrays:
    """For each side, the log-probability of each token, [B, T], without token weights."""
    sides = tuple(replace(side, weights=None) for side in sides)
    return _token_logps(*vary_alike((head, hidden, sides)))


@jax.custom_vjp
def _token_logps(head: Head, hidden: Arrays, sides: Sides) -> Arrays:
    return of_tokens(head, hidden, sides, (False,) * len(sides)).logps


def of_tokens(head: Head, hidden: Arrays, sides: Sides, directions: tuple[bool, ...]) -> Found:
    """Log-probabilities of tokens and, for the sides that want them, their directions."""

    def find(visit: Visit) -> Found:
        step = lambda tile, found: visit.add(tile, tile.filled, found)[1]  # noqa: E731
        return visit.table.visit_all(step, visit.start())

    return on_devices(find, Wanted(directions, weight=False, bias=False), head, hidden, sides)


def on_devices(
    find: Callable[..., Found],
    wanted: Wanted,
    head: Head,
    hidden: Arrays,
    sides: Sides,
    *others: Any,
    whole_pairs: bool = False,
) -> Found:
    """`find(visit, *others)` on each device's part.

    Args:
      find: the computation, whose results have one row for each token, [N, ...].
      wanted: which directions and which gradients of the head to compute.
      head: all of it.
      hidden: all hidden states, [B, T, D] by side.
      sides: all sequences.
      others: trees of numbers for all sequences, or of arrays with sequences as their first axis.
      whole_pairs: whether pairs that fit in a tile must not be split.
    """
    split = Split.of(head)

    def in_tiles(rows: int, head: Head, hidden: Arrays, sides: Sides, *others: Any) -> Found:
        flat = tuple(states.reshape(-1, states.shape[2]) for states in hidden)
        table = Table(sides, rows, whole_pairs=whole_pairs)
        found = find(Visit(Projection.of(head), table, flat, sides, wanted), *others)
        by_head = jax.tree.map(split.sum_batch, found.by_head)
        return Found(_in_rows(found.logps, sides), _in_rows(found.by_hidden, sides), by_head)

    def on_device(head: Head, hidden: Arrays, sides: Sides, *others: Any) -> Any:
        rows = functools.partial(rows_for_pairs if whole_pairs else rows_for_tokens, sides)
        arguments = (head, hidden, sides, *others)
        return on_platform(in_tiles, rows, len(head.weight), head.chunk_size, *arguments)

    of_batch, of_vocab = split.of_batch, split.of_vocab
    layouts = (
        replace(head, weight=of_vocab, bias=of_vocab),
        of_batch,
        tuple(side.layout(of_batch, split.whole) for side in sides),
        *jax.tree.map(lambda array: of_batch if array.ndim else split.whole, others),
    )
    run = split.run(on_device, layouts, Found(of_batch, of_batch, of_vocab))
    found: Found = run(head, hidden, sides, *others)
    return found


def _in_rows(arrays: MaybeArrays, sides: Sides) -> tuple[Any, ...]:
    """Arrays [N, ...] of sides as [B, T, ...]."""
    return tuple(
        None if array is None else array.reshape(*side.targets.shape, *array.shape[1:])
        for array, side in zip(arrays, sides, strict=True)
    )


@dataclass(frozen=True)
class Visit:
    """A visit of the tokens of one device, tile by tile.

    Attributes:
      projection: the head.
      table: the tokens.
      hidden: the hidden states by side, [N, D].
      sides: the sequences.
      wanted: which directions and which gradients of the head to compute.
    """

    projection: Projection
    table: Table
    hidden: Arrays
    sides: Sides
    wanted: Wanted

    def start(self) -> Found:
        """The results before the first tile, with directions in the dtype that keeps small ones."""
        dtype = self.projection.dtype
        return Found(
            tuple(jnp.broadcast_to(side.zero(dtype), side.targets.size) for side in self.sides),
            tuple(
                jnp.zeros_like(states, held(states)) if wanted else None
                for states, wanted in zip(self.hidden, self.wanted.hidden, strict=True)
            ),
            self.projection.zeros(self.wanted),
        )

    def add(
        self, tile: Tile, live: Array, found: Found, factor: Array | float = 1.0
    ) -> tuple[Softmax, Found]:
        """The softmax of a tile, and the results with its log-probabilities and directions.

        Args:
          tile: the tokens.
          live: [n] whether to compute a token's direction.
          found: the results so far.
          factor: of the directions, [n, 1] or a number.
        """
        states = self.table.states(self.hidden, tile)
        softmax = self.projection.softmax(states, tile.targets, live)
        logps, rows = self.table.store(found.logps, softmax.logps, tile), found.by_hidden
        if any(self.wanted.hidden):
            directions = factor * self.projection.directions(softmax)
            rows = self.table.store(rows, directions, tile)
        return softmax, Found(logps, rows, found.by_head)


def _forward(head: Any, hidden: Any, sides: Any) -> tuple[Arrays, Any]:
    wanted = Wanted.of(head, hidden)
    head, hidden, sides = custom_vjp_primal_tree_values((head, hidden, sides))  # type: ignore[no-untyped-call]
    at_once = tuple(want and not wanted.head for want in wanted.hidden)
    found = of_tokens(head, hidden, sides, at_once)
    read = (head, hidden, sides)
    if not wanted.head:
        read = jax.tree.map(lambda array: or_empty(None, array.dtype), read)
    directions = tuple(or_empty(rows, held(head.weight)) for rows in found.by_hidden)
    return found.logps, (marks_of(wanted), directions, read, Kinds.of(head, hidden))


def _backward(residual: Any, upstream: tuple[Array | SymbolicZero, ...]) -> tuple[Any, Any, None]:
    marks, directions, (head, hidden, sides), kinds = residual
    wanted, by_head = wanted_of(marks), HeadSums(None, None)
    if wanted.head:
        factors = tuple(
            jnp.zeros(up.shape, up.dtype) if isinstance(up, SymbolicZero) else up for up in upstream
        )
        _, by_hidden, by_head = _visit_again(head, hidden, sides, factors, wanted)
    else:
        kept = zip(directions, upstream, strict=True)
        by_hidden = tuple(
            None if isinstance(up, SymbolicZero) else scaled(or_none(rows), up) for rows, up in kept
        )
    return *kinds.gradients(by_head, by_hidden), None


def scaled(directions: Array | None, factor: Array) -> Array | None:
    """Directions [B, T, D] times a factor [B, T] or [B, 1]. A factor of 0 gives 0 even for nan."""
    if directions is None:
        return None
    factor = factor[..., None]
    return jnp.where(factor == 0.0, 0.0, directions.astype(factor.dtype) * factor)


def _visit_again(
    head: Head, hidden: Arrays, sides: Sides, factors: Arrays, wanted: Wanted
) -> Found:
    """The gradients with respect to hidden states and head from the upstream gradients [B, T]."""

    def find(visit: Visit, factors: Arrays) -> Found:
        of_all = jnp.concatenate([factor.reshape(-1) for factor in factors])

        def step(tile: Tile, found: Found) -> Found:
            factor = of_all.at[tile.token].get(mode="fill", fill_value=0)
            softmax, found = visit.add(tile, factor != 0.0, found, factor[:, None])
            by_head = visit.projection.add(found.by_head, softmax, factor)
            return found._replace(by_head=by_head)

        return visit.table.visit_all(step, visit.start())

    return on_devices(find, wanted, head, hidden, sides, factors)


_token_logps.defvjp(_forward, _backward, symbolic_zeros=True)
