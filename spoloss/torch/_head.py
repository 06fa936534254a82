"""A language-model head: weight [V, D], bias [V], and what follows before the softmax."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spoloss.torch._devices import Device, device_of
from spoloss.torch._exponentials import Transform
from spoloss.torch._plan import Budget
from spoloss.torch._products import product
from spoloss.torch._vocab_parallel import VocabShard

LEAST_COLUMNS = 1024
"""The narrowest block of the vocabulary. Products of narrower blocks are slow."""

ALIGNED = 64
"""The width of a block is a multiple of this, so that rows are aligned on a GPU."""

LEAST_KEPT_ROWS = 256
"""The smallest tile whose blocks are kept, for any vocabulary size."""


@dataclass(frozen=True)
class HeadOptions:
    """How logits are computed from the hidden states h, and how the work is split into tiles.

        logits = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature

    Attributes:
      softcap: None for no soft-capping.
      logit_scale: factor before the soft-capping.
      temperature: divisor after the soft-capping.
      chunk_size: tokens per tile, or None for the device's default.
      dtype: the dtype of the products under autocast, or None for the weight's dtype.
      shard: this rank's part of a head that is split over the vocabulary, or None.
    """

    softcap: float | None
    logit_scale: float
    temperature: float
    chunk_size: int | None
    dtype: torch.dtype | None
    shard: VocabShard | None = None

    def vocabulary(self, weight: Tensor) -> int:
        """V of the whole head. `weight` is this rank's part of it."""
        return len(weight) if self.shard is None else self.shard.vocabulary


@dataclass(frozen=True)
class Head:
    """The head's tensors with its options. V is the number of rows that this rank holds."""

    weight: Tensor
    bias: Tensor | None
    options: HeadOptions
    device: Device

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Head:
        """The head in the dtype of its products."""
        weight = weight if options.dtype is None else weight.to(options.dtype)
        return cls(weight, bias, options, device_of(weight))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits, log-probabilities and sums: at least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of the exponentials in the gradient products."""
        return factor_dtype_of(self.weight.dtype, self.device)

    def products(self, states: Tensor, columns: slice, out: Tensor | None) -> Tensor:
        """H W^T for some columns, [n, C]."""
        return product(states, self.weight[columns].t(), self.dtype, self.device, out)

    def transform(self, columns: slice) -> Transform:
        """How the products of some columns become logits."""
        bias, options = self.bias, self.options
        bias = None if bias is None else bias[columns]
        return Transform(bias, options.softcap, options.logit_scale, options.temperature)

    @property
    def gain(self) -> float:
        """The derivative of the logits by h W^T + b, without the soft-capping's factor."""
        return self.options.logit_scale / self.options.temperature

    def bend_at(self, target_logit: Tensor) -> Tensor:
        """The soft-capping's derivative at known logits. It is 1 without soft-capping.

        It is 0 at a logit of -inf, of an entry that a bias forbids.
        """
        if self.options.softcap is None:
            return torch.ones_like(target_logit)
        capped = target_logit * (self.options.temperature / self.options.softcap)
        return (1.0 - capped * capped).clamp(min=0.0)

    def local(self, targets: Tensor) -> Tensor:
        """Targets as rows of this rank's weight, out of range if another rank has the row."""
        shard = self.options.shard
        return targets if shard is None else targets - shard.start

    def blocks(self, rows: int) -> Iterator[slice]:
        """The vocabulary in blocks of about equal size, for a tile of `rows` tokens.

        With a width of 30,413, rows would start at odd addresses, which is slow on a GPU. So widths
        are multiples of ALIGNED, and the remainder of the vocabulary is a block of its own.
        """
        vocabulary = len(self.weight)
        aligned = vocabulary - vocabulary % ALIGNED
        widest = max(LEAST_COLUMNS, self._fitting // max(1, rows)) // ALIGNED * ALIGNED
        count = max(1, math.ceil(aligned / widest))
        even = ALIGNED * max(1, math.ceil(aligned / ALIGNED / count))
        edges = dict.fromkeys((*range(0, aligned, even), aligned, vocabulary))
        for start, stop in itertools.pairwise(edges):
            yield slice(start, stop)

    def largest_block(self, rows: int) -> int:
        """An upper bound of the logits of one block, for any tile of at most `rows` tokens.

        A shorter tile has wider blocks, which may hold more logits than those of the tallest tile.
        """
        return min(rows * len(self.weight), max(self._fitting, rows * LEAST_COLUMNS))

    @property
    def _fitting(self) -> int:
        """The logits that fit in `block_bytes`."""
        return self.device.block_bytes // self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Tokens per tile if its blocks are not kept."""
        shard = self.options.shard
        return self.options.chunk_size or (self.device.rows if shard is None else shard.rows)

    def budget(self, *, keep: bool) -> Budget:
        """The largest number of tokens per tile.

        Args:
          keep: whether the tile's exponentials are kept, for the weight's gradient.
        """
        if not keep or self.options.chunk_size is not None:
            return Budget(self.rows, self.rows, self.rows)
        itemsize, shard = self.factor_dtype.itemsize, self.options.shard
        # All ranks of a split head must use the same tiles, so they agree on the smallest size.
        numbers = self.device.kept_bytes // itemsize if shard is None else shard.kept_numbers
        widest = len(self.weight) if shard is None else shard.largest
        kept = max(LEAST_KEPT_ROWS, numbers // max(1, widest))
        # One pair may use as much memory as the float32 scratch [V, D] of a longer pair.
        scratch = self.weight.shape[1] * self.dtype.itemsize // itemsize
        if shard is not None:
            scratch = self.weight.shape[1]
        return Budget(shared=kept // 2, single=max(kept, scratch), part=kept)


def factor_dtype_of(dtype: torch.dtype, device: Device) -> torch.dtype:
    """The dtype of exponentials for a head with products in `dtype`."""
    return dtype if device.wide_sums else torch.promote_types(dtype, torch.float32)
