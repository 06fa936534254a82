"""Labels of sequences: checks, the shift to targets, and sums over sequences.

Sequences are either the rows of labels [B, T], or packed one after another into one row [1, T]
without padding. Then `cu_seqlens` [S + 1] has their offsets, in the format of FlashAttention's
variable-length functions: sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

IGNORED = torch.iinfo(torch.int64).min
"""The target of a token that is ignored."""

_PIECE = 256
"""The number of values in a piece of `sum_runs`."""


def check_labels(name: str, labels: Tensor, other: str, states: Tensor) -> None:
    """Check that labels are integers of shape [B, T], the first two axes of `states`.

    Raises:
      TypeError: the labels are no tensor, or not integer.
      ValueError: the shape or the device does not fit.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a PyTorch tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integer, got {labels.dtype}")
    if labels.shape != states.shape[:2]:
        raise ValueError(
            f"{name} must have the shape [B, T] = {tuple(states.shape[:2])} of {other}, "
            f"got {tuple(labels.shape)}"
        )
    if labels.device != states.device:
        raise ValueError(f"{name} must be on the {states.device} of {other}, got {labels.device}")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, labels_name: str, labels: Tensor) -> None:
    """Check that offsets can cut labels [1, T] into sequences.

    Raises:
      TypeError: the offsets are not int32 or int64.
      ValueError: the labels have more than one row, or a shape or device does not fit, or, on the
        CPU and outside a compiled graph, the offsets do not rise from 0 to T.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"{name} must be int32 or int64, got {kind}")
    if len(labels) != 1:
        raise ValueError(
            f"{name} cuts one row into sequences: {labels_name} must have shape [1, T], "
            f"got {tuple(labels.shape)}"
        )
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{name} must have shape [S + 1] with S >= 1, got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != labels.device:
        raise ValueError(
            f"{name} must be on the {labels.device} of {labels_name}, got {cu_seqlens.device}"
        )
    readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not rises(cu_seqlens, labels.shape[1]):
        raise ValueError(
            f"{name} must rise from 0 to T = {labels.shape[1]}, got {cu_seqlens.tolist()}"
        )


def targets_of(
    labels: Tensor, ignore_index: int, *, shift: bool, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The token id that each position predicts, int64 [B, T], or IGNORED.

    The labels are shifted, not the hidden states or logits, because flattening a slice of those
    would copy them.
    """
    # Convert before comparing: as uint8, an ignore_index of -100 would equal token 156.
    labels = labels.long()
    labels = torch.where(labels == ignore_index, IGNORED, labels)
    if not shift:
        return labels
    if cu_seqlens is not None:
        labels = torch.where(_starts(cu_seqlens, labels.shape[1]), IGNORED, labels)
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


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
    """The sum over each run of equal numbers in `run`, [n] -> [count].

    Each run is cut into pieces where a multiple of `_PIECE` lies in it. The pieces are summed as
    rows of a matrix, which PyTorch does pairwise, and then those of each run. So a sum is accurate
    to a few eps and the same every time, and no shape depends on the numbers in `run`.

    Args:
      values: [n] the values.
      run: [n] the run that each value belongs to, rising from 0 to at most `count` - 1.
      count: the number of runs.
    """
    position = torch.arange(len(values), device=values.device)
    many = len(values) // _PIECE + 1  # pieces, if there is one run
    # Piece p of run r is row r + p: along the values one of the two rises and neither falls, so no
    # other piece has that row.
    rows = values.new_zeros((count + many) * _PIECE)
    pieces = rows.index_put((run * _PIECE + position,), values).view(-1, _PIECE).sum(dim=1)
    exists = torch.zeros(count, many, dtype=torch.bool, device=values.device)
    exists = exists.index_put((run, position // _PIECE), exists.new_ones(()))
    return torch.where(exists, pieces.unfold(0, many, 1)[:count], 0).sum(dim=1)


def sum_tokens(
    token_logps: Tensor, lengths: Tensor, *, average: bool, cu_seqlens: Tensor | None
) -> Tensor:
    """Sums over sequences, or averages over `lengths` tokens. 0 for a sequence without tokens."""
    total = sum_sequences(token_logps, cu_seqlens)
    return total / lengths.clamp(min=1) if average else total


def rises(cu_seqlens: Tensor, length: int) -> Tensor:
    """Whether offsets rise from 0 to `length`, as a 0-d tensor."""
    rising = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    return rising & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length)
