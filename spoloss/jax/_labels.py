"""The meaning of labels: which tokens count, what they predict, and which sequence they are in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


@dataclass(frozen=True)
class Reading:
    """How labels are read. Static under `jax.jit`.

    Attributes:
      ignore_index: the label to ignore.
      shift: whether position t predicts label t + 1 instead of label t.
    """

    ignore_index: int
    shift: bool


class Labels(NamedTuple):
    """The labels of one side.

    Attributes:
      ids: [B, T] token ids.
      cu_seqlens: [S + 1] the offsets that cut one row [1, T] into S sequences; None if each row is
        a sequence (then S = B).
    """

    ids: Array
    cu_seqlens: Array | None

    @property
    def sequences(self) -> int:
        """The number of sequences S."""
        return len(self.ids) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def longest(self, reading: Reading) -> int:
        """The largest number of tokens that can count in a row."""
        return max(0, self.ids.shape[1] - int(reading.shift))

    def targets(self, reading: Reading) -> tuple[Array, Array]:
        """The label that each position predicts, [B, T], and whether it counts.

        The labels are shifted, not the hidden states. No label moves into the previous sequence.
        """
        ids, counts = self.ids, self.ids != reading.ignore_index
        if reading.shift:
            if self.cu_seqlens is not None:
                sequence = self.sequence_of_token()
                follows = sequence[1:] == sequence[:-1]
                counts = counts.at[0, 1:].min(follows)
            counts = jnp.concatenate([counts[:, 1:], jnp.zeros_like(counts[:, :1])], axis=1)
            ids = jnp.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
        return jnp.where(counts, ids, 0), counts

    def sequence_of_token(self) -> Array:
        """The sequence of each token, [B * T]."""
        batch, length = self.ids.shape
        if self.cu_seqlens is None:
            return jnp.repeat(jnp.arange(batch), length, total_repeat_length=batch * length)
        after = jnp.searchsorted(self.cu_seqlens[1:], jnp.arange(length), side="right")
        return jnp.minimum(after, self.sequences - 1)

    def sum(self, of_tokens: Array) -> Array:
        """The sums [S] over each sequence of values [B, T]."""
        if self.cu_seqlens is None:
            return of_tokens.sum(axis=1)
        return sum_by(of_tokens[0], self.sequence_of_token(), self.sequences)

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
        offsets, length = self.cu_seqlens, self.ids.shape[1]
        rising = (offsets[1:] >= offsets[:-1]).all()
        return jnp.where(rising & (offsets[0] == 0) & (offsets[-1] == length), zero, jnp.nan)


def sum_by(values: Array, ids: Array, count: int) -> Array:
    """The sums [count] of the values [n] with equal ids. Values with other ids are left out.

    A reduction has less rounding error than the scatter of `jax.ops.segment_sum`, which adds the
    thousands of numbers of a sequence one by one.
    """
    belongs = ids[None] == jnp.arange(count, dtype=ids.dtype)[:, None]
    return jnp.where(belongs, values[None], jnp.zeros_like(values[None])).sum(axis=1)
