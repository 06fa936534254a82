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

from spoloss.jax._labels import Labels, Reading, sum_by
from spoloss.jax._mesh import vary_like
from spoloss.jax._plan import tile_rows

CarryT = TypeVar("CarryT")


class Tile(NamedTuple):
    """The next n tokens of a table. The last places may be empty.

    Attributes:
      filled: [n] whether there is a token at this place.
      token: [n] the index of the token among all tokens, or their number if the place is empty.
      targets: [n] the token's label.
      segment: [n] the token's pair and side as 2 * pair + side, or -1 if the place is empty.
    """

    filled: Array
    token: Array
    targets: Array
    segment: Array

    def of_segment(self, values: Array) -> Array:
        """Values of pairs and sides [P, 2], repeated for their tokens [n]; 0 in empty places."""
        of_tokens = values.reshape(-1)[self.segment]
        return jnp.where(self.filled, of_tokens, jnp.zeros_like(of_tokens))


Step = Callable[[Tile, CarryT], CarryT]


class Table:
    """The tokens that count, pair by pair: chosen, then rejected.

    Pairs that fit in a tile come before longer pairs.
    """

    def __init__(
        self, sides: tuple[Labels, ...], reading: Reading, rows: int, *, whole_pairs: bool
    ) -> None:
        """Sort the tokens.

        Args:
          sides: the labels of chosen and rejected, or of one side alone.
          reading: how to read them.
          rows: the number of tokens per tile.
          whole_pairs: whether pairs that fit in a tile must not be split.
        """
        self.rows, self.pairs, self.sides = rows, sides[0].sequences, len(sides)
        self._labels = sides
        longest = sum(side.longest(reading) for side in sides)
        self.may_be_long = whole_pairs and longest > rows
        read = [side.targets(reading) for side in sides]
        self.lengths = jnp.stack(
            [side.sum(counts) for side, (_, counts) in zip(sides, read, strict=True)], axis=1
        ).astype(jnp.int32)
        is_long = self.lengths.sum(axis=1) > rows
        self.short_pairs = jnp.sum(~is_long, dtype=jnp.int32)
        self.order = jnp.argsort(is_long, stable=True)
        self.ends = jnp.pad(jnp.cumsum(self.lengths[self.order].reshape(-1)), (1, 0))
        self.ends = self.ends.astype(jnp.int32)

        rank = jnp.argsort(self.order)
        segments, places = [], []
        for i, (side, (_, counts)) in enumerate(zip(sides, read, strict=True)):
            sequence = side.sequence_of_token()
            segments.append(sequence * self.sides + i)
            of_token = rank[sequence] * self.sides + i
            places.append(jnp.where(counts.reshape(-1), of_token, self.pairs * self.sides))
        self._segment = jnp.concatenate(segments)
        self._targets = jnp.concatenate([targets.reshape(-1) for targets, _ in read])
        # Padding by one tile, so that a tile that extends beyond the end is still a slice.
        index = jnp.argsort(jnp.concatenate(places), stable=True)
        self._index = jnp.pad(index, (0, rows)).astype(jnp.int32)
        self._first = list(itertools.accumulate((side.ids.size for side in sides), initial=0))

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

    def take(self, hidden: tuple[Array, ...], tile: Tile) -> Array:
        """The hidden states [n, D] of a tile, 0 in empty places; `hidden` is [N, D] by side."""
        found = [
            states.at[at].get(mode="fill", fill_value=0)
            for states, at in zip(hidden, self._rows_of(tile), strict=True)
        ]
        return functools.reduce(jnp.add, found)

    def put(self, into: Array, values: Array, tile: Tile, side: int = 0) -> Array:
        """An array [N, D] or [N] of a side, with the tile's rows of this side set to `values`."""
        rows = self._rows_of(tile)[side]
        return into.at[rows].set(values.astype(into.dtype), mode="drop")

    def sum(self, values: tuple[Array, ...]) -> Array:
        """The sums [P, sides] over each sequence of values [N] by side."""
        of_sides = zip(values, self._labels, strict=True)
        return jnp.stack([side.sum(of.reshape(side.ids.shape)) for of, side in of_sides], axis=1)

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
        )

    def _rows_of(self, tile: Tile) -> list[Array]:
        """For each side, the rows of a tile's tokens in its arrays, N for the other side's."""
        return [
            jnp.where((tile.token >= first) & (tile.token < last), tile.token - first, last - first)
            for first, last in itertools.pairwise(self._first)
        ]


def rows_for_tokens(sides: tuple[Labels, ...], reading: Reading, most: int) -> int:
    """The number of tokens per tile, at most `most`, for tiles that may split pairs."""
    tokens = sum(len(side.ids) * side.longest(reading) for side in sides)
    return tile_rows((tokens,), 1, most)


def rows_for_pairs(sides: tuple[Labels, ...], reading: Reading, most: int) -> int:
    """The same for tiles of whole pairs, as far as they fit."""
    longest = tuple(side.longest(reading) for side in sides)
    if sides[0].cu_seqlens is None:
        return tile_rows(longest, sides[0].sequences, most)
    return tile_rows((sum(longest),), 1, most)  # a pair may take any part of its row
