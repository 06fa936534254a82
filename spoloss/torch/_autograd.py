"""What the autograd functions of the fused head have in common.

Their gradients have no derivative of their own: asking for one is an error, never a silent zero.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


class RefuseSecondDerivative(torch.autograd.Function):
    """A gradient unchanged, whose own derivative raises an error."""

    @staticmethod
    def forward(grad: Tensor, *_inputs: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # noqa: ARG004
        raise RuntimeError(
            "the fused head has no second derivative: its gradients are computed once, by tiles. "
            "Use sequence_logps on the logits, which is differentiable twice"
        )


class Anchor(torch.autograd.Function):
    """A 0-d tensor that depends on some tensors in autograd's graph, without keeping them alive."""

    @staticmethod
    def forward(*inputs: Tensor) -> Tensor:
        return inputs[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
        return tuple([None] * ctx.count)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Tensor) -> NoReturn:  # noqa: ARG004
        refuse_vmap()


def anchor(*inputs: Tensor | None) -> Tensor:
    """An anchor of those inputs that require a gradient, for `refuse_second_derivative`."""
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    result: Tensor = Anchor.apply(*wanted)  # type: ignore[no-untyped-call]
    return result


def refuse_second_derivative(
    grads: tuple[Tensor | None, ...], *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """`grads` as a backward returns them, with an error for a second derivative by `inputs`."""
    if not torch.is_grad_enabled():
        return grads
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return tuple(
        None if grad is None else RefuseSecondDerivative.apply(grad, *wanted)  # type: ignore[no-untyped-call]
        for grad in grads
    )


def refuse_vmap() -> NoReturn:
    """Say that the fused head cannot be mapped over, and what can."""
    raise RuntimeError(
        "the fused head does not support torch.vmap: its tiles depend on the number of tokens. "
        "Call it on the whole batch, or use sequence_logps on the logits"
    )


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """A gradient computed in the forward, times the upstream gradient.

    It is overwritten where nobody can read it again, which saves memory of the weight's size.
    """
    if not _last_use(upstream):
        return (gradient * upstream).to(gradient.dtype)
    # loss.backward() passes 1. Only a CPU can look at the number without waiting for it.
    if upstream.ndim == 0 and upstream.device.type == "cpu" and upstream == 1.0:
        return gradient
    return gradient.mul_(upstream)


def _last_use(upstream: Tensor) -> bool:
    """Whether this backward frees the graph and runs on plain tensors."""
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keep_graph is None or keep_graph():
        return False
    # Under a transform of torch.func, one saved tensor serves many upstream gradients.
    return not torch._C._functorch.is_functorch_wrapped_tensor(upstream)
