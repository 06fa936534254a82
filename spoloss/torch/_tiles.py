"""Rows of hidden states against the vocabulary: log-probabilities and gradients, never the logits.

A tile is n tokens against all V words, visited in blocks [n, C] of the vocabulary. Each block is
filled with logits and turned in place into exponentials, from which sums and hidden gradients grow
(an online softmax: what was summed is rescaled when a larger logit comes). Of the n x V numbers
only the gradient of the weight needs more than one block at a time.

With y the target, rest = log sum of exp(z_v) over all other words v, and lse = log sum over all:

    log p       = -log(1 + exp(rest - z_y))
    p_v - [v=y] =  exp(z_v - lse)  for v != y,   -(1 - p) = -sigmoid(rest - z_y)  for y

The target stays out of the sums, so that 1 - p is never a difference of two numbers near 1.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spoloss.torch._device import accumulate, add_rows, device_of, product
from spoloss.torch._head import HeadOptions

_LEAST_COLUMNS = 1024
_ALIGNED = 64
_LEAST_KEPT_ROWS = 256


class Block(NamedTuple):
    """Some columns of a tile: exp(logits - shift), 0 at the targets, times softcap's derivative."""

    columns: slice
    exps: Tensor
    shift: Tensor


class Head:
    """weight [V, D], bias [V] and the options of the model. A split head's V is its shard's."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> None:
        self.weight = weight if options.dtype is None else weight.to(options.dtype)
        self.bias = bias
        self.device = device_of(self.weight)
        self.softcap = options.softcap
        self.logit_scale = options.logit_scale
        self.temperature = options.temperature
        self.shard = options.shard
        self.chunk_size = options.chunk_size
        self._room = self.weight.new_empty(0, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, log-probabilities and sums: at least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def exps_dtype(self) -> torch.dtype:
        """Of what the gradient products take: that of the weight where their sums are wider."""
        return self.weight.dtype if self.device.wide_sums else self.dtype

    @property
    def in_place(self) -> bool:
        """Whether exponentials take the place of their logits."""
        return not (torch.compiler.is_compiling() or self.device.compiles)

    @property
    def gain(self) -> float:
        """Derivative of the logits by h W^T + b, without the factor of softcap."""
        return self.logit_scale / self.temperature

    @property
    def rows(self) -> int:
        """The height of a tile whose blocks are dropped one by one."""
        return self.chunk_size or self.device.rows

    @property
    def kept_rows(self) -> int:
        """The height of a tile that is kept whole, for the gradient of the weight."""
        # Shards of any size must cut the same tiles, or they wait for one another.
        widest = len(self.weight) if self.shard is None else self.shard.largest
        fitting = self.device.kept_bytes // max(1, widest * self.exps_dtype.itemsize)
        return self.chunk_size or max(_LEAST_KEPT_ROWS, fitting)

    @property
    def grouped_rows(self) -> int:
        """The same for short pairs that share a tile, which no scratch would replace."""
        return self.chunk_size or self.kept_rows // 2

    @property
    def most_kept_rows(self) -> int:
        """The same for one pair: up to the memory of the scratch that it does without."""
        scratch = self.weight.shape[1] * self.dtype.itemsize // self.exps_dtype.itemsize
        return self.chunk_size or max(self.kept_rows, scratch)

    def blocks(self, rows: int) -> Iterator[slice]:
        """The vocabulary in blocks of about one size, for a tile of so many rows.

        They are a multiple of 64 wide, and what is left over is a block by itself: a width of
        30,413 would put rows at odd addresses, where a GPU's products and passes are slow.
        """
        vocabulary = len(self.weight)
        if torch.compiler.is_compiling():
            yield slice(0, vocabulary)
            return
        aligned = vocabulary - vocabulary % _ALIGNED
        fitting = self.device.block_bytes // max(1, rows * self.dtype.itemsize)
        widest = max(_LEAST_COLUMNS, fitting) // _ALIGNED * _ALIGNED
        count = max(1, math.ceil(aligned / widest))
        even = _ALIGNED * max(1, math.ceil(aligned / _ALIGNED / count))
        edges = dict.fromkeys((*range(0, aligned, even), aligned, vocabulary))
        for start, stop in itertools.pairwise(edges):
            yield slice(start, stop)

    def reserve(self, rows: int) -> None:
        """Make room at the start for the tallest kept tile of so many rows in all.

        Room that grew with the tiles would leave an allocator with holes of many sizes.
        """
        if self.in_place:
            self.room(min(rows, self.kept_rows) * len(self.weight))

    def room(self, size: int) -> Tensor | None:
        """Memory for so many logits, the same at each call; None where a product brings its own."""
        if torch.compiler.is_compiling() or self.weight.dtype != self.dtype:
            return None
        if self._room.numel() < size:
            self._room = self._room.new_empty(0)  # the old one goes before the new one comes
            self._room = self._room.new_empty(size)
        return self._room

    def logits(
        self, hidden: Tensor, columns: slice, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Some columns of the logits, and softcap's derivative 1 - tanh^2 where there is one."""
        logits = product(hidden, self.weight[columns].t(), self.dtype, self.device, out)
        if self.bias is not None:
            logits.add_(self.bias[columns])
        if self.softcap is None:
            return (logits if self.gain == 1.0 else logits.mul_(self.gain)), None
        logits.mul_(self.logit_scale / self.softcap).tanh_()
        bend = 1.0 - logits * logits
        return logits.mul_(self.softcap / self.temperature), bend

    def complete(self, *grad_hidden: Tensor | None) -> None:
        """Add to gradients by hidden states what the other shards of the head contribute."""
        if self.shard is not None:
            self.shard.sum_(*grad_hidden)


class Tile:
    """n tokens against the vocabulary.

    Attributes:
      states: [n, D].
      logps: [n] log-probabilities of the targets, once settled or known.
      lse: [n] the log-sum-exp of all logits, likewise.
    """

    def __init__(self, head: Head, states: Tensor, targets: Tensor, wanted: slice | None) -> None:
        """A tile of which nothing is known yet.

        Args:
          head: the head.
          states: [n, D].
          targets: [n], in [0, V) of the whole head.
          wanted: the rows whose derivative by the hidden states is wanted; None for none.
        """
        self.head, self.states, self._wanted = head, states, wanted
        self._targets = targets if head.shard is None else targets - head.shard.start
        self._shift = states.new_full(targets.shape, torch.finfo(head.dtype).min, dtype=head.dtype)
        self._others = torch.zeros_like(self._shift)
        self._target = torch.full_like(self._shift, -math.inf)
        self._back = None if wanted is None else torch.zeros_like(states[wanted], dtype=head.dtype)

    def know(self, logps: Tensor, lse: Tensor) -> None:
        """Take over what an earlier sweep found, so that each block can be used at once."""
        self.logps, self.lse, self._doubt = logps, lse, -torch.expm1(logps)
        self._shift = lse

    def sweep(self, *, keep: bool) -> list[Block]:
        """Visit the vocabulary and settle; the blocks are returned if they are kept."""
        blocks = []
        for block in self.blocks(keep=keep):
            if keep:
                blocks.append(block)
        shift, others, target = self._shift, self._others, self._target
        if self.head.shard is not None:
            shift, others, target = self.head.shard.join_sums(shift, others, target)
        rest = shift + others.log()
        self.logps = F.logsigmoid(target - rest)
        self.lse = torch.logaddexp(target, rest)
        self._doubt = torch.sigmoid(rest - target)
        return blocks

    def blocks(self, *, keep: bool = False) -> Iterator[Block]:
        """Visit the vocabulary. A block that is not to be kept lasts until the next one comes."""
        n = len(self.states)
        for columns in self.head.blocks(n):
            size = n * (columns.stop - columns.start)
            whole = keep and self.head.in_place
            room = self.head.room(n * len(self.head.weight) if whole else size)
            start = n * columns.start if whole else 0
            out = None if room is None else room[start : start + size].view(n, -1)
            exps, bend = self._exponentials(columns, out)
            if bend is not None:
                exps = exps.mul_(bend)
            if self._back is not None:
                words = self.head.weight[columns]
                accumulate(self._back, exps[self._wanted], words, self.head.device)
            yield Block(columns, exps, self._shift)

    def hidden_grad(self, factor: Tensor) -> Tensor:
        """(softmax - onehot) @ weight, times a factor of each row, for the wanted rows; once."""
        wanted = self._wanted
        assert self._back is not None
        assert wanted is not None
        column, share = self.target_share()
        of_blocks = factor * (self._shift - self.lse).exp()
        of_target = self.head.weight[column[wanted]] * (factor * share)[wanted, None]
        return self._back.mul_(of_blocks[wanted, None]).sub_(of_target)

    def target_share(self) -> tuple[Tensor, Tensor]:
        """The targets' columns and what -(softmax - onehot) is there; 0 where not in this shard."""
        here = (self._targets >= 0) & (self._targets < len(self.head.weight))
        share = self._doubt
        if self.head.softcap is not None:
            bent = self._target * (self.head.temperature / self.head.softcap)
            share = share * (1.0 - bent * bent)
        return torch.where(here, self._targets, 0), torch.where(here, share, 0.0)

    def _exponentials(self, columns: slice, out: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The exponentials of a block, and softcap's derivative; what is summed grows by them."""
        logits, bend = self.head.logits(self.states, columns, out)
        column = self._targets - columns.start
        here = (column >= 0) & (column < logits.shape[1])
        at_target = logits.gather(1, torch.where(here, column, 0)[:, None]).squeeze(1)
        self._target = torch.where(here, at_target, self._target)
        sums = (torch.where(here, column, -1), self._shift, self._others)
        if self.head.in_place:
            exps, shift, others = exponentials_(logits, *sums)
            exps = exps.to(self.head.exps_dtype)
        else:
            aligned = logits.shape[1] % _ALIGNED == 0
            fused = _compiled() if aligned and not torch.compiler.is_compiling() else exponentials
            exps, shift, others = fused(logits, *sums, self._target, self.head.exps_dtype)
        if self._back is not None:
            self._back.mul_((self._shift - shift).exp()[self._wanted, None])
        self._shift, self._others = shift, others
        return exps, bend


class HeadGrad:
    """The gradient of a head, gathered over tiles in at least float32.

    An empty one holds memory that the first tile writes over, for zeros would be one pass more.
    """

    def __init__(self, head: Head, *, weight: bool, bias: bool) -> None:
        self.head = head
        self.empty = True
        self.weight = torch.empty_like(head.weight, dtype=head.dtype) if weight else None
        self.bias = (
            torch.empty_like(head.bias, dtype=head.dtype)
            if bias and head.bias is not None
            else None
        )

    def add(self, tile: Tile, blocks: Iterable[Block], factor: Tensor) -> None:
        """Add (factor of each row * (softmax - onehot))^T @ hidden, without the head's gain."""
        device, empty = self.head.device, self.empty
        for columns, exps, shift in blocks:
            # The factor goes where the array is small: on n x D, not on n x V.
            of_row = (factor * (shift - tile.lse).exp())[:, None]
            if self.weight is not None:
                rows = tile.states * of_row
                accumulate(self.weight[columns], exps.t(), rows, device, empty=empty)
            if self.bias is not None:
                accumulate(self.bias[columns, None], exps.t(), of_row, device, empty=empty)
        column, share = tile.target_share()
        of_target = -factor * share
        if self.weight is not None:
            add_rows(self.weight, column, tile.states * of_target[:, None])
        if self.bias is not None:
            add_rows(self.bias, column, of_target)
        self.empty = False

    def scale(self, factor: Tensor) -> None:
        """Multiply by a 0-d factor."""
        for grad in (self.weight, self.bias):
            if grad is not None:
                grad.mul_(factor)

    def add_scaled(self, other: HeadGrad, factor: Tensor) -> None:
        """Add another gradient times a 0-d factor, without a temporary of its size."""
        if other.empty:
            return
        for total, more in ((self.weight, other.weight), (self.bias, other.bias)):
            if total is None or more is None:
                continue
            if self.empty:
                torch.mul(more, factor, out=total)
            else:
                total.addcmul_(more, factor)
        self.empty = False

    def to(
        self, weight: torch.dtype, bias: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The two gradients in these dtypes."""
        for grad in (self.weight, self.bias):
            if grad is not None and self.empty:
                grad.zero_()
        return (
            None if self.weight is None else self.weight.to(weight),
            None if self.bias is None else self.bias.to(bias),
        )


def exponentials(
    logits: Tensor,
    target: Tensor,
    shift: Tensor,
    others: Tensor,
    at_target: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block of the online softmax, for a compiler to fuse.

    The shift is the log-sum-exp of all that was seen, so that half precision holds the
    exponentials. In float16, which ends at 6e-8, they are 2**14 times as large.

    Args:
      logits: [n, C].
      target: [n] the target's column, -1 where it is not in this block.
      shift: [n] what was subtracted so far.
      others: [n] the sum of exp(logit - shift) so far, without the target.
      at_target: [n] the target's logit, -inf where it was not seen yet.
      dtype: of the exponentials.

    Returns:
      exp(logits - shift) [n, C] with 0 at the target, and the new shift and others.
    """
    peak = torch.maximum(shift, logits.amax(dim=1))
    is_target = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    exps = torch.where(is_target, 0.0, (logits - peak[:, None]).exp())
    others = others * (shift - peak).exp() + exps.sum(dim=1)
    # The largest term is 1; it is less only if all logits are -inf or the shift was given.
    total = (others + (at_target - peak).exp()).clamp(min=1.0)
    if dtype == torch.float16:
        total = total * 2.0**-14
    return (exps / total[:, None]).to(dtype), peak + total.log(), others / total


def exponentials_(
    logits: Tensor, target: Tensor, shift: Tensor, others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in place; the shift is the largest logit, which spares a pass."""
    peak = torch.maximum(shift, logits.amax(dim=1))
    exps = logits.sub_(peak[:, None]).exp_()
    column = target.clamp(min=0)[:, None]
    exps.scatter_(1, column, torch.where(target[:, None] >= 0, 0.0, exps.gather(1, column)))
    return exps, peak, others * (shift - peak).exp() + exps.sum(dim=1)


def _aligned_exponentials(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    # A compiler that knows this reads and writes 16 bytes at once, where it would 4 and 2. It asks
    # for multiples of 16, and does not conclude them from 64.
    torch._check(logits.shape[1] % 16 == 0)  # type: ignore[no-untyped-call]
    return exponentials(logits, *others)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_aligned_exponentials, dynamic=True)
