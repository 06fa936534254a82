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
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from spoloss.jax._labels import Sequences
from spoloss.jax._objective import Constants, Objective
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
    table, dtype = Table(sides, rows, whole_pairs=True), projection.dtype
    lengths = lengths_of(sides, dtype)
    zero = functools.reduce(jnp.add, (side.zero(dtype) for side in sides))
    alive = constants.alive(len(sides))

    def slopes(sums: Array) -> Array:
        return scale * objective.slopes(sums, lengths, constants)

    def look(tile: Tile, made: Made) -> tuple[Array, Softmax, Made]:
        """The states and the softmax of a tile. Also stores the results that need no slope."""
        states = table.take(hidden, tile)
        softmax = projection.softmax(states, tile.targets, tile.of_segment(alive))
        logps, directions = table.put(made.logps, softmax.logps, tile), made.directions
        if any(wanted.hidden):
            directions = table.put(directions, projection.directions(softmax), tile)
        return states, softmax, Made(logps, directions, made.head)

    def share_a_tile(tile: Tile, made: Made) -> Made:
        states, softmax, made = look(tile, made)
        sums = table.sum_segments(tile.weighted(softmax.logps), tile) + zero
        factor = tile.weighted(tile.of_segment(slopes(sums)))
        return made._replace(head=projection.add(made.head, softmax, states, factor))

    def walk_a_pair(pair: Array, ends: Array, made: Made) -> Made:
        def step(tile: Tile, carry: tuple[Made, HeadSums]) -> tuple[Made, HeadSums]:
            made, direction = carry
            states, softmax, made = look(tile, made)
            unit = tile.weighted(tile.filled.astype(dtype))
            return made, projection.add(direction, softmax, states, unit)

        of_sides = []
        for side in range(len(sides)):
            start = (made, projection.zeros(wanted))
            made, direction = table.visit(ends[side], ends[side + 1], step, start)
            of_sides.append(direction)
        of_pair = slopes(sums_of(made.logps, sides))[pair]
        by_head = made.head
        for side, direction in enumerate(of_sides):
            by_head = by_head.plus(of_pair[side], direction)
        return made._replace(head=by_head)

    made = Made(
        tuple(jnp.zeros_like(states, dtype, shape=len(states)) for states in hidden),
        tuple(
            jnp.zeros_like(states, held(states)) if want else None
            for states, want in zip(hidden, wanted.hidden, strict=True)
        ),
        projection.zeros(wanted),
    )
    made = table.visit_groups(share_a_tile, made)
    return table.visit_long_pairs(walk_a_pair, made) if table.may_be_long else made


def sums_of(logps: tuple[Array, ...], sides: tuple[Sequences, ...]) -> Array:
    """The weighted sums of token log-probabilities over the sequences of both sides, [P, 2]."""
    of_sides = zip(logps, sides, strict=True)
    return jnp.stack([side.sums(of.reshape(side.targets.shape)) for of, side in of_sides], axis=1)


def lengths_of(sides: tuple[Sequences, ...], dtype: DTypeLike) -> Array:
    """The lengths of the sequences of both sides, [P, 2]."""
    return jnp.stack([side.lengths(dtype) for side in sides], axis=1)
