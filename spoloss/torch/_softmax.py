"""The softmax of a tile of tokens: log-probabilities and exponentials, block by block.

A block is some columns [n, C] of the tile's logits. An online softmax visits the blocks in turn. It
computes the logits of a block and their exponentials, and rescales the earlier sums when a larger
logit appears. With y the target, z the logits, m the largest of them, and

    others = sum_{v != y} exp(z_v - m),    gap = m - z_y,    total = others + exp(-gap):

    -log p      = log(1 + others * exp(gap)) = gap + log1p(others + expm1(-gap))
    p_v - [v=y] = exp(z_v - m) / total   for v != y,     -(1 - p) = -others / total   for v = y

`others` excludes the target, so -log p and 1 - p are never the difference of two numbers near 1. m
is subtracted before anything is rounded, so a common offset of the logits costs no digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spoloss.torch._exponentials import Products, Sums, exponentials_of, sums_of
from spoloss.torch._head import Projection
from spoloss.torch._products import accumulate
from spoloss.torch._tokens import Tile


class Block(NamedTuple):
    """Some columns of a tile: exp(logits - shift) times softcap's derivative, 0 at the targets."""

    columns: slice
    exps: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Softmax:
    """The parts of the softmax of a tile of n tokens that the gradients need.

    The exponentials are stored in the workspace, so they are valid until the workspace is used
    again.

    Attributes:
      logps: [n] log-probabilities of the targets.
      peak: [n] the largest logit of the whole vocabulary.
      total: [n] the sum of exp(logit - peak) over the whole vocabulary.
      complement: [n] 1 - p of the target, times softcap's derivative there; 0 if another rank has
        the target.
      target: [n] the target's row of this rank's weight, 0 if another rank has it.
      product: [n, D] sum of p_v * weight[v] over the other entries, or None if it was not computed.
      blocks: the exponentials of the whole vocabulary if they were kept, else empty.
    """

    logps: Tensor
    peak: Tensor
    total: Tensor
    complement: Tensor
    target: Tensor
    product: Tensor | None = None
    blocks: tuple[Block, ...] = ()

    def share(self, shift: Tensor) -> Tensor:
        """[n] the factor that turns exp(logit - shift) into a probability."""
        return (shift - self.peak).exp() / self.total


class Workspace:
    """Memory for the logits of one tile, reused for each tile.

    If each tile allocated its own memory, page faults would cost a few percent of the time on a
    CPU.
    """

    def __init__(self, head: Projection, rows: int, *, keep: bool) -> None:
        """Allocate memory for tiles of at most `rows` tokens: all their blocks, or one block."""
        self._keep = keep and not head.device.compiles
        # A half-precision product cannot be written to float32 memory.
        self._memory = None
        if head.weight.dtype == head.dtype:
            logits = rows * len(head.weight) if self._keep else head.tiles.largest_block(rows)
            self._memory = head.weight.new_empty(logits)

    def block(self, n: int, columns: slice) -> Tensor | None:
        """Memory for one block [n, C], or None if the product allocates its own."""
        if self._memory is None:
            return None
        width = columns.stop - columns.start
        start = n * columns.start if self._keep else 0
        return self._memory[start : start + n * width].view(n, width)


def softmax_of(
    head: Projection, tile: Tile, workspace: Workspace, *, keep: bool, product: bool
) -> Softmax:
    """The softmax of a tile, with hidden states in the dtype of the head's products.

    With `keep`, it has the exponentials of all blocks, for the weight's gradient; with `product`,
    `Softmax.product`, for the gradient of the hidden states.
    """
    blocks: list[Block] = []
    sums = Sums.start(tile.states, head.dtype)
    shift = sums.peak
    total = torch.empty_like(tile.states, dtype=head.dtype) if product else None
    if keep or product:
        for block, so_far in _visit(head, tile, sums, total, workspace):
            sums, shift = so_far, block.shift
            if keep:
                blocks.append(block)
    else:
        sums = _sums(head, tile, sums, workspace)
    if head.options.shard is not None:
        sums = sums.joined(head.options.shard)
    local, whole = head.local(tile.tokens.target), sums.total()
    softmax = Softmax(
        sums.logps(),
        sums.peak,
        whole,
        head.held(head.bent(sums.others / whole, sums.target), local),
        head.held(local, local),
        total,
        tuple(blocks),
    )
    if total is not None:
        total.mul_(softmax.share(shift)[:, None])
    return softmax


def known_softmax(
    head: Projection, tile: Tile, logps: Tensor, peak: Tensor, total: Tensor
) -> Softmax:
    """The softmax of a tile from the results of `softmax_of`, without product and blocks."""
    local, target = head.local(tile.tokens.target), peak + (logps + total.log())
    complement = head.held(head.bent(-torch.expm1(logps), target), local)
    return Softmax(logps, peak, total, complement, head.held(local, local))


def known_blocks(
    head: Projection, tile: Tile, softmax: Softmax, product: Tensor | None, workspace: Workspace
) -> Iterator[Block]:
    """The blocks of a tile whose softmax is known, one at a time, each valid until the next.

    The iteration puts `Softmax.product` in `product`, unless that is None.
    """
    sums = Sums.known(softmax.peak)
    shift = sums.peak
    for block, _ in _visit(head, tile, sums, product, workspace):
        shift = block.shift
        yield block
    if product is not None:
        product.mul_(softmax.share(shift)[:, None])


def _visit(
    head: Projection, tile: Tile, sums: Sums, product: Tensor | None, workspace: Workspace
) -> Iterator[tuple[Block, Sums]]:
    """The blocks of a tile in turn, each with the sums that include it.

    Unless `product` is None, it becomes the sum [n, D] of exps @ weight over the blocks so far,
    relative to the last block's shift. Unless the workspace keeps all blocks, a block is valid
    until the next.
    """
    compiles = head.device.compiles
    for columns in head.tiles.blocks(len(tile.states)):
        products = _products(head, tile, columns, workspace)
        found = exponentials_of(products, sums, head.factor_dtype, compiles=compiles)
        del products  # else they would still live while the next ones are made
        if product is not None:
            empty = columns.start == 0
            if not empty:
                product.mul_(found.earlier[:, None])
            accumulate(product, found.exps, head.weight[columns], head.device, empty=empty)
        sums = found.sums
        yield Block(columns, found.exps, found.shift), sums


def _sums(head: Projection, tile: Tile, sums: Sums, workspace: Workspace) -> Sums:
    """The sums over all blocks of a tile, where nothing needs the exponentials."""
    for columns in head.tiles.blocks(len(tile.states), sums=True):
        products = _products(head, tile, columns, workspace)
        sums = sums_of(products, sums, compiles=head.device.compiles)
        del products
    return sums


def _products(head: Projection, tile: Tile, columns: slice, workspace: Workspace) -> Products:
    """Some columns of a tile, before they become logits."""
    values = head.products(tile.states, columns, workspace.block(len(tile.states), columns))
    target = head.local(tile.tokens.target)
    return Products(values, head.transform(columns), target, columns.stop)
