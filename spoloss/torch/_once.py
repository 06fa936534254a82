"""Gradients that are made once and have no derivative of their own: an error, never a zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Refuse(torch.autograd.Function):
    """A gradient as it is, whose own derivative is an error instead of a silent zero."""

    @staticmethod
    def forward(grad: Tensor, *_inputs: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # noqa: ARG004
        raise RuntimeError(
            "the fused head has no second derivative: its gradients are made once, by tiles. "
            "Use sequence_logps on the logits, which is differentiable twice"
        )


def once(grads: tuple[Tensor | None, ...], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """`grads` as a backward returns them, refusing a second derivative by `inputs`."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grads
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return tuple(
        None if grad is None else Refuse.apply(grad, *wanted)  # type: ignore[no-untyped-call]
        for grad in grads
    )
