"""From checked arguments to log-probabilities, and to the loss: in one pass if possible.

With a frozen head, `token_logps` keeps each token's direction, so any loss takes two products. With
a trained head, one pass computes the gradients in the forward, so it needs the factor of each pair
in the loss. With `reduction="none"` these factors are only known in the backward, and under
torch.compile the graph cannot depend on the number of labels that count. Then the backward computes
the logits again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spoloss._objective import Constants, Objective
from spoloss.torch._autograd import (
    Held,
    Kind,
    Unbatched,
    anchor,
    by_side,
    needs_grad,
    refuse_second_derivative,
)
from spoloss.torch._gradients import Wanted, held_dtype
from spoloss.torch._head import HeadOptions, Projection
from spoloss.torch._labels import Sequences
from spoloss.torch._one_pass import OnePass
from spoloss.torch._operator import compiled_logps
from spoloss.torch._recompute import token_logps
from spoloss.torch._tokens import Batch, TokenTable, make_table
from spoloss.torch._vocab_parallel import refuse_compilation


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


def logps_of_tokens(
    hidden: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    sides: list[Sequences],
    options: HeadOptions,
) -> list[Tensor]:
    """Log-probabilities of each side's targets, [B, T], 0 where none counts. Differentiable."""
    if options.shard is not None:
        refuse_compilation()
    if not torch.compiler.is_compiling():
        return token_logps(hidden, weight, bias, sides, options)
    return [
        compiled_logps(states, weight, bias, side, options)
        for states, side in zip(hidden, sides, strict=True)
    ]


class Inputs(NamedTuple):
    """The tensors that logits come from: hidden states [B, T, D] by side, and the head."""

    chosen: Tensor
    rejected: Tensor
    weight: Tensor
    bias: Tensor | None


def fused_loss(
    inputs: Inputs,
    sides: list[Sequences],
    objective: Objective,
    constants: Constants,
    options: HeadOptions,
) -> LinearPairLoss:
    """The loss of a batch of pairs, differentiable with respect to the inputs and the constants."""
    wanted = Wanted(
        hidden=needs_grad(inputs.chosen) or needs_grad(inputs.rejected),
        weight=needs_grad(inputs.weight),
        bias=needs_grad(inputs.bias),
    )
    lengths = torch.stack([side.lengths() for side in sides])
    if not wanted.head or objective.reduction == "none" or torch.compiler.is_compiling():
        # Named fields, because PyTorch 2.8 does not compile a slice of a named tuple.
        hidden = (inputs.chosen, inputs.rejected)
        tokens = logps_of_tokens(hidden, inputs.weight, inputs.bias, sides, options)
        sums = torch.stack([side.sums(part) for side, part in zip(sides, tokens, strict=True)])
        value = objective.value(sums, lengths, constants)
    else:
        table = make_table(sides, vocabulary=options.vocabulary(inputs.weight))
        held = Held()
        call = table, objective, options, wanted, held
        logps = _OnePass.apply(*inputs, table.tokens.weight, lengths, *constants, *call)  # type: ignore[no-untyped-call]
        # Autograd differentiates the value with respect to the constants, `_Attach` the inputs.
        sums = table.sums(logps, slice(0, len(table.lengths)))
        value = objective.value(sums, lengths, constants)
        value = _Attach.apply(value, *inputs, (held, anchor(*inputs)))  # type: ignore[no-untyped-call]
    return LinearPairLoss(value, *(logps.detach() for logps in objective.logps(sums, lengths)))


class _OnePass(Unbatched):
    """The log-probability of each row of the table, as a constant; the gradients are held."""

    @staticmethod
    def forward(
        chosen: Tensor,
        rejected: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_weights: Tensor | None,
        lengths: Tensor,
        *others: Any,
    ) -> Tensor:
        *constants, table, objective, options, wanted, held = others
        with torch.autocast(chosen.device.type, enabled=False):
            head = Projection.of(weight, bias, options)
            batch = Batch.of(_with_weights(table, token_weights), chosen, rejected)
            found = OnePass(head, batch, objective, lengths, Constants(*constants), wanted)
            held.put(
                found.gradients.hidden,
                found.gradients.head.weight(held_dtype(weight.dtype)),
                None if bias is None else found.gradients.head.bias(held_dtype(bias.dtype)),
            )
            return found.logps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


def _with_weights(table: TokenTable, weight: Tensor | None) -> TokenTable:
    """The table inside of an autograd function, which unwraps its arguments under torch.func."""
    return dataclasses.replace(table, tokens=dataclasses.replace(table.tokens, weight=weight))


class _Attach(Unbatched):
    """The identity on the loss, with known gradients, which the backward only scales."""

    @staticmethod
    def forward(value: Tensor, *_: Any) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, *tensors, (ctx.held, ctx.anchor) = inputs
        # Only shapes and dtypes, because saved inputs would stay in memory until the backward.
        ctx.kinds = [None if tensor is None else Kind.of(tensor) for tensor in tensors]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            hidden, *of_head = ctx.held.scaled(*3 * [upstream])
            head = zip(of_head, ctx.kinds[2:], strict=True)
            grads = (
                *by_side(hidden, ctx.kinds[:2]),
                # Autograd copies a gradient that Python still refers to, but not a view of it.
                *(g if g is None else g.view(kind.shape).to(kind.dtype) for g, kind in head),
            )
        # The value is no function of the inputs here, so its second derivative with respect to a
        # constant and an input would be a silent zero.
        return *refuse_second_derivative((upstream, *grads), ctx.anchor), None
