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
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from spoloss.torch._autograd import (
    anchor,
    needs_grad,
    refuse_batched,
    refuse_second_derivative,
    refuse_vmap,
    scaled,
)
from spoloss.torch._gradients import Gradients, Wanted
from spoloss.torch._head import HeadOptions, Projection
from spoloss.torch._softmax import Workspace, known_blocks, known_softmax, softmax_of
from spoloss.torch._tiles import tiles
from spoloss.torch._tokens import Batch, Sequences, TokenTable, make_table


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
    trained = needs_grad(weight) or needs_grad(bias)
    directions = not trained and any(map(needs_grad, hidden))
    table = make_table(sides, vocabulary=options.vocabulary(weight))
    call = Call(table, options, directions)
    kept = anchor(*hidden) if directions else None
    logps, *_ = _TokenLogps.apply(weight, bias, kept, call, *hidden)  # type: ignore[no-untyped-call]
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


class _TokenLogps(torch.autograd.Function):
    """Hidden states [B, T, D] of each side -> the fields of `Forward`."""

    @staticmethod
    def forward(
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor | None,  # noqa: ARG004
        call: Call,
        *hidden: Tensor,
    ) -> tuple[Tensor | None, ...]:
        return tuple(forward(weight, bias, call, *hidden))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        weight, bias, anchor, ctx.call, *hidden = inputs
        logps, lse, directions = output
        ctx.shapes = [states.shape for states in hidden]
        ctx.mark_non_differentiable(*(extra for extra in output[1:] if extra is not None))
        ctx.set_materialize_grads(False)
        # With directions, the backward needs neither the hidden states nor the head.
        kept = (directions, anchor) if ctx.call.directions else (weight, bias, logps, lse, *hidden)
        ctx.save_for_backward(*kept)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.call.directions:
            directions, anchor = ctx.saved_tensors
            with torch.no_grad():
                of_sides = _by_side(scaled(directions, upstream[:, None]), ctx)
            return *(None,) * 4, *refuse_second_derivative(of_sides, anchor)
        refuse_batched(upstream)
        weight, bias, logps, lse, *hidden = ctx.saved_tensors
        of_weight, of_bias, _, _, *of_hidden = ctx.needs_input_grad
        wanted = Wanted(any(of_hidden), of_weight, of_bias)
        with torch.no_grad():
            found = Forward(logps, lse, None)
            grads = backward(weight, bias, ctx.call, found, upstream, wanted, *hidden)
            of_all = (grads.weight, grads.bias, *_by_side(grads.hidden, ctx))
        of_weight, of_bias, *of_hidden = refuse_second_derivative(of_all, weight, bias, *hidden)
        return of_weight, of_bias, None, None, *of_hidden

    @staticmethod
    def vmap(*_: Any) -> NoReturn:
        refuse_vmap()


def _by_side(rows: Tensor | None, ctx: Any) -> tuple[Tensor | None, ...]:
    """The gradient by the hidden states of all sides, [rows, D], cut into those of each side."""
    if rows is None:
        return (None,) * len(ctx.shapes)
    parts = torch.split(rows, list(ctx.call.table.sizes))
    return tuple(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


class Grads(NamedTuple):
    """The gradients, None where not wanted; that by the hidden states is [rows, D]."""

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
        directions = batch.zeros(hidden[0].dtype) if call.directions else None
        gradients = Gradients(head, Wanted(call.directions, weight=False, bias=False), directions)
        rows_per_tile = head.tiles.heights.rows
        workspace = Workspace(head, min(rows_per_tile, len(table)), keep=False)
        for rows in tiles(table.all_rows, rows_per_tile):
            tile = batch.tile(rows, head.weight.dtype)
            softmax = softmax_of(head, tile, workspace, keep=False, product=call.directions)
            logps[tile.tokens.place] = softmax.logps
            lse[:, tile.tokens.place] = torch.stack([softmax.peak, softmax.total])
            gradients.add(tile, softmax, torch.ones_like(softmax.logps), gradients.head)
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
    """The gradients by hidden states, weight and bias, from the gradient by log-probabilities."""
    with torch.autocast(weight.device.type, enabled=False):
        head = Projection.of(weight, bias, call.options)
        table, batch = call.table, Batch.of(call.table, *hidden)
        gradients = Gradients(head, wanted, batch.zeros(hidden[0].dtype) if wanted.hidden else None)
        rows_per_tile = head.tiles.heights.rows
        workspace = Workspace(head, min(rows_per_tile, len(table)), keep=False)
        for rows in tiles(table.all_rows, rows_per_tile):
            tile = batch.tile(rows, head.weight.dtype)
            place = tile.tokens.place
            slopes = upstream[place].to(head.dtype)
            softmax = known_softmax(head, tile, found.logps[place], *found.lse[:, place])
            product = torch.zeros_like(tile.states, dtype=head.dtype) if wanted.hidden else None
            blocks = known_blocks(head, tile, softmax, product, workspace)
            gradients.head.add(tile.states, softmax, blocks, slopes)
            if product is not None:
                gradients.write_hidden(tile.tokens, softmax, product, slopes)
    of_bias = None if bias is None else gradients.head.bias(bias.dtype)
    return Grads(gradients.hidden, gradients.head.weight(weight.dtype), of_bias)
