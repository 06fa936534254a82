"""Log-probabilities of sequences under a language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TILE_BYTES = 64 * 2**20
"""Memory of one tile of float32 (or float64) log-probabilities; a tile holds whole rows of V."""


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    average: bool = False,
) -> Tensor:
    """The log-probability of each labelled sequence: sum over tokens of log softmax(logits)[label].

    Half-precision logits are summed in float32 without a float32 copy of [B, T, V]: rows of the
    vocabulary pass through a tile of at most 64 MiB, forwards and again backwards, and nothing of
    that size is kept in between. Differentiable any number of times.

    Args:
      logits: the model's output, shape [B, T, V], real floating.
      labels: token ids, shape [B, T], integer. Those equal to `ignore_index` (prompt, padding) do
        not count; others outside [0, V) are an indexing error.
      ignore_index: the label to leave out.
      shift: position t predicts label t + 1, as Transformers lays them out. False: the caller has
        shifted already, and position t predicts label t.
      average: divide each sum by the number of labels that count.

    Returns:
      Log-probabilities in nats, shape [B]; float32, or float64 if the logits are. A row without
      a label that counts is 0, and its gradient too.

    Raises:
      TypeError: logits are not real floating, or labels not integer.
      ValueError: a shape does not fit.
    """
    _check_logits(logits, labels)
    if shift:
        # The labels move and not the logits: a slice of [B, T, V] could not be flattened for free.
        nothing = torch.full_like(labels[:, :1], ignore_index)
        labels = torch.cat([labels[:, 1:], nothing], dim=1)
    counts = labels != ignore_index
    targets = torch.where(counts, labels, 0).long()
    token_logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, 1), targets.flatten(), counts.flatten()
    )
    total = token_logps.view(labels.shape).sum(dim=1)
    return total / counts.sum(dim=1).clamp(min=1) if average else total


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be real floating, got {logits.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer, got {labels.dtype}")
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape [B, T, V], got {tuple(logits.shape)}")
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels must have the logits' shape [B, T] = {tuple(logits.shape[:2])}, "
            f"got {tuple(labels.shape)}"
        )


class _TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target] of each row of [N, V], 0 where it does not count.

    A function of its own because autograd would keep every tile's float32 softmax until backward:
    together, the copy that the tiles avoid. This one keeps the logits alone and works again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
        logps = [
            tile.log_softmax(dim=1).gather(1, targets[rows, None]).squeeze(1)
            for rows, tile in _tiles(logits)
        ]
        return torch.where(counts, torch.cat(logps), 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, counts = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows, tile in _tiles(logits):
            upstream = grad_logps[rows, None]
            # d logp / d logits = onehot(target) - softmax, in the tile's dtype until complete:
            # in bfloat16 a target of probability 0.999 would cancel to 0.
            product = tile.softmax(dim=1) * -upstream
            product.scatter_add_(1, targets[rows, None], upstream)
            # A row that does not count may hold nan (padding), and 0 * nan is not 0.
            grad_logits[rows] = torch.where(counts[rows, None], product, 0.0).to(logits.dtype)
        return grad_logits, None, None


def _tiles(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of [N, V] in tiles of at most TILE_BYTES, in at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    n, v = logits.shape
    height = max(1, TILE_BYTES // (v * dtype.itemsize))
    for start in range(0, max(n, 1), height):
        rows = slice(start, start + height)
        yield rows, logits[rows].to(dtype)
