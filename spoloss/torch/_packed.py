"""Padding-free batches: sequences one after another in one row, parted by their offsets.

`cu_seqlens` [S + 1] are the offsets that FlashAttention's variable-length calls take: sequence i is
what lies from cu_seqlens[i] up to cu_seqlens[i + 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_cu_seqlens(cu_seqlens: Tensor, labels: Tensor) -> None:
    """Refuse offsets that cannot part labels [1, T].

    Raises:
      TypeError: the offsets are not integer.
      ValueError: the labels are more than one row, or a shape, a device or (where they are at hand,
        on the CPU) the offsets themselves do not fit.
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if len(labels) != 1:
        raise ValueError(
            f"cu_seqlens parts one row: labels must have shape [1, T], got {tuple(labels.shape)}"
        )
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must have shape [S + 1] with S >= 1, got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != labels.device:
        raise ValueError(
            f"cu_seqlens must be on the {labels.device} of labels, got {cu_seqlens.device}"
        )
    at_hand = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if at_hand and not _in_order(cu_seqlens, labels.shape[1]):
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {labels.shape[1]}, got {cu_seqlens.tolist()}"
        )


def firsts(cu_seqlens: Tensor, length: int) -> Tensor:
    """Where sequences begin, [1, T]: what no token before them may predict."""
    marks = torch.zeros(length + 1, dtype=torch.bool, device=cu_seqlens.device)
    starts = cu_seqlens[:-1].long().clamp(0, length)
    return marks.index_fill(0, starts, True)[None, :length]


def sum_sequences(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sum over each sequence: [B, T] -> [B], or [1, T] -> [S] where offsets part one row.

    It is nan if the offsets do not rise from 0 to T.
    """
    if cu_seqlens is None:
        return values.sum(dim=1)
    length = values.shape[1]
    positions = torch.arange(length, device=values.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:], positions, right=True)
    sequence = sequence.clamp(max=len(cu_seqlens) - 2)
    sums = values.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence, values[0])
    # On a GPU a check would have to wait for the device; a wrong sum must not pass for a right one.
    return torch.where(_in_order(cu_seqlens, length), sums, math.nan)


def _in_order(cu_seqlens: Tensor, length: int) -> Tensor:
    rising = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    return rising & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length)
