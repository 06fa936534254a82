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

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, Any]:  # noqa: ARG004
        return RefuseSecondDerivative.apply(grad, *inputs), in_dims[0]  # type: ignore[no-untyped-call]


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


def refuse_batched(upstream: Tensor) -> None:
    """Refuse an upstream gradient with a dimension that vmap has added.

    Raises:
      RuntimeError: under `torch.func.jacrev`, `vmap` of a gradient or `is_grads_batched`.
    """
    if is_batched(upstream):
        raise RuntimeError(
            "this backward fills its gradients tile by tile, which torch.func.jacrev, vmap and "
            "is_grads_batched cannot map over. Differentiate each output in turn, for example "
            "with torch.autograd.functional.jacobian"
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
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(upstream)
    return not (wrapped or is_batched(upstream))


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap, or the older form of it behind `is_grads_batched`, has added a dimension."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))
