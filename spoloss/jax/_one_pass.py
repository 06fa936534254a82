"""The loss and its gradients from hidden states in one pass, tile by tile.

    hidden states ──▶ tile [n, D] ──· W^T──▶ softmax [n, V] ──▶ log-probabilities of the labels
                         │                        │                   │ sum by pair
                         │                        │                   ▼
                         │                        │             margin h ──▶ slope l'(h)
                         │                        ├──· W──▶ directions of the hidden states [n, D]
                         └── · slope, transposed ─┴───────▶ += gradient of the weight [V, D]

The gradient of a loss of the margin is one number per pair, its slope, times a direction that does
not depend on the loss. So one softmax gives both a token's log-probability and its gradient, and
nothing is computed twice.

- For pairs that fit in a tile, the slope is known before the product for the weight's gradient.
- A longer pair is processed tile by tile with slope 1 into separate sums, which are scaled once.
- The gradients by hidden states keep slope 1 here. The backward rule multiplies them by the slope
  and the upstream gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from spoloss.jax._objective import Constants, Objective
from spoloss.jax._softmax import Head, HeadSums, Softmax, Wanted
from spoloss.jax._tokens import Table, Tile


class Made(NamedTuple):
    """The results of the pass.

    Attributes:
      logps: for each side, the log-probability of each token, [N].
      directions: for each side, the derivative of each token's log-probability by its hidden state,
        [N, D] or None.
      head: the gradients by weight and bias.
    """

    logps: tuple[Array, ...]
    directions: tuple[Array | None, ...]
    head: HeadSums


def one_pass(
    head: Head,
    table: Table,
    hidden: tuple[Array, ...],
    objective: Objective,
    constants: Constants,
    scale: float,
    wanted: Wanted,
    zero: Array,
) -> Made:
    """Visit each token once.

    Args:
      head: the head.
      table: the tokens of all pairs.
      hidden: the hidden states of both sides, [N, D].
      objective: the loss.
      constants: the per-pair arguments of the loss.
      scale: the factor of a pair's loss in the reduced loss.
      wanted: which gradients to compute.
      zero: added to the sums, 0-d: 0, or nan for invalid offsets.
    """
    lengths = table.lengths.astype(head.dtype)
    alive = constants.alive(lengths)

    def look(tile: Tile, made: Made) -> tuple[Array, Softmax, Made]:
        """The states and the softmax of a tile. Also adds the results that need no slope."""
        states = table.take(hidden, tile)
        softmax = head.softmax(states, tile.targets, tile.of_segment(alive))
        logps = tuple(
            table.put(array, softmax.logps, tile, side) for side, array in enumerate(made.logps)
        )
        directions = made.directions
        if any(wanted.hidden):
            rows = head.by_hidden(softmax)
            directions = tuple(
                None if array is None else table.put(array, rows, tile, side)
                for side, array in enumerate(directions)
            )
        return states, softmax, Made(logps, directions, made.head)

    def note(tile: Tile, made: Made) -> Made:
        return look(tile, made)[2]

    def share_a_tile(tile: Tile, made: Made) -> Made:
        states, softmax, made = look(tile, made)
        sums = table.sum_segments(softmax.logps, tile) + zero
        slopes = objective.token_slopes(sums, lengths, constants, scale)
        by_head = head.add(made.head, softmax, states, tile.of_segment(slopes))
        return made._replace(head=by_head)

    def walk_a_pair(pair: Array, ends: Array, made: Made) -> Made:
        unit = objective.shares(lengths)

        def step(tile: Tile, carry: tuple[Made, HeadSums]) -> tuple[Made, HeadSums]:
            made, direction = carry
            states, softmax, made = look(tile, made)
            return made, head.add(direction, softmax, states, tile.of_segment(unit))

        direction = head.zeros(wanted)
        made, direction = table.visit(ends[0], ends[1], step, (made, direction))
        if objective.nll_weight != 0.0:
            # So far the direction is of the chosen side only, which is the side of the NLL.
            nll = objective.nll_slopes(lengths, constants, scale)[pair] / unit[pair, 0]
            made = made._replace(head=made.head.plus(nll, direction))
        made, direction = table.visit(ends[1], ends[2], step, (made, direction))
        sums = table.sum(made.logps) + zero
        slope = objective.slopes(sums, lengths, constants, scale)[pair]
        return made._replace(head=made.head.plus(slope, direction))

    made = Made(
        tuple(jnp.zeros_like(states, head.dtype, shape=len(states)) for states in hidden),
        tuple(
            jnp.zeros_like(states) if need else None
            for states, need in zip(hidden, wanted.hidden, strict=True)
        ),
        head.zeros(wanted),
    )
    if not wanted.head:
        return table.visit_all(note, made)
    made = table.visit_groups(share_a_tile, made)
    return table.visit_long_pairs(walk_a_pair, made) if table.may_be_long else made
