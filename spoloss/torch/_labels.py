"""Labels of sequences: checks, the shift to targets, and sums over sequences.

Sequences are either the rows of labels [B, T], or packed one after another into one row [1, T]
without padding. Then `cu_seqlens` [S + 1] has their offsets, in the format of FlashAttention's
variable-length functions: sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spoloss._arrays import averages
from spoloss._checks import check_tokens
from spoloss.torch._arguments import Completions
from spoloss.torch._autograd import is_batched

IGNORED = torch.iinfo(torch.int64).min
"""The target of a token that is ignored."""

UNWEIGHABLE = IGNORED + 1
"""The target of a token whose weight is negative, infinite or nan, which is an error."""

_PIECE = 128
"""The number of values in a piece of `sum_runs`."""


def check_labels(prefix: str, tokens: Completions, of: str) -> None:
    """`check_tokens`, the dtype of the offsets and, on the CPU, that they rise from 0 to T."""
    check_tokens(torch, prefix, tokens, of)
    name, cu_seqlens = f"{prefix}cu_seqlens", tokens.cu_seqlens
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {cu_seqlens.dtype}")
    length = tokens.labels.shape[1]
    if _is_readable(cu_seqlens) and not rises(cu_seqlens, length):
        raise ValueError(f"{name} must rise from 0 to T = {length}, got {cu_seqlens.tolist()}")


def _is_readable(tensor: Tensor) -> bool:
    """Whether the host can read a tensor at once, outside of a graph."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not is_batched(tensor)


@dataclass(frozen=True)
class Sequences:
    """The tokens of some sequences, as the positions that predict them.

    Attributes:
      name: the prefix of the arguments' names, for messages.
      targets: [B, T] the token id that each position predicts, int64; IGNORED where none counts.
      weights: [B, T] the factor of each token's log-probability, 0 where none counts, in at least
        float32; None for 1.
      cu_seqlens: [S + 1] the offsets that cut one row [1, T] into S sequences; None if each row is
        a sequence (then S = B).
      ignore_index: the label to ignore, for messages.
      left_out: [S] which sequences have weight 0, or None if none has a weight.
    """

    name: str
    targets: Tensor
    weights: Tensor | None
    cu_seqlens: Tensor | None
    ignore_index: int
    left_out: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of sequences S."""
        return len(self.targets) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def lengths(self) -> Tensor:
        """The number of tokens of each sequence, or the sum of their weights, [S]."""
        counts = self.targets != IGNORED
        return sum_sequences(counts if self.weights is None else self.weights, self.cu_seqlens)

    def weighted(self, logps: Tensor) -> Tensor:
        """Token log-probabilities [B, T], 0 where none counts, times the tokens' weights."""
        return logps if self.weights is None else logps * self.weights.to(logps.dtype)

    def sums(self, logps: Tensor, *, average: bool = False) -> Tensor:
        """The weighted sum or average of token log-probabilities [B, T] over each sequence, [S]."""
        sums = sum_sequences(self.weighted(logps), self.cu_seqlens)
        return averages(sums, self.lengths()) if average else sums

    def check_weights(self, name: str) -> None:
        """Raise an error for a weight that is negative or not finite, if the host can read it."""
        if _is_readable(self.targets) and (self.targets == UNWEIGHABLE).any():
            raise ValueError(f"{name} must be finite and not negative, got another number")


def sequences_of(tokens: Completions, name: str = "") -> Sequences:
    """The sequences of some completions. A label of weight 0 does not count.

    The labels are shifted, not the hidden states or logits, because flattening a slice of those
    would copy them.
    """
    weights, cu_seqlens = tokens.token_weights, tokens.cu_seqlens
    # Convert before comparing: as uint8, an ignore_index of -100 would equal token 156.
    targets = tokens.labels.long()
    targets = targets.masked_fill(targets == tokens.ignore_index, IGNORED)
    if weights is not None:
        fits = (weights >= 0.0) & (weights < math.inf)
        targets = torch.where(fits | (targets == IGNORED), targets, UNWEIGHABLE)
        targets = torch.where(weights == 0.0, IGNORED, targets)
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if tokens.shift:
        if cu_seqlens is not None:
            targets = torch.where(_starts(cu_seqlens, targets.shape[1]), IGNORED, targets)
        targets = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], dim=1)
        if weights is not None:
            weights = torch.cat([weights[:, 1:], torch.zeros_like(weights[:, :1])], dim=1)
    if weights is not None:
        weights = torch.where(targets == IGNORED, 0.0, weights)
    return Sequences(name, targets, weights, cu_seqlens, tokens.ignore_index)


def _starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """Where sequences begin, [1, T]. The token before a start must not predict it."""
    marks = torch.zeros(length + 1, dtype=torch.bool, device=cu_seqlens.device)
    starts = cu_seqlens[:-1].long().clamp(0, length)
    return marks.index_fill(0, starts, True)[None, :length]


def sequence_of(cu_seqlens: Tensor, positions: Tensor) -> Tensor:
    """The sequence that each position of a packed row belongs to."""
    sequence = torch.searchsorted(cu_seqlens[1:], positions.to(cu_seqlens.dtype), right=True)
    return sequence.clamp(max=len(cu_seqlens) - 2)


def sum_sequences(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sum over each sequence: [B, T] -> [B], or [1, T] -> [S] with offsets.

    Floating sums are nan if the offsets do not rise from 0 to T.
    """
    if cu_seqlens is None:
        return values.sum(dim=1)
    length = values.shape[1]
    sequence = sequence_of(cu_seqlens, torch.arange(length, device=values.device))
    sums = sum_runs(values[0], sequence, len(cu_seqlens) - 1)
    # A check would synchronise with a GPU, so wrong offsets give nan instead of a wrong sum.
    wrong = ~rises(cu_seqlens, length)
    return sums.masked_fill(wrong, math.nan) if sums.is_floating_point() else sums


def sum_runs(values: Tensor, run: Tensor, count: int) -> Tensor:
    """The sum over each run of equal numbers in `run`, which rises from 0 to `count` - 1 at most.

    Each run is cut into pieces where a multiple of `_PIECE` lies in it. The pieces are summed as
    rows of a matrix, which PyTorch does pairwise, and then those of each run. So a sum is accurate
    to a few eps and the same every time, and no shape depends on the numbers in `run`.
    """
    position = torch.arange(len(values), device=values.device)
    many = len(values) // _PIECE + 1  # pieces, if there is one run
    # Piece p of run r is row r + p: along the values one of the two rises and neither falls, so no
    # other piece has that row.
    rows = values.new_zeros((count + many) * _PIECE)
    pieces = rows.index_put((run * _PIECE + position,), values).view(-1, _PIECE).sum(dim=1)
    absent = torch.ones(count, many, dtype=torch.bool, device=values.device)
    absent = absent.index_put((run, position // _PIECE), absent.new_zeros(()))
    return pieces.unfold(0, many, 1)[:count].masked_fill(absent, 0).sum(dim=1)


def rises(cu_seqlens: Tensor, length: int) -> Tensor:
    """Whether offsets rise from 0 to `length`, as a 0-d tensor."""
    rising = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    return rising & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length)
