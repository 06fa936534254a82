"""Token log-probabilities with gradients that are computed in the backward, from recomputed logits.

This works for any loss and needs no slope in the forward. It takes four matrix products per token,
and one pass takes three. The forward keeps the log-sum-exp of each token as two numbers, the
largest logit and the sum of exp(logit - largest), so that the backward can use each block of a tile
immediately.

Under torch.compile the same computation is one opaque operator, because its tiles depend on the
number of labels that count. So one graph works for batches of any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from spoloss.torch._autograd import refuse_batched, refuse_second_derivative, refuse_vmap
from spoloss.torch._gradients import Gradients, Wanted
from spoloss.torch._head import Head, HeadOptions
from spoloss.torch._plan import tiles
from spoloss.torch._softmax import Workspace, known_blocks, known_softmax, softmax_of
from spoloss.torch._tokens import Batch, Sequences, TokenTable, make_table
from spoloss.torch._vocab_parallel import refuse_compilation


def token_logps(
    hidden: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    sides: Sequence[Sequences],
    options: HeadOptions,
) -> list[Tensor]:
    """Log-probabilities of each side's targets, [B, T], 0 for ignored labels. Differentiable."""
    if options.shard is not None:
        refuse_compilation()
    if torch.compiler.is_compiling():
        softcap = None if options.softcap is None else _number(options.softcap)
        numbers = (softcap, _number(options.logit_scale), _number(options.temperature))
        return [
            _forward_operator(
                states,
                weight,
                bias,
                side.targets,
                side.cu_seqlens,
                side.left_out,
                *numbers,
                side.name,
                side.ignore_index,
                options.chunk_size,
                options.dtype,
            )[0]
            for states, side in zip(hidden, sides, strict=True)
        ]
    # All tables before the first product, which the host would otherwise wait for.
    vocabulary = options.vocabulary(weight)
    tables = [make_table([side], vocabulary=vocabulary) for side in sides]
    return [
        _TokenLogps.apply(states, weight, bias, table, options)[0]  # type: ignore[no-untyped-call]
        for states, table in zip(hidden, tables, strict=True)
    ]


def _number(value: float) -> Tensor:
    """A number as a tensor: torch.compile makes one graph per value of an operator's floats."""
    return torch.ones((), dtype=torch.float64, device="cpu") * value


class _TokenLogps(torch.autograd.Function):
    """Hidden states [B, T, D] -> log-probabilities of the targets [B, T], and their log-sum-exp."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        table: TokenTable,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        return _forward(hidden, weight, bias, table, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, bias, ctx.table, ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, *output)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        refuse_batched(upstream)
        hidden, weight, bias, logps, lse = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[:3])
        with torch.no_grad():
            grads = _backward(
                hidden, weight, bias, ctx.table, ctx.options, logps, lse, upstream, wanted
            )
        return *refuse_second_derivative(grads, hidden, weight, bias), None, None

    @staticmethod
    def vmap(*_: Any) -> NoReturn:
        refuse_vmap()


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, table: TokenTable, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T] and log-sum-exp [2, B * T] of each token, 0 for ignored labels."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head.of(weight, bias, options)
        batch = Batch.of(table, hidden)
        logps = hidden.new_zeros(len(batch.hidden[0]), dtype=head.dtype)
        lse = logps.new_zeros(2, len(logps))
        workspace = Workspace(head, min(head.rows, len(table)), keep=False)
        for rows in tiles(table.all_rows, head.rows):
            tile = batch.tile(rows, head.weight.dtype)
            softmax = softmax_of(head, tile, workspace, keep=False, product=False)
            logps[tile.tokens.place] = softmax.logps
            lse[:, tile.tokens.place] = torch.stack([softmax.peak, softmax.total])
    return logps.view(hidden.shape[:2]), lse


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: TokenTable,
    options: HeadOptions,
    logps: Tensor,
    lse: Tensor,
    upstream: Tensor,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by hidden states, weight and bias, from the gradient by log-probabilities."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head.of(weight, bias, options)
        batch = Batch.of(table, hidden)
        gradients = Gradients(head, wanted, batch.zeros(hidden.dtype) if wanted.hidden else None)
        workspace = Workspace(head, min(head.rows, len(table)), keep=False)
        for rows in tiles(table.all_rows, head.rows):
            tile = batch.tile(rows, head.weight.dtype)
            place = tile.tokens.place
            slopes = upstream.flatten()[place].to(head.dtype)
            softmax = known_softmax(head, tile, logps.flatten()[place], *lse[:, place])
            product = torch.zeros_like(tile.states, dtype=head.dtype) if wanted.hidden else None
            blocks = known_blocks(head, tile, softmax, product, workspace)
            gradients.head.add(tile.states, softmax, blocks, slopes)
            if product is not None:
                gradients.write_hidden(tile.tokens, softmax, product, slopes)
    return (
        None if gradients.hidden is None else gradients.hidden.view(hidden.shape),
        gradients.head.weight(weight.dtype),
        None if bias is None else gradients.head.bias(bias.dtype),
    )


# The operators read the labels on the host, which a CUDA graph cannot record. Inductor keeps an
# operator with this tag outside of its graphs. Old versions of PyTorch have no such tag.
_TAGS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))


@torch.library.custom_op("spoloss::token_logps", mutates_args=(), tags=_TAGS)
def _forward_operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    left_out: Tensor | None,
    softcap: Tensor | None,
    logit_scale: Tensor,
    temperature: Tensor,
    name: str,
    ignore_index: int,
    chunk_size: int | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    sequences = Sequences(name, targets, ignore_index, cu_seqlens, left_out)
    table = make_table([sequences], vocabulary=len(weight))
    options = _options(softcap, logit_scale, temperature, chunk_size, dtype)
    return _forward(hidden, weight, bias, table, options)


@_forward_operator.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(others[-1] or weight.dtype, torch.float32)
    logps = hidden.new_empty(hidden.shape[:2], dtype=dtype)
    return logps, logps.new_empty(2, logps.numel())


@torch.library.custom_op("spoloss::token_logps_backward", mutates_args=(), tags=_TAGS)
def _backward_operator(
    wanted: list[bool],
    logps: Tensor,
    lse: Tensor,
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    left_out: Tensor | None,
    softcap: Tensor | None,
    logit_scale: Tensor,
    temperature: Tensor,
    name: str,
    ignore_index: int,
    chunk_size: int | None,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    sequences = Sequences(name, targets, ignore_index, cu_seqlens, left_out)
    table = make_table([sequences], vocabulary=len(weight))
    options = _options(softcap, logit_scale, temperature, chunk_size, dtype)
    grads = _backward(hidden, weight, bias, table, options, logps, lse, upstream, Wanted(*wanted))
    return [grad for grad in grads if grad is not None]


@_backward_operator.register_fake
def _(
    wanted: list[bool],
    logps: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    upstream: Tensor,  # noqa: ARG001
    *inputs: Any,
) -> list[Tensor]:
    hidden, weight, bias = inputs[:3]
    # The real gradients of the head have its strides, those of the hidden states are contiguous.
    grads = (
        hidden.new_empty(hidden.shape),
        torch.empty_like(weight),
        None if bias is None else torch.empty_like(bias),
    )
    return [grad for grad, want in zip(grads, wanted, strict=True) if want]


def _options(
    softcap: Tensor | None,
    logit_scale: Tensor,
    temperature: Tensor,
    chunk_size: int | None,
    dtype: torch.dtype | None,
) -> HeadOptions:
    return HeadOptions(
        None if softcap is None else softcap.item(),
        logit_scale.item(),
        temperature.item(),
        chunk_size,
        dtype,
    )


def _set_up_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.others = inputs[:9], inputs[9:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate_operator(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, logps, lse = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(_backward_operator(wanted, logps, lse, upstream, *tensors, *ctx.others))
    grads = [next(found) if want else None for want in wanted]
    return *grads, *(None for _ in ctx.needs_input_grad[3:])


_forward_operator.register_autograd(_differentiate_operator, setup_context=_set_up_operator)
