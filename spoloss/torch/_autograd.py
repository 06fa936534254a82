"""Shared parts of the fused head's autograd functions.

Their gradients are not differentiable. A second derivative is an error instead of a silent zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

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


class Unbatched(torch.autograd.Function):
    """A function that torch.vmap cannot batch, because tiles depend on the number of tokens."""

    @staticmethod
    def vmap(*_: Any) -> NoReturn:
        raise RuntimeError(
            "the fused head does not support torch.vmap, because its tiles depend on the number of "
            "tokens. Call it on the whole batch, or use sequence_logps on the logits"
        )


class Anchor(Unbatched):
    """A 0-d tensor that depends on some tensors in autograd's graph, without keeping them alive.

    No first backward runs through it: it is no input of the function whose gradients it refuses to
    differentiate.
    """

    @staticmethod
    def forward(*inputs: Tensor) -> Tensor:
        return inputs[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
        return tuple([None] * ctx.count)


def anchor(*inputs: Tensor | None) -> Tensor:
    """An anchor for the inputs that require a gradient, for `refuse_second_derivative`.

    Pass it to an autograd function in a tuple, so that torch.func unwraps it at each of its levels.
    """
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    result: Tensor = Anchor.apply(*wanted)  # type: ignore[no-untyped-call]
    return result


def refuse_second_derivative(
    grads: tuple[Tensor | None, ...], *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of a backward, with an error for a second derivative."""
    if not torch.is_grad_enabled():
        return grads
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return tuple(
        None if grad is None else RefuseSecondDerivative.apply(grad, *wanted)  # type: ignore[no-untyped-call]
        for grad in grads
    )


def refuse_batched(upstream: Tensor) -> None:
    """Raise an error for an upstream gradient with a dimension that vmap added."""
    if is_batched(upstream):
        raise RuntimeError(
            "this backward fills its gradients tile by tile, which does not work under "
            "torch.func.jacrev, vmap or is_grads_batched. Differentiate each output in turn, for "
            "example with torch.autograd.functional.jacobian"
        )


class Kind(NamedTuple):
    """Shape and dtype of a tensor, without keeping it alive."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Kind:
        """Those of a tensor."""
        return cls(tensor.shape, tensor.dtype)


def by_side(rows: Tensor | None, kinds: Sequence[Kind]) -> tuple[Tensor | None, ...]:
    """The gradient of the hidden states of all sides, [rows, D], cut into those of each side."""
    if rows is None:
        return (None,) * len(kinds)
    parts = torch.split(rows, [kind.shape[:2].numel() for kind in kinds])
    return tuple(
        part.view(kind.shape).to(kind.dtype) for part, kind in zip(parts, kinds, strict=True)
    )


class Held:
    """Gradients that a forward computed, held until the last backward.

    They are not among autograd's saved tensors, so no hook of the user holds them when the last
    backward overwrites them.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._gradients: tuple[Tensor | None, ...] | None = None

    def put(self, *gradients: Tensor | None) -> None:
        """Hold some gradients, None for those that are not wanted."""
        self._gradients = gradients

    def scaled(self, *factors: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, each times a factor that depends on the upstream gradient.

        The last backward overwrites them, which saves memory of the weight's size.

        Raises:
          RuntimeError: the last backward has run already.
        """
        if self._gradients is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time, but the first backward freed "
                "the gradients. Pass retain_graph=True to all but the last"
            )
        gradients, last = self._gradients, _last_use(factors[0])
        if last:
            self._gradients = None
        return tuple(
            None if gradient is None else _scaled(gradient, factor, overwrite=last)
            for gradient, factor in zip(gradients, factors, strict=True)
        )


def _scaled(gradient: Tensor, factor: Tensor, *, overwrite: bool) -> Tensor:
    if not overwrite:
        return (gradient * factor).to(gradient.dtype)
    # loss.backward() passes 1. Reading the number on a GPU would synchronise, so only a CPU does.
    if factor.ndim == 0 and factor.device.type == "cpu" and factor == 1.0:
        return gradient
    return gradient.mul_(factor)


def _last_use(upstream: Tensor) -> bool:
    """Whether this backward frees the graph, and no transform of torch.func wraps its tensors."""
    if torch.compiler.is_compiling():  # compiled autograd, which cannot trace these calls
        return False
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keep_graph is None or keep_graph():
        return False
    # Under a transform of torch.func, one saved tensor is used with many upstream gradients.
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(upstream)
    return not (wrapped or is_batched(upstream))


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap, or the older vmap behind `is_grads_batched`, added a dimension."""
    if torch.compiler.is_compiling():  # a compiler handles vmap itself
        return False
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))
