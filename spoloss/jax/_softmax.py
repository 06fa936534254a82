"""The softmax of a tile of tokens: log-probabilities, and the products of their gradients.

With z the logits of a token, y its label, gap = max(z) - z_y, and S the sum of exp(z_v - max(z))
over all v != y:

    log p         = -(gap + log(S + exp(-gap)))
    d log p / d z = -exp(z_v - max(z)) / (S + exp(-gap))  for v != y,
            1 - p =  S / (S + exp(-gap))                  for v = y

The sum excludes the label, so 1 - p is never the difference of two numbers near 1. Only differences
of logits occur, so a number added to all logits costs no digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from spoloss.jax._arguments import Head

_BLOCKS = 8
"""The weight's gradient is updated in this many slices, so a product needs 1/8 of [V, D]."""


class Softmax(NamedTuple):
    """The softmax of n tokens over V entries.

        d logps[t] / d (h W^T + b)[t, v] = factor[t] * exps[t, v] + at_label[t] * [v = column[t]]

    Attributes:
      logps: [n] the log-probability of each token's label.
      exps: [n, V] in the weight's dtype, 0 at the labels.
      factor: [n]; separate from `exps`, so that it can multiply a smaller array.
      column: [n] the label's column, or V if another device has it.
      at_label: [n].
      states: [n, D] the tokens' hidden states.
    """

    logps: Array
    exps: Array
    factor: Array
    column: Array
    at_label: Array
    states: Array


class Wanted(NamedTuple):
    """With respect to what to differentiate: the hidden states of each side, weight, bias."""

    hidden: tuple[bool, ...]
    weight: bool
    bias: bool

    @classmethod
    def of(cls, head: Any, hidden: Any) -> Wanted:
        """What the arguments of a forward rule are differentiated with respect to."""
        bias = head.bias is not None and head.bias.perturbed
        return cls(tuple(states.perturbed for states in hidden), head.weight.perturbed, bias)

    @property
    def head(self) -> bool:
        """Whether to compute any gradient of the head."""
        return self.weight or self.bias


class HeadSums(NamedTuple):
    """The gradients with respect to weight [V, D] and bias [V], in at least float32, or None."""

    weight: Array | None
    bias: Array | None

    def plus(self, factor: Array, more: HeadSums) -> HeadSums:
        """These sums plus a 0-d factor times some others."""
        sums: HeadSums = jax.tree.map(lambda total, part: total + factor * part, self, more)
        return sums


@dataclass(frozen=True)
class Projection:
    """A head's arrays in the dtype of its products: V rows of the weight, all or this device's.

    Attributes:
      weight: [V, D].
      bias: [V] or None.
      options: the head, for its numbers. Its `vocab_axis` names the axes over which the rows are
        split, inside of `jax.shard_map`.
    """

    weight: Array
    bias: Array | None
    options: Head

    @classmethod
    def of(cls, head: Head) -> Projection:
        """The head in its compute dtype. float16 becomes float32, because small slopes vanish."""
        return cls(head.weight.astype(held(head.weight)), head.bias, head)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of logits, log-probabilities and sums: at least float32."""
        return wide(self.weight)

    @property
    def gain(self) -> float:
        """The derivative of the logits with respect to h W^T + b, without the soft-capping's."""
        return self.options.logit_scale / self.options.temperature

    def softmax(self, states: Array, targets: Array, live: Array) -> Softmax:
        """The softmax of a tile.

        Args:
          states: [n, D].
          targets: [n] labels in [0, V) of the whole head. Other labels give nan.
          live: [n] whether to compute a token's slopes. Otherwise they are 0, even for nan states.
        """
        logits = self._logits(states)
        column = self._columns(targets)
        target = self._at_target(logits, targets, column)
        # The shift cancels in all results, so it needs no derivative. It includes the target's
        # logit, so that XLA reads that logit before the exponentials overwrite the logits.
        peak = jnp.maximum(self._max_entries(logits.max(axis=1)), target)
        peak = lax.stop_gradient(peak)
        void = ~live & ~jnp.isfinite(peak)
        is_target = lax.broadcasted_iota(column.dtype, logits.shape, 1) == column[:, None]
        exps = jnp.where(is_target | void[:, None], 0.0, jnp.exp(logits - peak[:, None]))
        others = self._sum_entries(exps.sum(axis=1))
        gap = peak - target
        scale = 1.0 / (others + jnp.exp(-gap))
        doubt = others * scale * self._bend(target)
        return Softmax(
            # log1p, because the log of S + exp(-gap) rounds a small S off if p is near 1.
            -(gap + jnp.log1p(others + jnp.expm1(-gap))),
            (exps * self._bend(logits)).astype(self.weight.dtype),
            jnp.where(live, -self.gain * scale, 0.0),
            column,
            jnp.where(live, self.gain * doubt, 0.0),
            states,
        )

    def directions(self, tile: Softmax) -> Array:
        """The tokens' directions [n, D]: d logps[t] / d states[t], summed over a split head."""
        of_labels = self.weight.at[tile.column].get(mode="fill", fill_value=0)
        of_others = tile.factor[:, None] * _dot(tile.exps, self.weight, 1, 0)
        of_labels = tile.at_label[:, None] * of_labels.astype(self.dtype)
        return self._sum_entries(of_others + of_labels)

    def zeros(self, wanted: Wanted) -> HeadSums:
        """Zeros for the wanted gradients of the head."""
        return HeadSums(
            jnp.zeros_like(self.weight, dtype=self.dtype) if wanted.weight else None,
            jnp.zeros(len(self.weight), self.dtype) if wanted.bias else None,
        )

    def add(self, sums: HeadSums, tile: Softmax, upstream: Array) -> HeadSums:
        """The sums plus upstream[t] * d logps[t] / d head, summed over the n tokens of a tile."""
        by_weight, by_bias = sums
        of_others, of_labels = upstream * tile.factor, upstream * tile.at_label
        if by_weight is not None:
            rows = _times(of_others, tile.states).astype(self.weight.dtype)
            by_weight = _add_product(by_weight, tile.exps, rows)
            by_weight = by_weight.at[tile.column].add(_times(of_labels, tile.states), mode="drop")
        if by_bias is not None:
            by_bias = by_bias + _dot(of_others.astype(tile.exps.dtype), tile.exps, 0, 0)
            by_bias = by_bias.at[tile.column].add(of_labels, mode="drop")
        return HeadSums(by_weight, by_bias)

    def _logits(self, states: Array) -> Array:
        """The logits [n, V] in at least float32."""
        options, bias = self.options, self.bias
        logits = _dot(states.astype(self.weight.dtype), self.weight, 1, 1)
        if bias is not None:
            bias = jnp.broadcast_to(bias.astype(logits.dtype), logits.shape)
            logits = logits + bias
        if options.softcap is None:
            logits = logits * self.gain
        else:
            bent = jnp.tanh(logits * (options.logit_scale / options.softcap))
            logits = bent * (options.softcap / options.temperature)
        # A padded entry stays at -inf, whatever scale and soft-cap make of its bias.
        return logits if bias is None else jnp.where(bias == -jnp.inf, -jnp.inf, logits)

    def _bend(self, logits: Array) -> Array:
        """The derivative of the soft-capping, computed from the capped logits."""
        if self.options.softcap is None:
            return jnp.ones_like(logits)
        # A padded entry's logit is -inf, and no longer the -softcap that its slope belongs to.
        bent = jnp.clip(logits * (self.options.temperature / self.options.softcap), -1.0, 1.0)
        return 1.0 - bent * bent

    def _columns(self, targets: Array) -> Array:
        """The labels' columns [n] on this device, or V if another device has them."""
        entries, axis = len(self.weight), self.options.vocab_axis
        first = lax.axis_index(axis) * entries if axis else 0
        column = targets - first
        return jnp.where((column >= 0) & (column < entries), column, entries)

    def _at_target(self, logits: Array, targets: Array, column: Array) -> Array:
        """The logits of the labels [n], nan for a label outside of the whole vocabulary."""
        found = jnp.take_along_axis(logits, column[:, None], axis=1, mode="fill", fill_value=0.0)
        axis = self.options.vocab_axis
        entries = len(self.weight) * (lax.axis_size(axis) if axis else 1)
        inside = (targets >= 0) & (targets < entries)
        return jnp.where(inside, self._sum_entries(found[:, 0]), jnp.nan)

    def _sum_entries(self, values: Array) -> Array:
        axis = self.options.vocab_axis
        return lax.psum(values, axis) if axis else values  # type: ignore[no-untyped-call]

    def _max_entries(self, values: Array) -> Array:
        axis = self.options.vocab_axis
        return lax.pmax(values, axis) if axis else values  # type: ignore[no-untyped-call]


def wide(array: Array) -> jnp.dtype:
    """The dtype to compute in: that of `array`, but at least float32."""
    half = jnp.finfo(array.dtype).bits < 32  # type: ignore[no-untyped-call]
    return jnp.dtype("float32") if half else array.dtype


def held(array: Array) -> jnp.dtype:
    """The dtype of directions for hidden states: float32 for float16, where small ones vanish.

    The backward multiplies them by the slope, which may contain a loss scale that makes them large.
    """
    return jnp.dtype("float32") if array.dtype == jnp.float16 else array.dtype


def _dot(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """The product over one axis of each, summed in at least float32."""
    axes = (((of_a,), (of_b,)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=wide(a))


def _times(factor: Array, states: Array) -> Array:
    """Rows [n, D] times a factor [n]. A factor of 0 gives 0, even if the states are nan."""
    factor = factor[:, None]
    return jnp.where(factor == 0.0, 0.0, states.astype(factor.dtype) * factor)


def _add_product(total: Array, exps: Array, rows: Array) -> Array:
    """Total [V, D] + exps^T rows, some entries at a time, without a second [V, D] array."""
    width = len(total) // _BLOCKS

    def add(total: Array, start: Array | int, width: int) -> Array:
        some = lax.dynamic_slice_in_dim(exps, start, width, axis=1)
        sums = lax.dynamic_slice_in_dim(total, start, width) + _dot(some, rows, 0, 0)
        return lax.dynamic_update_slice_in_dim(total, sums, start, 0)

    total = lax.fori_loop(0, _BLOCKS, lambda i, total: add(total, i * width, width), total)
    rest = len(total) - width * _BLOCKS
    return add(total, width * _BLOCKS, rest) if rest else total
