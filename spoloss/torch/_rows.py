"""Which tokens of a batch take part, and in which sequence: ignored labels, shift, offsets.

Sequences are the rows of labels [B, T], or lie one after another in one row, without padding, and
are parted by `cu_seqlens` [S + 1], the offsets that FlashAttention's variable-length calls take:
sequence i is what lies from cu_seqlens[i] up to cu_seqlens[i + 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def check_labels(name: str, labels: Tensor, other: str, states: Tensor) -> None:
    """Refuse labels that are not integers of shape [B, T], as the first two axes of `states`.

    Raises:
      TypeError: the labels are not integer.
      ValueError: the shape or the device does not fit.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integer, got {labels.dtype}")
    if labels.shape != states.shape[:2]:
        raise ValueError(
            f"{name} must have the shape [B, T] = {tuple(states.shape[:2])} of {other}, "
            f"got {tuple(labels.shape)}"
        )
    if labels.device != states.device:
        raise ValueError(f"{name} must be on the {states.device} of {other}, got {labels.device}")


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


@dataclass(frozen=True)
class Rows:
    """The tokens of [B, T] that take part, flattened, in order of their sequence.

    Attributes:
      targets: [n] the label of each.
      index: [n] its row among B * T.
      sequence: [n] its row of [B, T].
      counts: [n] whether it counts or only keeps the shapes static; None where all count.
      ends: B + 1 numbers from 0: where each row of [B, T] ends among the n.
      lengths: how many tokens of each sequence count: [B], or [S] where offsets part one row.
    """

    targets: Tensor
    index: Tensor
    sequence: Tensor
    counts: Tensor | None
    ends: list[int]
    lengths: Tensor

    def take(self, hidden: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """The rows of `hidden` [B * T, D] that a slice of the n names."""
        taken = hidden[self.index[rows]].to(dtype)
        # A row that does not count may hold nan, and 0 * nan is not 0.
        return taken if self.counts is None else torch.where(self.counts[rows, None], taken, 0.0)

    def mask(self, values: Tensor, rows: slice) -> Tensor:
        """`values` [n], 0 where the row does not count."""
        return values if self.counts is None else torch.where(self.counts[rows], values, 0.0)

    def slices(self, first: int, last: int, height: int) -> Iterator[slice]:
        """The rows of sequences first to last - 1, in slices of one size of at most `height`."""
        count = self.ends[last] - self.ends[first]
        even = math.ceil(count / max(1, math.ceil(count / height)))
        for start in range(self.ends[first], self.ends[last], max(1, even)):
            yield slice(start, min(start + even, self.ends[last]))


def shifted(
    labels: Tensor, ignore_index: int, *, shift: bool, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Targets [B, T], 0 where nothing is to be predicted, and where something is.

    The labels move and not the logits or hidden states, whose slice can't be flattened for free.
    """
    if shift:
        if cu_seqlens is not None:
            labels = torch.where(firsts(cu_seqlens, labels.shape[1]), ignore_index, labels)
        nothing = torch.full_like(labels[:, :1], ignore_index)
        labels = torch.cat([labels[:, 1:], nothing], dim=1)
    counts = labels != ignore_index
    return torch.where(counts, labels, 0).long(), counts


def select_rows(
    labels: dict[str, Tensor],
    *,
    vocabulary: int,
    ignore_index: int,
    shift: bool,
    cu_seqlens: Tensor | None = None,
) -> list[Rows]:
    """The rows to work on for each of some labels (name -> [B, T]).

    Rows that do not count are dropped: they cost nothing. That needs their number on the host, the
    one wait for the device in a call; a compiler can't wait, so it keeps all rows and masks.

    Raises:
      ValueError: a label that counts is outside [0, vocabulary); a compiler can't see it.
    """
    sides = [
        shifted(side, ignore_index, shift=shift, cu_seqlens=cu_seqlens) for side in labels.values()
    ]
    lengths = [sum_sequences(counts, cu_seqlens) for _, counts in sides]
    if torch.compiler.is_compiling():
        return [_all_rows(*side, n) for side, n in zip(sides, lengths, strict=True)]
    outside = [((targets < 0) | (targets >= vocabulary)).any() for targets, _ in sides]
    on_host = torch.cat([*(counts.flatten() for _, counts in sides), torch.stack(outside)]).cpu()
    *kept, wrong = torch.split(on_host, [*(counts.numel() for _, counts in sides), len(sides)])
    for name, is_wrong in zip(labels, wrong.tolist(), strict=True):
        if is_wrong:
            raise ValueError(
                f"{name} must be in [0, V = {vocabulary}) or ignore_index = {ignore_index}, "
                f"got a label outside"
            )
    return [
        _some_rows(targets, mine, n)
        for (targets, _), mine, n in zip(sides, kept, lengths, strict=True)
    ]


def _all_rows(targets: Tensor, counts: Tensor, lengths: Tensor) -> Rows:
    b, t = targets.shape
    index = torch.arange(b * t, device=targets.device)
    ends = [i * t for i in range(b + 1)]
    return Rows(targets.flatten(), index, index // max(t, 1), counts.flatten(), ends, lengths)


def _some_rows(targets: Tensor, counts_on_host: Tensor, lengths: Tensor) -> Rows:
    b, t = targets.shape
    index = counts_on_host.nonzero().squeeze(1).to(targets.device, non_blocking=True)
    ends = [0, *counts_on_host.view(b, t).sum(1).cumsum(0).tolist()]
    return Rows(targets.flatten()[index], index, index // max(t, 1), None, ends, lengths)


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
    if values.dtype == torch.bool:
        values = values.long()
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
