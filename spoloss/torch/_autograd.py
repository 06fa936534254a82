"""Shared parts of the fused head's autograd functions.

Their gradients are not differentiable. A second derivative is an error instead of a silent zero.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


def needs_grad(tensor: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient with respect to a tensor."""
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


class RefuseSecondDerivative(torch.autograd.Function):
    """The identity on a gradient, with a derivative that raises an error."""

    @staticmethod
    def forward(grad: Tensor, *_inputs: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # noqa: ARG004
        raise RuntimeError(
            "the fused head has no second derivative, because it computes its gradients once, tile "
            "by tile. Use sequence_logps on the logits, which is differentiable twice"
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
    """An anchor for the inputs that require a gradient, for `refuse_second_derivative`."""
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    result: Tensor = Anchor.apply(*wanted)  # type: ignore[no-untyped-call]
    return result


def refuse_second_derivative(
    grads: tuple[Tensor | None, ...], *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of a backward, with an error for a second derivative by `inputs`."""
    if not torch.is_grad_enabled():
        return grads
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return tuple(
        None if grad is None else RefuseSecondDerivative.apply(grad, *wanted)  # type: ignore[no-untyped-call]
        for grad in grads
    )


def refuse_vmap() -> NoReturn:
    """Raise the error for `torch.vmap` of the fused head, with the alternatives.

    Raises:
      RuntimeError: always.
    """
    raise RuntimeError(
        "the fused head does not support torch.vmap, because its tiles depend on the number of "
        "tokens. Call it on the whole batch, or use sequence_logps on the logits"
    )


def refuse_batched(upstream: Tensor) -> None:
    """Raise an error for an upstream gradient with a dimension that vmap added.

    Raises:
      RuntimeError: under `torch.func.jacrev`, `vmap` of a gradient or `is_grads_batched`.
    """
    if is_batched(upstream):
        raise RuntimeError(
            "this backward fills its gradients tile by tile, which does not work under "
            "torch.func.jacrev, vmap or is_grads_batched. Differentiate each output in turn, for "
            "example with torch.autograd.functional.jacobian"
        )


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """A gradient that the forward computed, times the upstream gradient.

    The gradient is overwritten if it cannot be read again, which saves memory of the weight's size.
    """
    if not _last_use(upstream):
        return (gradient * upstream).to(gradient.dtype)
    # loss.backward() passes 1. Reading the number on a GPU would synchronise, so only a CPU does.
    if upstream.ndim == 0 and upstream.device.type == "cpu" and upstream == 1.0:
        return gradient
    return gradient.mul_(upstream)


def _last_use(upstream: Tensor) -> bool:
    """Whether this backward frees the graph, and no transform of torch.func wraps its tensors."""
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keep_graph is None or keep_graph():
        return False
    # Under a transform of torch.func, one saved tensor is used with many upstream gradients.
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(upstream)
    return not (wrapped or is_batched(upstream))


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap, or the older vmap behind `is_grads_batched`, added a dimension."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))
