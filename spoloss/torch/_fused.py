"""From checked arguments to the loss, in one pass if possible, else in two.

One pass computes the gradients in the forward, so it needs the factor of each pair in the loss.
With `reduction="none"`, these factors are only known in the backward, so the weight's gradient
needs a second pass. Under torch.compile there are two passes as well, because the graph cannot
depend on the number of labels that count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from spoloss.torch._autograd import Held, anchor, refuse_second_derivative, refuse_vmap
from spoloss.torch._gradients import Wanted, held_dtype
from spoloss.torch._head import Head, HeadOptions
from spoloss.torch._labels import sum_sequences
from spoloss.torch._objective import Objective
from spoloss.torch._one_pass import one_pass
from spoloss.torch._recompute import token_logps
from spoloss.torch._tokens import Batch, Sequences, TokenTable, make_table


class LinearPairLoss(NamedTuple):
    """The loss, and the policy's log-probabilities for metrics.

    Attributes:
      loss: 0-d, or [P] with `reduction="none"`.
      chosen_logps: log pi(y_w|x), [P], nats, detached.
      rejected_logps: log pi(y_l|x), [P], nats, detached.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor


class Inputs(NamedTuple):
    """The tensors that may require a gradient: hidden states [B, T, D] by side, and the head."""

    chosen: Tensor
    rejected: Tensor
    weight: Tensor
    bias: Tensor | None


def fused_loss(
    inputs: Inputs, sides: list[Sequences], objective: Objective, options: HeadOptions
) -> LinearPairLoss:
    """The loss of a batch of pairs, differentiable by the inputs."""
    needed = Wanted(
        hidden=_needs_grad(inputs.chosen) or _needs_grad(inputs.rejected),
        weight=_needs_grad(inputs.weight),
        bias=_needs_grad(inputs.bias),
    )
    later = objective.reduction == "none" and needed.head
    if later or not any(needed) or torch.compiler.is_compiling():
        return _two_passes(inputs, sides, objective, options)
    table = make_table(sides, vocabulary=options.vocabulary(inputs.weight))
    call = _Call(table, objective, options, needed, anchor(*inputs))
    value, chosen, rejected = _OnePass.apply(*inputs, call)  # type: ignore[no-untyped-call]
    return LinearPairLoss(value, chosen, rejected)


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _two_passes(
    inputs: Inputs, sides: list[Sequences], objective: Objective, options: HeadOptions
) -> LinearPairLoss:
    """The same loss from token log-probabilities, with logits recomputed in the backward."""
    # Named fields, because PyTorch 2.8 does not compile a slice of a named tuple.
    hidden = (inputs.chosen, inputs.rejected)
    tokens = token_logps(hidden, inputs.weight, inputs.bias, sides, options)
    sums = [
        sum_sequences(logps, side.cu_seqlens) for logps, side in zip(tokens, sides, strict=True)
    ]
    logps = objective.logps(torch.stack(sums))
    return LinearPairLoss(objective.value(logps), *logps.detach())


class _Kind(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class _Call:
    """What one call of `_OnePass` needs beside its inputs.

    Attributes:
      table: the tokens.
      objective: the loss.
      options: those of the head.
      needed: which gradients the forward computes.
      anchor: a tensor that depends on the inputs, for the error of a second derivative.
      held: the gradients, from the forward to the backward.
    """

    table: TokenTable
    objective: Objective
    options: HeadOptions
    needed: Wanted
    anchor: Tensor
    held: Held = field(default_factory=Held)


class _OnePass(torch.autograd.Function):
    """Loss, log-probabilities and gradients in the forward; the backward only scales them."""

    @staticmethod
    def forward(
        chosen: Tensor, rejected: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, ...]:
        with torch.autocast(chosen.device.type, enabled=False):
            head = Head.of(weight, bias, call.options)
            batch = Batch.of(call.table, chosen, rejected)
            found = one_pass(head, batch, call.objective, call.needed)
            call.held.put(
                found.gradients.hidden,
                found.gradients.head.weight(held_dtype(weight.dtype)),
                None if bias is None else found.gradients.head.bias(held_dtype(bias.dtype)),
            )
            logps = call.objective.logps(found.sums)
            return call.objective.value(logps), *logps.unbind()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.call = inputs
        # Only shapes and dtypes, because saved inputs would stay in memory until the backward.
        ctx.kinds = [
            None if tensor is None else _Kind(tensor.shape, tensor.dtype) for tensor in tensors
        ]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        table = ctx.call.table
        with torch.no_grad():
            of_rows = upstream if upstream.ndim == 0 else _of_rows(table, upstream)
            hidden, *head = ctx.call.held.scaled(of_rows, upstream, upstream)
            sides = (None, None) if hidden is None else torch.split(hidden, table.sizes)
            grads = tuple(
                None if grad is None or not need else grad.view(kind.shape).to(kind.dtype)
                for grad, need, kind in zip(
                    (*sides, *head), ctx.needs_input_grad, ctx.kinds, strict=False
                )
            )
        return *refuse_second_derivative(grads, ctx.call.anchor), None

    @staticmethod
    def vmap(*_: Any) -> NoReturn:
        refuse_vmap()


def _of_rows(table: TokenTable, of_pair: Tensor) -> Tensor:
    """A value per pair, copied to its rows of hidden states, [rows, 1]; 0 if no label counts."""
    rows = of_pair.new_zeros(sum(table.sizes))
    rows[table.tokens.place] = of_pair[table.tokens.pair]
    return rows[:, None]
