"""The tensors of a language-model head, and the logits that they give."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spoloss.torch._devices import Device, device_of
from spoloss.torch._exponentials import Transform
from spoloss.torch._products import product
from spoloss.torch._tiles import Tiles
from spoloss.torch._vocab_parallel import VocabShard


@dataclass(frozen=True)
class HeadOptions:
    """The options of a `Head` after the checks, and what the call adds to them.

    Attributes:
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
class Projection:
    """A head's tensors in the dtype of its products, V rows of them on this rank."""

    weight: Tensor
    bias: Tensor | None
    options: HeadOptions
    device: Device

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Projection:
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
        return self.device.factor_dtype(self.weight.dtype)

    @property
    def gain(self) -> float:
        """The derivative of the logits with respect to h W^T + b, without the soft-capping's."""
        return self.options.logit_scale / self.options.temperature

    @property
    def tiles(self) -> Tiles:
        """The sizes of tiles and blocks. All ranks of a split head use tiles of one height."""
        found = tiles_of(self.weight, self.weight.dtype, self.options.chunk_size, self.device)
        shard = self.options.shard
        return found if shard is None else replace(found, heights=shard.heights)

    def products(self, states: Tensor, columns: slice, out: Tensor | None) -> Tensor:
        """H W^T for some columns, [n, C]."""
        return product(states, self.weight[columns].t(), self.dtype, self.device, out)

    def transform(self, columns: slice) -> Transform:
        """How the products of some columns become logits."""
        bias, options = self.bias, self.options
        bias = None if bias is None else bias[columns]
        return Transform(bias, options.softcap, options.logit_scale, options.temperature)

    def bent(self, values: Tensor, logits: Tensor) -> Tensor:
        """Values times the soft-capping's derivative at known logits.

        It is 0 at a logit of -inf, of an entry that a bias forbids.
        """
        if self.options.softcap is None:
            return values
        capped = logits * (self.options.temperature / self.options.softcap)
        return values * (1.0 - capped * capped).clamp(min=0.0)

    def local(self, targets: Tensor) -> Tensor:
        """Targets as rows of this rank's weight, out of range if another rank has the row."""
        shard = self.options.shard
        return targets if shard is None else targets - shard.start

    def held(self, values: Tensor, local: Tensor) -> Tensor:
        """Values of targets, 0 where another rank has the target's row."""
        if self.options.shard is None:
            return values
        return torch.where((local >= 0) & (local < len(self.weight)), values, 0)


def tiles_of(weight: Tensor, dtype: torch.dtype, chunk_size: int | None, device: Device) -> Tiles:
    """The sizes of tiles and blocks for a weight [V, D] with products in `dtype`."""
    return Tiles.of(
        device.memory,
        *weight.shape,
        logits_bytes=torch.promote_types(dtype, torch.float32).itemsize,
        kept_bytes=device.factor_dtype(dtype).itemsize,
        chunk_size=chunk_size,
    )
