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
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from spoloss._objective import Constants, Objective
from spoloss.jax._labels import Sequences
from spoloss.jax._softmax import HeadSums, Projection, Softmax, Wanted, held
from spoloss.jax._tokens import Table, Tile


class Made(NamedTuple):
    """The results of the pass.

    Attributes:
      logps: for each side, the log-probability of each token, [N].
      directions: for each side, the derivative of each token's log-probability with respect to its
        hidden state, [N, D] or None.
      head: the gradients with respect to weight and bias.
    """

    logps: tuple[Array, ...]
    directions: tuple[Array | None, ...]
    head: HeadSums


def one_pass(
    projection: Projection,
    hidden: tuple[Array, ...],
    sides: tuple[Sequences, ...],
    rows: int,
    objective: Objective,
    constants: Constants,
    scale: float,
    wanted: Wanted,
) -> Made:
    """Visit each token once.

    Args:
      projection: the head.
      hidden: the hidden states of both sides, [N, D].
      sides: the sequences of both sides.
      rows: the number of tokens per tile.
      objective: the loss.
      constants: the numbers of each pair.
      scale: the factor of a pair's loss in the reduced loss.
      wanted: which gradients to compute.
    """
    table = Table(sides, rows, whole_pairs=True)
    run = _Run(projection, table, hidden, sides, objective, constants, scale, wanted)
    made = table.visit_groups(run.add_group, run.start())
    return table.visit_long_pairs(run.add_long_pair, made) if table.may_be_long else made


@dataclass(frozen=True)
class _Run:
    """One pass over a batch, tile by tile. The fields are the arguments of `one_pass`."""

    projection: Projection
    table: Table
    hidden: tuple[Array, ...]
    sides: tuple[Sequences, ...]
    objective: Objective
    constants: Constants
    scale: float
    wanted: Wanted

    def start(self) -> Made:
        """The results before the first tile."""
        return Made(
            tuple(
                jnp.zeros_like(states, self.projection.dtype, shape=len(states))
                for states in self.hidden
            ),
            tuple(
                jnp.zeros_like(states, held(states)) if want else None
                for states, want in zip(self.hidden, self.wanted.hidden, strict=True)
            ),
            self.projection.zeros(self.wanted),
        )

    def add_group(self, tile: Tile, made: Made) -> Made:
        """Add pairs that share a tile: their slopes are known before the gradient products."""
        states, softmax, made = self._softmax(tile, made)
        dtype = self.projection.dtype
        sums = self.table.sum_segments(tile.weighted(softmax.logps), tile)
        sums = functools.reduce(jnp.add, (side.zero(dtype) for side in self.sides), sums)
        slopes = jnp.stack(self._slopes(tuple(sums.T)), axis=1)
        of_token = tile.weighted(tile.of_segment(slopes))
        return made._replace(head=self.projection.add(made.head, softmax, states, of_token))

    def add_long_pair(self, pair: Array, ends: Array, made: Made) -> Made:
        """Add a pair that needs several tiles: the direction of each side, then its slope."""

        def step(tile: Tile, carry: tuple[Made, HeadSums]) -> tuple[Made, HeadSums]:
            made, direction = carry
            states, softmax, made = self._softmax(tile, made)
            unit = tile.weighted(tile.filled.astype(self.projection.dtype))
            return made, self.projection.add(direction, softmax, states, unit)

        directions = []
        for first, last in itertools.pairwise(ends):
            start = (made, self.projection.zeros(self.wanted))
            made, direction = self.table.visit(first, last, step, start)
            directions.append(direction)
        slopes, head = self._slopes(sums_of(made.logps, self.sides)), made.head
        for slope, direction in zip(slopes, directions, strict=True):
            head = head.plus(slope[pair], direction)
        return made._replace(head=head)

    def _softmax(self, tile: Tile, made: Made) -> tuple[Array, Softmax, Made]:
        """The states and the softmax of a tile, whose logps and directions are stored."""
        states = self.table.states(self.hidden, tile)
        softmax = self.projection.softmax(states, tile.targets, self._alive(tile))
        logps, directions = self.table.store(made.logps, softmax.logps, tile), made.directions
        if any(self.wanted.hidden):
            directions = self.table.store(directions, self.projection.directions(softmax), tile)
        return states, softmax, Made(logps, directions, made.head)

    def _alive(self, tile: Tile) -> Array:
        """Whether each token of a tile is in a pair whose weight is not 0."""
        if self.constants.weights is None:
            return tile.filled
        shape = (self.table.pairs, len(self.sides))
        return tile.of_segment(jnp.broadcast_to(self.constants.weights[..., None] != 0.0, shape))

    def _slopes(self, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        """The derivatives of the loss with respect to the sums of both sides, [P] each."""
        lengths = lengths_of(self.sides, sums[0].dtype)
        slopes = self.objective.slopes(sums, lengths, self.constants)
        return tuple(self.scale * slope for slope in slopes)


def sums_of(logps: tuple[Array, ...], sides: tuple[Sequences, ...]) -> tuple[Array, ...]:
    """The weighted sums of token log-probabilities over the sequences of both sides, [P] each."""
    of_sides = zip(logps, sides, strict=True)
    return tuple(side.sums(of.reshape(side.targets.shape)) for of, side in of_sides)


def lengths_of(sides: tuple[Sequences, ...], dtype: DTypeLike) -> tuple[Array, ...]:
    """The lengths of the sequences of both sides, [P] each."""
    return tuple(side.lengths(dtype) for side in sides)
