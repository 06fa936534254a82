"""Log-probabilities of sequences under a language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spoloss.torch._head import HeadOptions, head_options
from spoloss.torch._once import once
from spoloss.torch._rows import (
    Rows,
    check_cu_seqlens,
    check_labels,
    select_rows,
    shifted,
    sum_sequences,
)
from spoloss.torch._tiles import Head, HeadGrad, Tile

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TILE_BYTES = 64 * 2**20
"""Memory of one tile of float32 (or float64) log-probabilities; a tile holds whole rows of V."""


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    average: bool = False,
    cu_seqlens: Tensor | None = None,
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
      cu_seqlens: offsets of S sequences that lie one after another, without padding, in one row
        (B = 1), shape [S + 1], int32 or int64, rising from 0 to T: FlashAttention's, whose name
        they bear. No token predicts the next sequence's first.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `cu_seqlens`; float32, or float64 if the
      logits are. A sequence without a label that counts is 0, and its gradient too. On a GPU, where
      a check would wait for the device, `cu_seqlens` out of order give nan.

    Raises:
      TypeError: logits are not real floating, or labels or `cu_seqlens` not integer.
      ValueError: a shape or, on the CPU, `cu_seqlens` do not fit.
    """
    _check_logits(logits, labels)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, labels)
    targets, counts = shifted(labels, ignore_index, shift=shift, cu_seqlens=cu_seqlens)
    token_logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, 1), targets.flatten(), counts.flatten()
    )
    lengths = sum_sequences(counts, cu_seqlens)
    token_logps = token_logps.view(labels.shape)
    return sum_tokens(token_logps, lengths, average=average, cu_seqlens=cu_seqlens)


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
    vocab_parallel_group: ProcessGroup | None = None,
) -> Tensor:
    """`sequence_logps` from hidden states, without ever holding the logits.

        logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap) / temperature

    The head works on tiles of `chunk_size` tokens, a block of the vocabulary at a time, forwards
    and (again) backwards; tokens whose label is ignored are never worked on. Under `no_grad` it is
    the cheap way to a reference's log-probabilities; with a gradient it is the way to any loss. For
    a loss of the margin `linear_pair_loss` does the same in one pass.

    On CUDA, where Triton is installed, the softmax of a block is compiled at the first call, for
    which torch.compile wants a C compiler; TORCH_COMPILE_DISABLE=1 does without, in more passes.
    Cards before Ampere compile nothing, and widen half precision to float32 before its sums.

    Args:
      hidden: last hidden states, shape [B, T, D], real floating.
      weight: the head's weight, shape [V, D], in the dtype of `hidden`. Take it inside the wrapped
        module's forward under DDP and FSDP: past the wrapper no gradient is synchronised, and none
        complains. A LoRA adapter on the head is not in it.
      labels: token ids, shape [B, T], integer. Those equal to `ignore_index` (prompt, padding) do
        not count; others must lie in [0, V).
      bias: the head's bias, shape [V].
      ignore_index: the label to leave out.
      shift: position t predicts label t + 1, as Transformers lays them out. False: the caller has
        shifted already, and position t predicts label t.
      average: divide each sum by the number of labels that count.
      softcap: the model's final logit soft-capping (Gemma), > 0; None is no capping.
      logit_scale: factor of the logits (Cohere; for Granite 1 / logits_scaling).
      temperature: divisor of the logits, > 0.
      chunk_size: tokens of a tile; None for 1,024, on CUDA 4,096. Of a tile's logits a block of
        16 MiB (on CUDA 512 MiB), but at least 1,024 words of the vocabulary, exists at a time; a
        softcap doubles that.
      per_token: return every token's log-probability, and not their sums.
      cu_seqlens: as for `sequence_logps`.
      vocab_parallel_group: the ranks of a head that is split over the vocabulary: `weight` and
        `bias` are then this rank's rows (of a DTensor: `to_local()`), the first rank's first, in
        shards of any size. Hidden states, labels and the upstream gradient must be the same on all
        ranks, the result is, and so is the gradient by `hidden`, summed over the ranks once.
        torch.compile leaves such a call out of its graph.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `cu_seqlens`, at least float32; a sequence
      without a label that counts is 0. With `per_token` shape [B, T], where position t is that of
      the label which it predicts, and 0 where that is ignored. Differentiable once. On a GPU
      `cu_seqlens` out of order give nan.

    Raises:
      TypeError: a dtype does not fit, or the weight is a sharded DTensor.
      ValueError: a shape, device or number does not fit, a label is outside [0, V) (which a
        compiled graph can't see), `average` comes with `per_token`, or the ranks of
        `vocab_parallel_group` do not agree on their tokens or lack rows for the labels.
      RuntimeError: `vocab_parallel_group` is given under torch.compile(fullgraph=True).
    """
    if average and per_token:
        raise ValueError("average divides a sequence's sum: it does not go with per_token")
    options = head_options(
        {"hidden": hidden},
        {"labels": labels},
        weight,
        bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        chunk_size=chunk_size,
        ignore_index=ignore_index,
        vocab_parallel_group=vocab_parallel_group,
    )
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, labels)
    (rows,) = select_rows(
        {"labels": labels},
        vocabulary=options.vocabulary,
        ignore_index=ignore_index,
        shift=shift,
        cu_seqlens=cu_seqlens,
    )
    token_logps = linear_token_logps(hidden, weight, bias, rows, options)
    if per_token:
        return token_logps
    return sum_tokens(token_logps, rows.lengths, average=average, cu_seqlens=cu_seqlens)


def linear_token_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, options: HeadOptions
) -> Tensor:
    """`linear_logps(per_token=True)` after its checks."""
    logps: Tensor
    logps, _ = _LinearLogps.apply(hidden, weight, bias, rows, options)  # type: ignore[no-untyped-call]
    return logps


def sum_tokens(
    token_logps: Tensor, lengths: Tensor, *, average: bool, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Sums over sequences, or averages in which a sequence without a token is 0."""
    total = sum_sequences(token_logps, cu_seqlens)
    return total / lengths.clamp(min=1) if average else total


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be real floating, got {logits.dtype}")
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape [B, T, V], got {tuple(logits.shape)}")
    check_labels("labels", labels, "logits", logits)


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


class _LinearLogps(torch.autograd.Function):
    """Hidden states [B, T, D] -> log-probabilities of the rows' targets, [B, T]; tile by tile.

    Of the softmax the forward leaves one number per row, its log-sum-exp, which lets the backward
    use each block of a tile at once.
    """

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, options: HeadOptions
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(weight, bias, options)
            flat = hidden.reshape(-1, hidden.shape[2])
            logps = torch.zeros(len(flat), dtype=head.dtype, device=hidden.device)
            lse = torch.zeros_like(logps)
            for part in rows.slices(0, len(rows.ends) - 1, head.rows):
                states = rows.take(flat, part, head.weight.dtype)
                tile = Tile(head, states, rows.targets[part], wanted=None)
                tile.sweep(keep=False)
                logps[rows.index[part]] = rows.mask(tile.logps, part)
                lse[rows.index[part]] = tile.lse
            return logps.view(hidden.shape[:2]), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, bias, ctx.rows, ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, logps, lse = ctx.saved_tensors
        if grad is None:
            return (None,) * 5
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            head, rows, upstream = Head(weight, bias, ctx.options), ctx.rows, grad.flatten()
            flat = hidden.reshape(-1, hidden.shape[2])
            grad_hidden = torch.zeros_like(flat) if need_hidden else None
            total = HeadGrad(head, weight=need_weight, bias=need_bias)
            wanted = slice(None) if need_hidden else None
            for part in rows.slices(0, len(rows.ends) - 1, head.rows):
                index = rows.index[part]
                states = rows.take(flat, part, head.weight.dtype)
                tile = Tile(head, states, rows.targets[part], wanted)
                tile.know(logps.flatten()[index], lse[index])
                factor = rows.mask(upstream[index] * -head.gain, part)
                total.add(tile, tile.blocks(), factor)
                if grad_hidden is not None:
                    grad_hidden[index] = tile.hidden_grad(factor).to(hidden.dtype)
            head.complete(grad_hidden)
            grads = (
                None if grad_hidden is None else grad_hidden.view(hidden.shape),
                *total.to(weight.dtype, None if bias is None else bias.dtype),
            )
        return *once(grads, hidden, weight, bias), None, None
