"""Log-probabilities of sequences under a language model, from its logits or its hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spoloss._checks import check_floating
from spoloss._options import check_flag
from spoloss.torch._arguments import Completions, Head
from spoloss.torch._autograd import is_batched, refuse_batched
from spoloss.torch._checks import prepare
from spoloss.torch._fused import logps_of_tokens
from spoloss.torch._labels import IGNORED, check_labels, sequences_of
from spoloss.torch._tiles import logits_rows


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    average: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The log-probability of each sequence: the sum over its tokens of log softmax(logits)[label].

        log pi(y|x) = sum_t w_t * log softmax(logits_t)[label_t]

    Half-precision logits are summed in float32 without a float32 copy of [B, T, V]. The forward
    converts the rows in tiles of at most 64 MiB, and the backward does so again. You can
    differentiate in reverse mode any number of times. Forward mode is not supported.

    Args:
      logits: the model's output, shape [B, T, V], real floating. Pass the whole tensor: flattening
        a slice such as `logits[:, :-1]` copies it.
      labels: token ids, shape [B, T], integer. Labels equal to `ignore_index` (prompt, padding) do
        not count. Other labels outside [0, V) raise an indexing error.
      token_weights: w, the factor of each label's log-probability, shape [B, T], real floating,
        finite and >= 0; None for 1. They align with `labels` and are shifted with them. A label of
        weight 0 does not count, whatever its logits are.
      ignore_index: the label that does not count.
      shift: True if position t predicts label t + 1, as in the batches of Transformers. False if
        you have shifted already, so position t predicts label t.
      average: divide each sum by the number of labels that count, or by the sum of their weights.
      cu_seqlens: offsets of S sequences that are packed into one row (B = 1) without padding, shape
        [S + 1], int32 or int64, rising from 0 to T. This is the format of FlashAttention's
        variable-length functions. The last token of a sequence does not predict the next sequence.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `cu_seqlens`; float32, or float64 if the
      logits are float64. A sequence without a label that counts has log-probability 0 and gradient
      0. On a GPU, `cu_seqlens` out of order give nan, because a check would synchronise.

    Raises:
      TypeError: `logits` or `token_weights` are not real floating, `labels` or `cu_seqlens` are not
        integer, an argument is not a tensor, or an option has another type.
      ValueError: a shape or a device does not fit, or, on the CPU, `cu_seqlens` are out of order or
        a token weight is negative or not finite.
    """
    check_floating(torch, "logits", logits)
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape [B, T, V], got {tuple(logits.shape)}")
    check_flag("average", average)
    tokens = Completions(
        logits,
        labels,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        shift=shift,
    )
    check_labels("", tokens, "logits")
    side = sequences_of(tokens)
    if token_weights is not None:
        side.check_weights("token_weights")
    counts = side.targets != IGNORED
    logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, 1), torch.where(counts, side.targets, 0).flatten(), counts.flatten()
    )
    return side.sums(logps.view(labels.shape), average=average)


def linear_logps(
    head: Head, completions: Completions, *, average: bool = False, per_token: bool = False
) -> Tensor:
    """`sequence_logps` from hidden states, without ever holding the logits.

        log pi(y|x) = sum_t w_t * log softmax(logits_t)[label_t]

    With N the tokens that count, a call takes 4NDV FLOPs with a frozen head: the forward keeps each
    token's direction, the derivative of its log-probability with respect to its hidden state, an
    array like the hidden states, and the backward scales it. So any loss of the log-probabilities
    takes two products. With a head that requires a gradient, the backward computes the logits
    again: 8NDV. Without a gradient, as for a reference under `torch.no_grad`, it takes 2NDV. Tokens
    whose labels do not count cost nothing. Under torch.compile the function is one operator in the
    graph, for batches of any length.

    Args:
      head: how hidden states become logits.
      completions: hidden states, and which of their tokens count.
      average: divide each sum by the number of labels that count, or by the sum of their weights.
      per_token: return the weighted log-probability of every token instead of their sums.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `completions.cu_seqlens`, at least float32.
      A sequence without a label that counts is 0. With `per_token` the shape is [B, T]. Position t
      has the log-probability of the label that it predicts, or 0 if that label does not count.
      Differentiable once with respect to hidden states, weight and bias, and with respect to
      `token_weights`.

    Raises:
      TypeError: a dtype does not fit, an option has another type, an argument is not a tensor, or
        the weight is a sharded DTensor.
      ValueError: a shape, device or number does not fit, a label is outside [0, V), a token weight
        is negative or not finite, `cu_seqlens` are out of order, `average` and `per_token` are both
        given, ZeRO-3 has partitioned the weight, or the ranks of `vocab_parallel_group` do not
        agree or have too few rows for the labels.
      RuntimeError: `vocab_parallel_group` is given under torch.compile(fullgraph=True).
    """
    check_flag("average", average)
    check_flag("per_token", per_token)
    if average and per_token:
        raise ValueError("average and per_token exclude each other: average divides a sum")
    call = prepare(head, {"completions": completions})
    (side,) = call.sequences
    (logps,) = logps_of_tokens(
        [completions.hidden], head.weight, head.bias, call.sequences, call.options
    )
    return side.weighted(logps) if per_token else side.sums(logps, average=average)


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
    """The rows of [N, V] in tiles, in at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if torch.compiler.is_compiling():
        # The compiler fuses the conversion, and a loop would need one graph for each length.
        yield slice(None), logits.to(dtype)
        return
    for rows in logits_rows(len(logits), logits.shape[1], dtype.itemsize):
        yield rows, logits[rows].to(dtype)
