"""Checks of the tensors and options that all functions of the fused head share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spoloss._options import check_head_options
from spoloss.torch._devices import device_of
from spoloss.torch._head import HeadOptions, factor_dtype_of
from spoloss.torch._labels import check_cu_seqlens, check_labels
from spoloss.torch._vocab_parallel import VocabShard, join, refuse_compilation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Side(NamedTuple):
    """The arguments that describe one side, with the prefix of their names.

    Attributes:
      prefix: "chosen_", "rejected_", or "" if there is only one side.
      hidden: [B, T, D].
      labels: [B, T].
      cu_seqlens: [S + 1] or None.
    """

    prefix: str
    hidden: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None


def sequences_of(side: Side) -> int:
    """The number of sequences. No property, because PyTorch 2.8 does not compile one here."""
    return len(side.labels) if side.cu_seqlens is None else len(side.cu_seqlens) - 1


def head_options(
    sides: list[Side],
    weight: Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    chunk_size: int | None,
    ignore_index: int,
    vocab_parallel_group: ProcessGroup | None,
) -> HeadOptions:
    """Check the tensors and numbers of a call, and return its options.

    Raises:
      TypeError: a dtype does not fit, an option is not a number, or a tensor is a DTensor.
      ValueError: a shape or a number does not fit, the weight is partitioned by ZeRO-3, or the
        ranks of a split head do not agree.
      RuntimeError: a split head is used in a compiled graph.
    """
    check_head_options(softcap, logit_scale, temperature, chunk_size)
    check_floating("weight", weight)
    for side in sides:
        check_floating(f"{side.prefix}hidden", side.hidden)
    _check_whole(sides, weight)
    dtype = _autocast_dtype(sides, weight)
    _check_weight(weight, bias, same_dtype=dtype is None)
    for side in sides:
        _check_hidden(f"{side.prefix}hidden", side.hidden, weight, same_dtype=dtype is None)
        labels = f"{side.prefix}labels"
        check_labels(labels, side.labels, f"{side.prefix}hidden", side.hidden)
        if side.cu_seqlens is not None:
            check_cu_seqlens(f"{side.prefix}cu_seqlens", side.cu_seqlens, labels, side.labels)
    shard = None
    if vocab_parallel_group is not None:
        shard = _join(vocab_parallel_group, sides, weight, bias, ignore_index, chunk_size, dtype)
    return HeadOptions(softcap, logit_scale, temperature, chunk_size, dtype, shard)


def _autocast_dtype(sides: list[Side], weight: Tensor) -> torch.dtype | None:
    """Autocast's dtype, or None if autocast is off or, as in PyTorch, a tensor is float64."""
    device = weight.device.type
    tensors = [weight, *(side.hidden for side in sides)]
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    # The meta device has no autocast, and torch.is_autocast_enabled raises an error for it.
    if device == "meta" or wide or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _check_whole(sides: list[Side], weight: Tensor) -> None:
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            "weight is a sharded DTensor. Call this inside the forward of the FSDP module that "
            "holds the head, where the weight is whole and its gradient is averaged over the "
            "ranks. If the head is split over the vocabulary, pass weight.to_local() and "
            "vocab_parallel_group"
        )
    for side in sides:
        if hasattr(side.hidden, "full_tensor"):
            raise TypeError(
                f"{side.prefix}hidden is a DTensor. Pass the whole rows as a plain tensor"
            )
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} because DeepSpeed ZeRO-3 has partitioned it. "
            "Compute the loss inside the forward of the module that you passed to "
            "deepspeed.initialize, and read the weight there as an attribute "
            "(self.model.lm_head.weight), which gathers it for forward and backward"
        )


def _join(
    group: ProcessGroup,
    sides: list[Side],
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    chunk_size: int | None,
    dtype: torch.dtype | None,
) -> VocabShard:
    refuse_compilation()
    tensors: dict[str, Tensor | None] = {f"{side.prefix}hidden": side.hidden for side in sides}
    tensors |= {"weight": weight, "bias": bias}
    facts = {f"the number of tokens of {side.prefix}labels": side.labels.numel() for side in sides}
    facts |= {
        f"the number of sequences of {side.prefix}labels": sequences_of(side) for side in sides
    }
    facts |= {
        f"whether {name} requires a gradient": int(tensor is not None and tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    facts |= {"whether there is a bias": int(bias is not None), "chunk_size": chunk_size or 0}
    facts |= {"whether gradients are enabled": int(torch.is_grad_enabled())}
    device = device_of(weight)
    itemsize = factor_dtype_of(dtype or weight.dtype, device).itemsize
    return join(
        group,
        weight,
        [side.labels for side in sides],
        ignore_index,
        facts,
        rows=device.rows,
        kept_numbers=device.kept_bytes // itemsize,
    )


def check_floating(name: str, value: Any) -> None:
    """Raise an error for anything but a real floating tensor.

    Raises:
      TypeError: `value` is not a tensor, or not real floating.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a PyTorch tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be real floating, got {value.dtype}")


def _check_weight(weight: Tensor, bias: Tensor | None, *, same_dtype: bool) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape [V, D], got {tuple(weight.shape)}")
    if bias is None:
        return
    check_floating("bias", bias)
    if same_dtype and bias.dtype != weight.dtype:
        raise TypeError(f"bias must have the weight's dtype {weight.dtype}, got {bias.dtype}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape [V] = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}"
        )
    if bias.device != weight.device:
        raise ValueError(f"bias must be on the weight's {weight.device}, got {bias.device}")


def _check_hidden(name: str, hidden: Tensor, weight: Tensor, *, same_dtype: bool) -> None:
    if same_dtype and hidden.dtype != weight.dtype:
        raise TypeError(f"{name} must have the weight's dtype {weight.dtype}, got {hidden.dtype}")
    if hidden.ndim != 3 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(
            f"{name} must have shape [B, T, D] with the weight's D = {weight.shape[1]}, "
            f"got {tuple(hidden.shape)}"
        )
    if hidden.device != weight.device:
        raise ValueError(f"{name} must be on the weight's {weight.device}, got {hidden.device}")
