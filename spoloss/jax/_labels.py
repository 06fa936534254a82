"""The meaning of labels: which tokens count, what they predict, and which sequence they are in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from spoloss._arrays import averages
from spoloss.jax._arguments import Completions, static


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequences:
    """The tokens of some sequences, as the positions that predict them. A pytree of its arrays.

    Attributes:
      targets: [B, T] the label that each position predicts, 0 where none counts.
      counts: [B, T] whether a position predicts a label that counts.
      weights: [B, T] the factor of each token's log-probability, 0 where none counts, nan where it
        is negative or not finite; None for 1.
      cu_seqlens: [S + 1] the offsets that cut one row [1, T] into S sequences; None if each row is
        a sequence (then S = B).
      longest: the largest number of positions that can count in a row. Static.
    """

    targets: Array
    counts: Array
    weights: Array | None
    cu_seqlens: Array | None
    longest: int = static()

    @property
    def count(self) -> int:
        """The number of sequences S."""
        return len(self.targets) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def layout(self, of_rows: Any, whole: Any) -> Any:
        """The layouts of these arrays on a mesh: rows as `of_rows`, offsets as `whole`."""
        return Sequences(of_rows, of_rows, of_rows, whole, self.longest)

    def sequence_of_token(self) -> Array:
        """The sequence of each token, [B * T]."""
        batch, length = self.targets.shape
        if self.cu_seqlens is None:
            rows = jnp.arange(batch, dtype=jnp.int32)  # the dtype of `sequence_of`
            return jnp.repeat(rows, length, total_repeat_length=batch * length)
        return sequence_of(self.cu_seqlens, length)

    def sum(self, of_tokens: Array) -> Array:
        """The sums [S] over each sequence of values [B, T]; nan if the offsets do not rise."""
        if self.cu_seqlens is None:
            return of_tokens.sum(axis=1)
        sums = sum_by(of_tokens[0], self.sequence_of_token(), self.count)
        return sums + self.zero(sums.dtype)

    def weighted(self, of_tokens: Array) -> Array:
        """Values [B, T] times the tokens' weights."""
        if self.weights is None:
            return of_tokens
        return of_tokens * self.weights.astype(of_tokens.dtype)

    def tokens(self) -> Array:
        """The number of tokens that count in each sequence, int32 [S]."""
        if self.cu_seqlens is None:
            return self.counts.sum(axis=1, dtype=jnp.int32)
        found = sum_by(self.counts[0], self.sequence_of_token(), self.count)
        return found.astype(jnp.int32)

    def lengths(self, dtype: DTypeLike) -> Array:
        """The number of tokens of each sequence, or the sum of their weights, [S]."""
        return self.sum(self.weighted(self.counts.astype(dtype)))

    def sums(self, logps: Array, *, average: bool = False) -> Array:
        """The weighted sum or average of token log-probabilities [B, T] over each sequence, [S]."""
        sums = self.sum(self.weighted(logps))
        return averages(sums, self.lengths(sums.dtype)) if average else sums

    def spread(self, of_sequences: Array) -> Array:
        """Values [S] of sequences, repeated for their tokens: [B, T], or [B, 1] to broadcast."""
        if self.cu_seqlens is None:
            return of_sequences[:, None]
        return of_sequences[self.sequence_of_token()][None]

    def zero(self, dtype: DTypeLike) -> Array:
        """0, or nan if the offsets do not rise from 0 to T, because a trace cannot read them."""
        zero = jnp.zeros((), dtype)
        if self.cu_seqlens is None:
            return zero
        offsets, length = self.cu_seqlens, self.targets.shape[1]
        rising = (offsets[1:] >= offsets[:-1]).all()
        return jnp.where(rising & (offsets[0] == 0) & (offsets[-1] == length), zero, jnp.nan)


def sequences_of(completions: Completions) -> Sequences:
    """The sequences of some completions.

    Labels and weights are shifted, not the hidden states. No label moves into the previous
    sequence.
    """
    # In the default integer dtype: JAX wraps a Python number into the dtype of the array beside it,
    # so in uint8, -100 would be token 156, and V = 256 would be 0.
    targets, cu_seqlens = completions.labels.astype(int), completions.cu_seqlens
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.astype(int)
    counts, weights = targets != int(completions.ignore_index), completions.token_weights
    if weights is not None:
        counts &= weights != 0.0
        # A trace cannot read the weights, so a wrong one gives nan instead of a wrong number.
        fits = (weights >= 0.0) & (weights < jnp.inf)
        weights = jnp.where(fits, weights, jnp.full_like(weights, jnp.nan))
    longest = targets.shape[1]
    if completions.shift:
        if cu_seqlens is not None:
            sequence = sequence_of(cu_seqlens, longest)
            follows = jnp.pad(sequence[1:] == sequence[:-1], (1, 0))[:longest]
            counts &= follows[None]
        targets, counts = _moved(targets), _moved(counts)
        weights = None if weights is None else _moved(weights)
        longest = max(0, longest - 1)
    targets = jnp.where(counts, targets, 0)
    if weights is not None:
        weights = jnp.where(counts, weights, jnp.zeros_like(weights))
    return Sequences(targets, counts, weights, cu_seqlens, longest)


def _moved(of_labels: Array) -> Array:
    """Values [B, T] of labels, at the positions that predict them."""
    return jnp.pad(of_labels[:, 1:], ((0, 0), (0, min(1, of_labels.shape[1]))))


def sequence_of(cu_seqlens: Array, length: int) -> Array:
    """The sequence of each of the `length` tokens of a row that is cut by offsets."""
    after = jnp.searchsorted(cu_seqlens[1:], jnp.arange(length), side="right")
    return jnp.minimum(after, len(cu_seqlens) - 2)


def sum_by(values: Array, ids: Array, count: int) -> Array:
    """The sums [count] of the values [n] with equal ids. Values with other ids are left out.

    A reduction has less rounding error than the scatter of `jax.ops.segment_sum`, which adds the
    thousands of numbers of a sequence one by one.
    """
    belongs = ids[None] == jnp.arange(count, dtype=ids.dtype)[:, None]
    return jnp.where(belongs, values[None], jnp.zeros_like(values[None])).sum(axis=1)
