"""The loss of a trained head and its gradients from hidden states in one pass, tile by tile.

    hidden states ──▶ tile [n, D] ──· W^T──▶ softmax [n, V] ──▶ log-probabilities of the labels
                         │                        │                   │ sum by pair
                         │                        │                   ▼
                         │                        │             slopes of the two completions
                         │                        ├──· W──▶ directions of the hidden states [n, D]
                         └── · slope, transposed ─┴───────▶ += gradient of the weight [V, D]

The gradient of a loss is one number per completion, its slope, times a direction that does not
depend on the loss. So one softmax gives both a token's log-probability and its gradient, and
nothing is computed twice.

- For pairs that fit in a tile, the slopes are known before the product for the weight's gradient.
- A longer pair is processed tile by tile. Each side has sums of its own, which its slope scales.
- The directions keep slope 1 here. The backward rule multiplies them by the slope and the upstream
  gradient.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from spoloss._objective import Constants, Objective
from spoloss.jax._labels import Sequences
from spoloss.jax._recompute import Found, Visit
from spoloss.jax._softmax import HeadSums, Softmax
from spoloss.jax._tokens import Tile


@dataclass(frozen=True)
class OnePass:
    """A visit that also finds the gradient of the head.

    Attributes:
      visit: a visit of whole pairs.
      objective: the loss.
      constants: the numbers of each pair.
      scale: the factor of a pair's loss in the reduced loss.
    """

    visit: Visit
    objective: Objective
    constants: Constants
    scale: float

    def run(self) -> Found:
        """Visit each token once."""
        table = self.visit.table
        found = table.visit_groups(self._add_group, self.visit.start())
        return table.visit_long_pairs(self._add_long_pair, found) if table.may_be_long else found

    def _add_group(self, tile: Tile, found: Found) -> Found:
        """Add pairs that share a tile: their slopes are known before the gradient products."""
        softmax, found = self._add_tile(tile, found)
        sums = self.visit.table.sum_segments(tile.weighted(softmax.logps), tile)
        sums = functools.reduce(jnp.add, (side.zero(sums.dtype) for side in self.visit.sides), sums)
        slopes = jnp.stack(self._slopes(tuple(sums.T)), axis=1)
        of_token = tile.weighted(tile.of_segment(slopes))
        by_head = self.visit.projection.add(found.by_head, softmax, of_token)
        return found._replace(by_head=by_head)

    def _add_long_pair(self, pair: Array, ends: Array, found: Found) -> Found:
        """Add a pair that needs several tiles: the direction of each side, then its slope."""

        def step(tile: Tile, carry: tuple[Found, HeadSums]) -> tuple[Found, HeadSums]:
            found, direction = carry
            softmax, found = self._add_tile(tile, found)
            unit = tile.weighted(tile.filled.astype(self.visit.projection.dtype))
            return found, self.visit.projection.add(direction, softmax, unit)

        directions = []
        for first, last in itertools.pairwise(ends):
            start = (found, self.visit.projection.zeros(self.visit.wanted))
            found, direction = self.visit.table.visit(first, last, step, start)
            directions.append(direction)
        slopes, by_head = self._slopes(sums_of(found.logps, self.visit.sides)), found.by_head
        for slope, direction in zip(slopes, directions, strict=True):
            by_head = by_head.plus(slope[pair], direction)
        return found._replace(by_head=by_head)

    def _add_tile(self, tile: Tile, found: Found) -> tuple[Softmax, Found]:
        """Add a tile, without the directions of pairs whose weight is 0."""
        alive = tile.filled
        if self.constants.weights is not None:
            shape = (self.visit.table.pairs, len(self.visit.sides))
            weights = jnp.broadcast_to(self.constants.weights[..., None], shape)
            alive = tile.of_segment(weights != 0.0)
        return self.visit.add(tile, alive, found)

    def _slopes(self, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        """The derivatives of the loss with respect to the sums of both sides, [P] each."""
        lengths = lengths_of(self.visit.sides, sums[0].dtype)
        slopes = self.objective.slopes(sums, lengths, self.constants)
        return tuple(self.scale * slope for slope in slopes)


def sums_of(logps: tuple[Array, ...], sides: tuple[Sequences, ...]) -> tuple[Array, ...]:
    """The weighted sums of token log-probabilities over the sequences of both sides, [P] each."""
    of_sides = zip(logps, sides, strict=True)
    return tuple(side.sums(of.reshape(side.targets.shape)) for of, side in of_sides)


def lengths_of(sides: tuple[Sequences, ...], dtype: DTypeLike) -> tuple[Array, ...]:
    """The lengths of the sequences of both sides, [P] each."""
    return tuple(side.lengths(dtype) for side in sides)
