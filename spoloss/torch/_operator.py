"""Token log-probabilities under torch.compile: one opaque operator of the graph.

Its tiles depend on the number of labels that count, which a graph cannot. So one graph works for
batches of any length. Each side of a call is an operator with a table of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spoloss.torch._autograd import needs_grad
from spoloss.torch._gradients import Wanted, held_dtype
from spoloss.torch._head import HeadOptions
from spoloss.torch._labels import Sequences
from spoloss.torch._recompute import Call, Forward, backward, forward
from spoloss.torch._tokens import make_table

# The operators read the labels on the host, which a CUDA graph cannot record. Inductor keeps an
# operator with this tag outside of its graphs. Old versions of PyTorch have no such tag.
_TAGS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))


def compiled_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, side: Sequences, options: HeadOptions
) -> Tensor:
    """Log-probabilities of one side's targets, [B, T], 0 where none counts. Differentiable."""
    frozen = not (needs_grad(weight) or needs_grad(bias))
    logps, _, _ = _forward_operator(
        hidden,
        weight,
        bias,
        side.targets,
        side.cu_seqlens,
        side.left_out,
        _numbers(options),
        side.name,
        side.ignore_index,
        options.chunk_size,
        options.dtype,
        frozen and needs_grad(hidden),
    )
    return logps  # type: ignore[no-any-return]


def _numbers(options: HeadOptions) -> Tensor:
    """Soft-cap (0 for none), scale and temperature.

    A tensor, because torch.compile makes one graph per value of an operator's floats.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    numbers = (options.softcap or 0.0, options.logit_scale, options.temperature)
    return torch.stack([one * number for number in numbers])


def _call(
    weight: Tensor,
    side: Sequences,
    numbers: Tensor,
    chunk_size: int | None,
    dtype: torch.dtype | None,
    *,
    directions: bool,
) -> Call:
    softcap, logit_scale, temperature = numbers.tolist()
    options = HeadOptions(softcap or None, logit_scale, temperature, chunk_size, dtype)
    return Call(make_table([side], vocabulary=len(weight)), options, directions)


@torch.library.custom_op("spoloss::token_logps", mutates_args=(), tags=_TAGS)
def _forward_operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    cu_seqlens: Tensor | None,
    left_out: Tensor | None,
    numbers: Tensor,
    name: str,
    ignore_index: int,
    chunk_size: int | None,
    dtype: torch.dtype | None,
    directions: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    side = Sequences(name, ids, None, cu_seqlens, ignore_index, left_out)
    call = _call(weight, side, numbers, chunk_size, dtype, directions=directions)
    found = forward(weight, bias, call, hidden)
    rows = hidden.new_empty(0) if found.directions is None else found.directions
    return found.logps.view(hidden.shape[:2]), found.lse, rows


@_forward_operator.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, named_dtype, directions = others
    dtype = torch.promote_types(named_dtype or weight.dtype, torch.float32)
    logps = hidden.new_empty(hidden.shape[:2], dtype=dtype)
    rows = hidden.new_empty(0)
    if directions:
        shape = (logps.numel(), hidden.shape[2])
        rows = hidden.new_empty(shape, dtype=held_dtype(hidden.dtype))
    return logps, logps.new_empty(2, logps.numel()), rows


@torch.library.custom_op("spoloss::token_logps_backward", mutates_args=(), tags=_TAGS)
def _backward_operator(
    wanted: list[bool],
    logps: Tensor,
    lse: Tensor,
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    cu_seqlens: Tensor | None,
    left_out: Tensor | None,
    numbers: Tensor,
    name: str,
    ignore_index: int,
    chunk_size: int | None,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    side = Sequences(name, ids, None, cu_seqlens, ignore_index, left_out)
    call = _call(weight, side, numbers, chunk_size, dtype, directions=False)
    found, upstream = Forward(logps.flatten(), lse, None), upstream.flatten()
    grads = backward(weight, bias, call, found, upstream, Wanted(*wanted), hidden)
    of_hidden = None if grads.hidden is None else grads.hidden.view(hidden.shape)
    return [grad for grad in (of_hidden, grads.weight, grads.bias) if grad is not None]


@_backward_operator.register_fake
def _(wanted: list[bool], *inputs: Any) -> list[Tensor]:
    _, _, _, hidden, weight, bias, *_ = inputs
    # The real gradients of the head have its strides, those of the hidden states are contiguous.
    grads = (
        hidden.new_empty(hidden.shape),
        torch.empty_like(weight),
        None if bias is None else torch.empty_like(bias),
    )
    return [grad for grad, want in zip(grads, wanted, strict=True) if want]


@torch.library.custom_op("spoloss::scale_directions", mutates_args=())
def _scale_operator(rows: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """An operator, because a product would have a second derivative, silently 0."""
    return (rows.view(*upstream.shape, -1) * upstream[..., None]).to(dtype)


@_scale_operator.register_fake
def _(rows: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(*upstream.shape, rows.shape[1], dtype=dtype)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (*ctx.others, ctx.directions) = inputs[:7], inputs[7:]
    ctx.dtype = inputs[0].dtype
    logps, lse, rows = output
    ctx.mark_non_differentiable(lse, rows)
    ctx.save_for_backward(*((rows,) if ctx.directions else (*tensors, logps, lse)))


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    if ctx.directions:
        (rows,) = ctx.saved_tensors
        of_hidden = _scale_operator(rows, upstream, ctx.dtype)
        return of_hidden, *(None for _ in ctx.needs_input_grad[1:])
    *tensors, logps, lse = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(_backward_operator(wanted, logps, lse, upstream, *tensors, *ctx.others))
    grads = [next(found) if want else None for want in wanted]
    return *grads, *(None for _ in ctx.needs_input_grad[3:])


_forward_operator.register_autograd(_differentiate, setup_context=_set_up)
