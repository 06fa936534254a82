"""The gradients of hidden states, weight and bias, accumulated tile by tile.

The derivative of a token's log-probability with respect to its logits is onehot - p, so a tile
whose tokens have slopes s (the derivatives of the loss with respect to their log-probabilities,
times the head's gain) contributes

    weight gradient += (s * (onehot - p))^T @ states
    hidden gradient  = s * (onehot - p) @ weight
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from spoloss.torch._exponentials import FLOAT16_SCALE
from spoloss.torch._head import Projection
from spoloss.torch._products import accumulate, add_rows, scaled, unit_of
from spoloss.torch._softmax import Block, Softmax
from spoloss.torch._tokens import Tile, Tokens


class Wanted(NamedTuple):
    """Which gradients a call needs."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        """Whether the head's gradient is needed, which uses all exponentials of a tile at once."""
        return self.weight or self.bias


class Gradients:
    """The gradients of a loss, accumulated tile by tile.

    Attributes:
      hidden: the gradient of the hidden states of all sides, one row per token, 0 for tokens that
        do not count; or None.
      head: the gradient of weight and bias.
    """

    def __init__(self, model: Projection, wanted: Wanted, hidden: Tensor | None) -> None:
        """Start without any contribution; `hidden` is zeros, or None if it is not wanted."""
        self.hidden = hidden
        self.head = HeadGradient(model, wanted)
        self._model, self._wanted = model, wanted
        self._spare: list[HeadGradient] = []

    def directions(self, count: int) -> list[HeadGradient]:
        """Empty gradients of the head, one for each side of a long pair.

        If no contribution was added yet, the first of them is `head` itself. The others are
        allocated once, and each call clears them.
        """
        own = [self.head] if self.head.empty else []
        while len(own) + len(self._spare) < count:
            self._spare.append(HeadGradient(self._model, self._wanted))
        for spare in self._spare:
            spare.clear()
        return (own + self._spare)[:count]

    def add_scaled(self, directions: list[HeadGradient], slopes: Tensor) -> None:
        """Add the direction of each side, from `directions`, times the slope of its side."""
        for direction, slope in zip(directions, slopes, strict=True):
            self.head.add_scaled(direction, slope)

    def add(self, tile: Tile, softmax: Softmax, slopes: Tensor, head: HeadGradient) -> None:
        """Add the contribution of one tile.

        Args:
          tile: tokens with their hidden states.
          softmax: the tile's softmax, with the blocks and the product for the wanted gradients.
          slopes: [n] the head's gain times the derivative of the loss with respect to each token's
            log-probability.
          head: where to add the gradient of the head: `self.head` or a direction.
        """
        if self._wanted.head:
            head.add(tile.states, softmax, softmax.blocks, slopes)
        if softmax.product is not None:
            self.write_hidden(tile.tokens, softmax, softmax.product, slopes)

    def write_hidden(
        self, tokens: Tokens, softmax: Softmax, product: Tensor, slopes: Tensor
    ) -> None:
        """Write a tile's rows of the gradient of the hidden states, from `Softmax.product`."""
        if self.hidden is None:
            return
        at_target = self._model.weight[softmax.target] * softmax.complement[:, None]
        rows = (at_target - product).mul_(slopes[:, None])
        if self._model.options.shard is not None:
            # Sum over the ranks before rounding to the dtype of the hidden states.
            self._model.options.shard.sum_(rows)
        self.hidden[tokens.place] = rows.to(self.hidden.dtype)

    def scale_hidden(self, tokens: Tokens, factor: Tensor) -> None:
        """Multiply the rows of some tokens by one factor per token, [n]."""
        if self.hidden is not None:
            rows = self.hidden[tokens.place] * factor[:, None]
            self.hidden[tokens.place] = rows.to(self.hidden.dtype)


class HeadGradient:
    """The gradient of weight and bias, in at least float32.

    Its memory is not set to zero at the start. The blocks of the first tile overwrite it, which
    saves one pass over an array of the weight's size.
    """

    def __init__(self, model: Projection, wanted: Wanted) -> None:
        """Allocate the wanted gradients of weight and bias."""
        bias = model.bias if wanted.bias else None
        self._model = model
        self._weight = torch.empty_like(model.weight, dtype=model.dtype) if wanted.weight else None
        self._bias = None if bias is None else torch.empty_like(bias, dtype=model.dtype)
        self._filled = 0  # the rows of the first so many entries hold a sum

    @property
    def empty(self) -> bool:
        """Whether no contribution was added yet."""
        return self._filled == 0

    def clear(self) -> None:
        """Drop all contributions."""
        self._filled = 0

    def add(
        self, states: Tensor, softmax: Softmax, blocks: Iterable[Block], slopes: Tensor
    ) -> None:
        """Add the contribution of one tile, whose blocks cover all entries, in order."""
        of_others, unit = -slopes / softmax.total, None
        if self._model.factor_dtype == torch.float16:
            unit = unit_of(states, of_others * (1.0 / FLOAT16_SCALE))
            of_others = of_others / unit
        for block in blocks:
            self._add_block(states, block, of_others * (block.shift - softmax.peak).exp(), unit)
        self._add_targets(states, softmax, slopes)  # into rows that the blocks have overwritten

    def _add_block(self, states: Tensor, block: Block, factor: Tensor, unit: Tensor | None) -> None:
        """A block's entries as non-targets: a factor [n] times the exponentials, in some unit."""
        columns, exps, _ = block
        empty = columns.start >= self._filled
        self._filled = max(self._filled, columns.stop)
        factor = factor[:, None]  # it multiplies the small array [n, D], not [n, V]
        if self._weight is not None:
            rows = self._weight[columns]
            more = scaled(states, factor, self._model.device)
            accumulate(rows, exps.t(), more, self._model.device, unit=unit, empty=empty)
        if self._bias is not None:
            rows = self._bias[columns, None]
            accumulate(rows, exps.t(), factor, self._model.device, unit=unit, empty=empty)

    def _add_targets(self, states: Tensor, softmax: Softmax, slopes: Tensor) -> None:
        """The contribution of the targets."""
        factor = slopes * softmax.complement
        if self._weight is not None:
            add_rows(self._weight, softmax.target, states * factor[:, None])
        if self._bias is not None:
            add_rows(self._bias, softmax.target, factor)

    def add_scaled(self, other: HeadGradient, factor: Tensor) -> None:
        """Add another gradient times a factor, without a temporary of its size.

        If `other` is this object, multiply it by the factor.
        """
        if other.empty:
            return
        for total, more in ((self._weight, other._weight), (self._bias, other._bias)):
            if total is None or more is None:
                continue
            if self.empty or self is other:
                torch.mul(more, factor, out=total)
            else:
                total.addcmul_(more, factor)
        self._filled = other._filled

    def weight(self, dtype: torch.dtype) -> Tensor | None:
        """The gradient of the weight in `dtype`: 0 if nothing was added, None if not wanted."""
        return self._finished(self._weight, dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The gradient of the bias in `dtype`: 0 if nothing was added, None if not wanted."""
        return self._finished(self._bias, dtype)

    def _finished(self, total: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if total is None:
            return None
        return (total.zero_() if self.empty else total).to(dtype)


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient from the forward is stored until the backward.

    Training in float16 uses a loss scale, which the backward applies, so that small gradients do
    not vanish. Therefore they must not be rounded to float16 before.
    """
    return torch.float32 if dtype == torch.float16 else dtype
