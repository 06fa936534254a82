"""Log-probabilities of sequences under a language model, from its logits or its hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from spoloss.torch._autograd import is_batched, refuse_batched
from spoloss.torch._checks import Side, check_floating, head_options
from spoloss.torch._labels import (
    IGNORED,
    check_cu_seqlens,
    check_labels,
    sum_sequences,
    sum_tokens,
    targets_of,
)
from spoloss.torch._recompute import token_logps
from spoloss.torch._tokens import Sequences

TILE_BYTES = 64 * 2**20
"""Memory of one tile of float32 (or float64) log-probabilities. A tile has whole rows of V."""


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    average: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The log-probability of each sequence: the sum over its tokens of log softmax(logits)[label].

    Half-precision logits are summed in float32 without a float32 copy of [B, T, V]. The forward
    converts the rows in tiles of at most 64 MiB, and the backward does so again. You can
    differentiate in reverse mode any number of times. Forward mode is not supported.

    Args:
      logits: the model's output, shape [B, T, V], real floating.
      labels: token ids, shape [B, T], integer. Labels equal to `ignore_index` (prompt, padding) do
        not count. Other labels outside [0, V) raise an indexing error.
      ignore_index: the label that does not count.
      shift: True if position t predicts label t + 1, as in the batches of Transformers. False if
        you have shifted already, so position t predicts label t.
      average: divide each sum by the number of labels that count.
      cu_seqlens: offsets of S sequences that are packed into one row (B = 1) without padding, shape
        [S + 1], int32 or int64, rising from 0 to T. This is the format of FlashAttention's
        variable-length functions. The last token of a sequence does not predict the next sequence.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `cu_seqlens`; float32, or float64 if the
      logits are float64. A sequence without a label that counts has log-probability 0 and gradient
      0. On a GPU, `cu_seqlens` out of order give nan, because a check would synchronise.

    Raises:
      TypeError: `logits` are not real floating, or `labels` or `cu_seqlens` are not integer.
      ValueError: a shape or a device does not fit, or, on the CPU, `cu_seqlens` are out of order.
    """
    check_floating("logits", logits)
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape [B, T, V], got {tuple(logits.shape)}")
    check_labels("labels", labels, "logits", logits)
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, "labels", labels)
    targets = targets_of(labels, ignore_index, shift=shift, cu_seqlens=cu_seqlens)
    counts = targets != IGNORED
    logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, 1), torch.where(counts, targets, 0).flatten(), counts.flatten()
    )
    lengths = sum_sequences(counts, cu_seqlens)
    return sum_tokens(logps.view(labels.shape), lengths, average=average, cu_seqlens=cu_seqlens)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    average: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    per_token: bool = False,
    cu_seqlens: Tensor | None = None,
    vocab_parallel_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """`sequence_logps` from hidden states, without ever holding the logits.

        logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap) / temperature

    The computation runs over tiles of `chunk_size` tokens, one block of the vocabulary at a time,
    in the forward and again in the backward. Tokens with ignored labels cost nothing. Use it under
    `torch.no_grad` for a reference's log-probabilities. With gradients, it works for any loss. For
    a loss of the margin, `linear_pair_loss` does the same in one pass.

    On CUDA with Triton installed, torch.compile fuses the softmax of a block at the first call,
    which needs a C compiler. TORCH_COMPILE_DISABLE=1 disables compilation (slower). On GPUs before
    Ampere, nothing is compiled, and half precision is converted to float32 before it is summed.
    Under torch.compile the function is one operator in the graph, for batches of any length.

    Args:
      hidden: last hidden states, shape [B, T, D], real floating.
      weight: the head's weight, shape [V, D], in the dtype of `hidden`. Under DDP, FSDP and
        DeepSpeed, read it inside the forward of the wrapped module. Outside, its gradient is not
        synchronised, and no error is raised. It does not include a LoRA adapter on the head.
      labels: token ids, shape [B, T], integer. Labels equal to `ignore_index` (prompt, padding) do
        not count. Others must lie in [0, V).
      bias: the head's bias, shape [V].
      ignore_index: the label that does not count.
      shift: True if position t predicts label t + 1, as in the batches of Transformers. False if
        you have shifted already, so position t predicts label t.
      average: divide each sum by the number of labels that count.
      softcap: the model's final logit soft-capping (Gemma), > 0; None for none.
      logit_scale: factor of the logits, not 0 (Cohere; for Granite 1 / logits_scaling).
      temperature: divisor of the logits, > 0.
      chunk_size: tokens per tile; None for 1,024, on CUDA 4,096. A block of a tile's logits takes
        16 MiB (on CUDA 512 MiB) but has at least 1,024 words. With `softcap` it takes twice that.
      per_token: return the log-probability of every token instead of their sums.
      cu_seqlens: offsets of S sequences that are packed into one row (B = 1) without padding, shape
        [S + 1], int32 or int64, rising from 0 to T. The last token of a sequence does not predict
        the next sequence.
      vocab_parallel_group: the ranks that share a head split over the vocabulary. `weight` and
        `bias` are then this rank's rows (for a DTensor: `to_local()`), in the order of the ranks,
        in shards of any size. Hidden states, labels and the upstream gradient must be equal on all
        ranks. The result is then equal too, and so is the gradient by `hidden`, which is summed
        over the ranks.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `cu_seqlens`, at least float32. A sequence
      without a label that counts is 0. With `per_token` the shape is [B, T]. Position t has the
      log-probability of the label that it predicts, or 0 if that label is ignored. Differentiable
      once.

    Raises:
      TypeError: a dtype does not fit, an option is not a number, or `weight` is a sharded DTensor.
      ValueError: a shape, device or number does not fit, a label is outside [0, V), `cu_seqlens`
        are out of order, `average` and `per_token` are both given, ZeRO-3 has partitioned `weight`,
        or the ranks of `vocab_parallel_group` do not agree or have too few rows for the labels.
      RuntimeError: `vocab_parallel_group` is given under torch.compile(fullgraph=True).
    """
    if average and per_token:
        raise ValueError("average and per_token exclude each other: average divides a sum")
    options = head_options(
        [Side("", hidden, labels, cu_seqlens)],
        weight,
        bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        chunk_size=chunk_size,
        ignore_index=ignore_index,
        vocab_parallel_group=vocab_parallel_group,
    )
    targets = targets_of(labels, ignore_index, shift=shift, cu_seqlens=cu_seqlens)
    sequences = Sequences("labels", targets, ignore_index, cu_seqlens)
    (logps,) = token_logps([hidden], weight, bias, [sequences], options)
    if per_token:
        return logps
    lengths = sum_sequences(targets != IGNORED, cu_seqlens)
    return sum_tokens(logps, lengths, average=average, cu_seqlens=cu_seqlens)


class _TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target] of each row of [N, V], 0 for rows that do not count.

    Plain autograd would keep the float32 softmax of every tile until the backward. This function
    keeps the logits and recomputes the softmax.
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
        # If the logits are batched, vmap handles everything.
        if not is_batched(logits):
            refuse_batched(grad_logps)
        grad_logits = torch.empty_like(logits)
        for rows, tile in _tiles(logits):
            upstream = grad_logps[rows, None]
            # d logp / d logits = onehot(target) - softmax, subtracted in the tile's dtype, because
            # in bfloat16 a target of probability 0.999 would cancel to 0.
            product = tile.softmax(dim=1) * -upstream
            product.scatter_add_(1, targets[rows, None], upstream)
            # A row that does not count may be nan (padding), and 0 * nan is nan.
            grad_logits[rows] = torch.where(counts[rows, None], product, 0.0)
        return grad_logits, None, None


def _tiles(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of [N, V] in tiles of at most TILE_BYTES, in at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    n, v = logits.shape
    if torch.compiler.is_compiling():
        # The compiler fuses the conversion, and a loop would need one graph for each length.
        yield slice(None), logits.to(dtype)
        return
    height = max(1, TILE_BYTES // (v * dtype.itemsize))
    for start in range(0, max(n, 1), height):
        rows = slice(start, start + height)
        yield rows, logits[rows].to(dtype)
