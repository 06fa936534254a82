"""A batch of pairs as one table of the tokens that count, pair by pair.

    chosen side    a a a . .   b b b b .   c . . . .      . a label that is ignored
    rejected side  A A . . .   B B B B B   C C . . .
    table          a a a A A b b b b B B B B B c C C
    tiles of 8     |- a A -|     |-- b B --|-- longer than a tile: processed after all others

Shapes are static and numbers are traced. An ignored label takes no place in the table, and the
loops over the table end with its last token.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array, lax

from spoloss.jax._labels import Sequences, sum_by
from spoloss.jax._mesh import vary_like
from spoloss.jax._tiles import tile_rows

CarryT = TypeVar("CarryT")
MaybeT = TypeVar("MaybeT", Array, Array | None)


class Tile(NamedTuple):
    """The next n tokens of a table. The last places may be empty.

    Attributes:
      filled: [n] whether there is a token at this place.
      token: [n] the index of the token among all tokens, or their number if the place is empty.
      targets: [n] the token's label.
      segment: [n] the token's pair and side as 2 * pair + side, or -1 if the place is empty.
      weights: [n] the factor of the token's log-probability; None for 1.
    """

    filled: Array
    token: Array
    targets: Array
    segment: Array
    weights: Array | None

    def weighted(self, values: Array) -> Array:
        """Values of the tokens, [n], times the tokens' weights."""
        return values if self.weights is None else values * self.weights.astype(values.dtype)

    def of_segment(self, values: Array) -> Array:
        """Values of pairs and sides [P, 2], repeated for their tokens [n]; 0 in empty places."""
        of_tokens = values.reshape(-1)[self.segment]
        return jnp.where(self.filled, of_tokens, jnp.zeros_like(of_tokens))


Step = Callable[[Tile, CarryT], CarryT]


class Table:
    """The tokens that count, pair by pair: chosen, then rejected.

    Pairs that fit in a tile come before longer pairs.
    """

    def __init__(self, sides: tuple[Sequences, ...], rows: int, *, whole_pairs: bool) -> None:
        """Sort the tokens of both sides, or of one side alone, for tiles of so many `rows`.

        With `whole_pairs`, no tile splits a pair that fits in it.
        """
        self.rows, self.pairs, self.sides = rows, sides[0].count, len(sides)
        self.may_be_long = whole_pairs and sum(side.longest for side in sides) > rows
        tokens = jnp.stack([side.tokens() for side in sides], axis=1)
        is_long = tokens.sum(axis=1) > rows
        self.short_pairs = jnp.sum(~is_long, dtype=jnp.int32)
        self.order = jnp.argsort(is_long, stable=True)
        self.ends = jnp.pad(jnp.cumsum(tokens[self.order].reshape(-1)), (1, 0))
        self.ends = self.ends.astype(jnp.int32)

        rank = jnp.argsort(self.order)
        segments, places = [], []
        for i, side in enumerate(sides):
            sequence = side.sequence_of_token()
            segments.append(sequence * self.sides + i)
            of_token = rank[sequence] * self.sides + i
            places.append(jnp.where(side.counts.reshape(-1), of_token, self.pairs * self.sides))
        self._segment = jnp.concatenate(segments)
        self._targets = jnp.concatenate([side.targets.reshape(-1) for side in sides])
        self._weights = _weights_of(sides)
        # Padding by one tile, so that a tile that extends beyond the end is still a slice.
        index = jnp.argsort(jnp.concatenate(places), stable=True)
        self._index = jnp.pad(index, (0, rows)).astype(jnp.int32)
        self._first = list(itertools.accumulate((side.targets.size for side in sides), initial=0))

    def visit(self, start: Array, stop: Array, step: Step[CarryT], carry: CarryT) -> CarryT:
        """Run carry = step(tile, carry) for the tiles of the places from `start` up to `stop`."""
        return self._loop(
            start,
            stop,
            lambda place, carry: (place + self.rows, step(self._tile(place, stop), carry)),
            carry,
        )

    def visit_all(self, step: Step[CarryT], carry: CarryT) -> CarryT:
        """The same for all places. Tiles may split pairs."""
        return self.visit(self.ends[0], self.ends[-1], step, carry)

    def visit_groups(self, step: Step[CarryT], carry: CarryT) -> CarryT:
        """The same with tiles of whole pairs, for the pairs that fit in a tile."""
        ends = self.ends[:: self.sides]

        def group(first: Array, carry: CarryT) -> tuple[Array, CarryT]:
            fitting = jnp.sum(ends <= ends[first] + self.rows, dtype=jnp.int32) - 1
            last = jnp.minimum(fitting, self.short_pairs)
            return last, step(self._tile(ends[first], ends[last]), carry)

        return self._loop(jnp.zeros_like(self.short_pairs), self.short_pairs, group, carry)

    def visit_long_pairs(
        self, step: Callable[[Array, Array, CarryT], CarryT], carry: CarryT
    ) -> CarryT:
        """Run carry = step(pair, ends, carry) for the pairs that are longer than a tile.

        The pair's chosen tokens are the places from ends[0] up to ends[1]. Its rejected tokens are
        those from ends[1] up to ends[2].
        """

        def one(rank: Array, carry: CarryT) -> tuple[Array, CarryT]:
            ends = lax.dynamic_slice(self.ends, (rank * self.sides,), (self.sides + 1,))
            return rank + 1, step(self.order[rank], ends, carry)

        return self._loop(self.short_pairs, self.pairs, one, carry)

    def states(self, hidden: tuple[Array, ...], tile: Tile) -> Array:
        """The hidden states [n, D] of a tile, 0 in empty places; `hidden` is [N, D] by side."""
        found = [
            states.at[at].get(mode="fill", fill_value=0)
            for states, at in zip(hidden, self._rows_of(tile), strict=True)
            if len(states)  # JAX does not gather from an empty array
        ]
        return functools.reduce(jnp.add, found)

    def store(self, into: tuple[MaybeT, ...], values: Array, tile: Tile) -> tuple[MaybeT, ...]:
        """Arrays [N, D] or [N] by side, or None, with the tile's rows set to `values`."""
        return tuple(
            None if array is None else array.at[rows].set(values.astype(array.dtype), mode="drop")
            for array, rows in zip(into, self._rows_of(tile), strict=True)
        )

    def sum_segments(self, values: Array, tile: Tile) -> Array:
        """The sums [P, 2] of a tile's values [n] by pair and side."""
        sums = sum_by(values, tile.segment, self.pairs * self.sides)
        return sums.reshape(self.pairs, self.sides)

    def _loop(
        self,
        start: Array,
        stop: Array | int,
        step: Callable[[Array, CarryT], tuple[Array, CarryT]],
        carry: CarryT,
    ) -> CarryT:
        """Run (position, carry) = step(position, carry) until the position reaches `stop`."""
        if len(self._targets) == 0:
            return carry
        _, carry = lax.while_loop(
            lambda state: state[0] < stop,
            lambda state: step(*state),
            vary_like((start, carry), self.ends),
        )
        return carry

    def _tile(self, start: Array, stop: Array) -> Tile:
        filled = start + jnp.arange(self.rows, dtype=jnp.int32) < stop
        index = lax.dynamic_slice(self._index, (start,), (self.rows,))
        return Tile(
            filled,
            jnp.where(filled, index, self._first[-1]),
            jnp.where(filled, self._targets[index], 0),
            jnp.where(filled, self._segment[index], -1),
            None if self._weights is None else self._weights[index],
        )

    def _rows_of(self, tile: Tile) -> list[Array]:
        """For each side, the rows of a tile's tokens in its arrays, N for the other side's."""
        return [
            jnp.where((tile.token >= first) & (tile.token < last), tile.token - first, last - first)
            for first, last in itertools.pairwise(self._first)
        ]


def _weights_of(sides: tuple[Sequences, ...]) -> Array | None:
    """The weights of the tokens of all sides, or None if no side has any."""
    if all(side.weights is None for side in sides):
        return None
    found = [side.counts if side.weights is None else side.weights for side in sides]
    dtypes = [jnp.dtype("float32"), *(weights.dtype for weights in found)]
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    return jnp.concatenate([weights.reshape(-1).astype(widest) for weights in found])


def rows_for_tokens(sides: tuple[Sequences, ...], most: int) -> int:
    """The number of tokens per tile, at most `most`, for tiles that may split pairs."""
    tokens = sum(len(side.targets) * side.longest for side in sides)
    return tile_rows((tokens,), 1, most)


def rows_for_pairs(sides: tuple[Sequences, ...], most: int) -> int:
    """The same for tiles of whole pairs, as far as they fit."""
    longest = tuple(side.longest for side in sides)
    if all(side.cu_seqlens is None for side in sides):
        return tile_rows(longest, sides[0].count, most)
    return tile_rows((sum(longest),), 1, most)  # a pair may take any part of a packed row
