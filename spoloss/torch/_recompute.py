"""Token log-probabilities, differentiable for any loss.

With a frozen head, the forward keeps each token's direction, the derivative of its log-probability
with respect to its hidden state, and the backward scales it: two matrix products per token. The
directions are an array like the hidden states.

With a trained head, the backward computes the logits again: four products, where one pass takes
three. The forward keeps the log-sum-exp of each token as two numbers, the largest logit and the sum
of exp(logit - largest), so that the backward can use each block of a tile immediately.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spoloss.torch._autograd import (
    Held,
    Kind,
    Unbatched,
    anchor,
    by_side,
    needs_grad,
    refuse_batched,
    refuse_second_derivative,
)
from spoloss.torch._gradients import Gradients, Wanted, held_dtype
from spoloss.torch._head import HeadOptions, Projection
from spoloss.torch._labels import Sequences
from spoloss.torch._softmax import Workspace, known_blocks, known_softmax, softmax_of
from spoloss.torch._tiles import tiles
from spoloss.torch._tokens import Batch, TokenTable, make_table


def token_logps(
    hidden: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    sides: list[Sequences],
    options: HeadOptions,
) -> list[Tensor]:
    """Log-probabilities of each side's targets, [B, T], 0 where none counts. Differentiable.

    One table holds all sides, so that the labels are read once, before the first product.
    """
    frozen = not (needs_grad(weight) or needs_grad(bias))
    table = make_table(sides, vocabulary=options.vocabulary(weight))
    if frozen and any(map(needs_grad, hidden)):
        call = Call(table, options, directions=True)
        kept = Held(), anchor(*hidden)
        logps = _Directed.apply(*hidden, weight, bias, call, kept)  # type: ignore[no-untyped-call]
    else:
        call = Call(table, options, directions=False)
        logps, _ = _Recomputed.apply(*hidden, weight, bias, call)  # type: ignore[no-untyped-call]
    return [
        part.view(states.shape[:2])
        for part, states in zip(torch.split(logps, list(table.sizes)), hidden, strict=True)
    ]


class Call(NamedTuple):
    """What a call has beside its tensors.

    Attributes:
      table: the tokens of all sides.
      options: the head's options.
      directions: whether the forward keeps the tokens' directions, because the head is frozen.
    """

    table: TokenTable
    options: HeadOptions
    directions: bool


class Forward(NamedTuple):
    """The results of the forward, one row per hidden state of all sides.

    Attributes:
      logps: [rows], 0 where no label counts.
      lse: [2, rows] the log-sum-exp of the logits: the largest logit, the sum of exp(logit - it).
      directions: [rows, D] the derivative of each log-probability, or None.
    """

    logps: Tensor
    lse: Tensor
    directions: Tensor | None


class _Directed(Unbatched):
    """Log-probabilities of the targets of all sides. The backward scales the directions.

    It needs neither the hidden states nor the head, so they may change or be freed.
    """

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        *hidden, weight, bias, call, (held, _) = inputs
        found = forward(weight, bias, call, *hidden)
        held.put(found.directions)
        return found.logps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        *hidden, _, _, _, (ctx.held, ctx.anchor) = inputs
        ctx.kinds = [Kind.of(states) for states in hidden]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.no_grad():
            (rows,) = ctx.held.scaled(upstream[:, None])
            grads = by_side(rows, ctx.kinds)
        return *refuse_second_derivative(grads, ctx.anchor), *(None,) * 4


class _Recomputed(Unbatched):
    """Log-probabilities and log-sum-exp. The backward computes the logits again."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        *hidden, weight, bias, call = inputs
        found = forward(weight, bias, call, *hidden)
        return found.logps, found.lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *hidden, weight, bias, ctx.call = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, bias, *output, *hidden)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_batched(upstream)
        weight, bias, logps, lse, *hidden = ctx.saved_tensors
        *of_hidden, of_weight, of_bias, _ = ctx.needs_input_grad
        wanted = Wanted(any(of_hidden), of_weight, of_bias)
        with torch.no_grad():
            found = Forward(logps, lse, None)
            grads = backward(weight, bias, ctx.call, found, upstream, wanted, *hidden)
            of_sides = by_side(grads.hidden, [Kind.of(states) for states in hidden])
        of_all = (*of_sides, grads.weight, grads.bias)
        return *refuse_second_derivative(of_all, *hidden, weight, bias), None


class Grads(NamedTuple):
    """The gradients, None where not wanted. The one of the hidden states is [rows, D]."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def forward(weight: Tensor, bias: Tensor | None, call: Call, *hidden: Tensor) -> Forward:
    """Log-probabilities and log-sum-exp of each token, and directions if they are wanted."""
    with torch.autocast(weight.device.type, enabled=False):
        head = Projection.of(weight, bias, call.options)
        table, batch = call.table, Batch.of(call.table, *hidden)
        logps = weight.new_zeros(sum(table.sizes), dtype=head.dtype)
        lse = logps.new_zeros(2, len(logps))
        directions = batch.zeros(held_dtype(hidden[0].dtype)) if call.directions else None
        gradients = Gradients(head, Wanted(call.directions, weight=False, bias=False), directions)
        rows_per_tile = head.tiles.heights.rows
        workspace = Workspace(head, min(rows_per_tile, len(table)), keep=False)
        for rows in tiles(table.all_rows, rows_per_tile):
            tile = batch.tile(rows, head.weight.dtype)
            softmax = softmax_of(head, tile, workspace, keep=False, product=call.directions)
            logps[tile.tokens.place] = tile.visible(softmax.logps)
            lse[:, tile.tokens.place] = torch.stack([softmax.peak, softmax.total])
            unit = torch.full_like(softmax.logps, head.gain)
            gradients.add(tile, softmax, unit, gradients.head)
            del tile, softmax  # before the next tile needs as much memory
    return Forward(logps, lse, directions)


def backward(
    weight: Tensor,
    bias: Tensor | None,
    call: Call,
    found: Forward,
    upstream: Tensor,
    wanted: Wanted,
    *hidden: Tensor,
) -> Grads:
    """The gradients of hidden states, weight and bias, from that of the log-probabilities."""
    with torch.autocast(weight.device.type, enabled=False):
        head = Projection.of(weight, bias, call.options)
        table, batch = call.table, Batch.of(call.table, *hidden)
        gradients = Gradients(head, wanted, batch.zeros(hidden[0].dtype) if wanted.hidden else None)
        rows_per_tile = head.tiles.heights.rows
        workspace = Workspace(head, min(rows_per_tile, len(table)), keep=False)
        for rows in tiles(table.all_rows, rows_per_tile):
            tile = batch.tile(rows, head.weight.dtype)
            place = tile.tokens.place
            slopes = head.gain * upstream[place].to(head.dtype)
            logps = found.logps[place]
            if tile.unusable is not None:
                logps = logps.masked_fill(tile.unusable, 0.0)  # any number, because the slope is 0
            softmax = known_softmax(head, tile, logps, *found.lse[:, place])
            product = torch.empty_like(tile.states, dtype=head.dtype) if wanted.hidden else None
            blocks = known_blocks(head, tile, softmax, product, workspace)
            gradients.head.add(tile.states, softmax, blocks, slopes)
            if product is not None:
                gradients.write_hidden(tile.tokens, softmax, product, slopes)
    of_bias = None if bias is None else gradients.head.bias(bias.dtype)
    return Grads(gradients.hidden, gradients.head.weight(weight.dtype), of_bias)
