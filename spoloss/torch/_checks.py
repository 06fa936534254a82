"""Checks of the head and the completions that all functions of the fused head share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from spoloss._checks import check_floating
from spoloss._options import check_head_options
from spoloss.torch._arguments import Completions, Head
from spoloss.torch._devices import device_of
from spoloss.torch._head import HeadOptions, tiles_of
from spoloss.torch._labels import Sequences, check_labels, sequences_of
from spoloss.torch._vocab_parallel import VocabShard, join, refuse_compilation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Call(NamedTuple):
    """A call's arguments after all checks.

    Attributes:
      options: the head's options.
      sequences: the sequences of each side.
    """

    options: HeadOptions
    sequences: list[Sequences]


def prepare(head: Head, sides: Mapping[str, Completions]) -> Call:
    """Check the head and the completions, by the names of their arguments.

    Raises:
      TypeError: a dtype does not fit, an option is not a number, an argument is no tensor, or a
        tensor is a DTensor.
      ValueError: a shape, device or number does not fit, ZeRO-3 has partitioned the weight, or the
        ranks of a split head do not agree.
      RuntimeError: a head is split under torch.compile.
    """
    if not isinstance(head, Head):
        raise TypeError(f"head must be a Head, got {type(head).__name__}")
    for name, side in sides.items():
        if not isinstance(side, Completions):
            raise TypeError(f"{name} must be Completions, got {type(side).__name__}")
    options = _check_head(head, sides)
    sequences = [sequences_of(side, name) for name, side in sides.items()]
    if head.vocab_parallel_group is not None:
        hidden = [side.hidden for side in sides.values()]
        shard = _join_shards(head.vocab_parallel_group, head, options, sequences, hidden)
        options = replace(options, shard=shard)
    return Call(options, sequences)


def _check_head(head: Head, sides: Mapping[str, Completions]) -> HeadOptions:
    """Check the tensors and numbers of a call, and return the head's options."""
    check_head_options(head.softcap, head.logit_scale, head.temperature, head.chunk_size)
    check_floating(torch, "head.weight", head.weight)
    for name, side in sides.items():
        check_floating(torch, f"{name}.hidden", side.hidden)
    dtype = _autocast_dtype(head.weight, [side.hidden for side in sides.values()])
    _check_weight(head.weight)
    if head.bias is not None:
        _check_bias(head.bias, head.weight, same_dtype=dtype is None)
    for name, side in sides.items():
        _check_hidden(f"{name}.hidden", side.hidden, head.weight, same_dtype=dtype is None)
        check_labels(f"{name}.", side, f"{name}.hidden")
    return HeadOptions(head.softcap, head.logit_scale, head.temperature, head.chunk_size, dtype)


def _join_shards(
    group: ProcessGroup,
    head: Head,
    options: HeadOptions,
    sides: list[Sequences],
    hidden: Sequence[Tensor],
) -> VocabShard:
    """This rank's part of a head that is split over the vocabulary, from one exchange."""
    refuse_compilation()
    tensors = {"head.weight": head.weight, "head.bias": head.bias}
    tensors |= {f"{side.name}.hidden": h for side, h in zip(sides, hidden, strict=True)}
    facts: dict[str, int] = {}
    for side in sides:
        facts[f"the number of tokens of {side.name}.labels"] = side.targets.numel()
        facts[f"the number of sequences of {side.name}.labels"] = side.count
    for name, tensor in tensors.items():
        needs = tensor is not None and tensor.requires_grad
        facts[f"whether {name} requires a gradient"] = int(needs)
    facts |= {"whether there is a bias": int(head.bias is not None)}
    facts |= {"head.chunk_size": head.chunk_size or 0}
    facts |= {"whether gradients are enabled": int(torch.is_grad_enabled())}
    dtype = options.dtype or head.weight.dtype
    device = device_of(head.weight.new_empty(0, dtype=dtype))
    tiles = tiles_of(head.weight, dtype, head.chunk_size, device)
    targets = [side.targets for side in sides]
    return join(group, head.weight, targets, facts, tiles.heights)


def _autocast_dtype(weight: Tensor, hidden: list[Tensor]) -> torch.dtype | None:
    """Autocast's dtype, or None if autocast is off or, as in PyTorch, a tensor is float64."""
    device = weight.device.type
    wide = any(tensor.dtype == torch.float64 for tensor in (weight, *hidden))
    # The meta device has no autocast, and torch.is_autocast_enabled raises an error for it.
    if device == "meta" or wide or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _check_weight(weight: Tensor) -> None:
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            "head.weight is a sharded DTensor. Call this inside the forward of the FSDP module "
            "that holds the head, where the weight is whole and its gradient is averaged over the "
            "ranks. If the head is split over the vocabulary, pass weight.to_local() and "
            "vocab_parallel_group"
        )
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"head.weight has shape {tuple(weight.shape)} because DeepSpeed ZeRO-3 has partitioned "
            "it. Compute the loss inside the forward of the module that you passed to "
            "deepspeed.initialize, and read the weight there as an attribute "
            "(self.model.lm_head.weight), which gathers it for forward and backward"
        )
    if weight.ndim != 2:
        raise ValueError(f"head.weight must have shape [V, D], got {tuple(weight.shape)}")


def _check_bias(bias: Tensor, weight: Tensor, *, same_dtype: bool) -> None:
    check_floating(torch, "head.bias", bias)
    _check_fit("head.bias", bias, weight, same_dtype=same_dtype)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"head.bias must have shape [V] = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}"
        )


def _check_hidden(name: str, hidden: Tensor, weight: Tensor, *, same_dtype: bool) -> None:
    if hasattr(hidden, "full_tensor"):
        raise TypeError(f"{name} is a DTensor. Pass the whole rows as a plain tensor")
    _check_fit(name, hidden, weight, same_dtype=same_dtype)
    if hidden.ndim != 3 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(
            f"{name} must have shape [B, T, D] with the D = {weight.shape[1]} of head.weight, "
            f"got {tuple(hidden.shape)}"
        )


def _check_fit(name: str, tensor: Tensor, weight: Tensor, *, same_dtype: bool) -> None:
    if same_dtype and tensor.dtype != weight.dtype:
        raise TypeError(
            f"{name} must have the dtype {weight.dtype} of head.weight, got {tensor.dtype}"
        )
    if tensor.device != weight.device:
        raise ValueError(
            f"{name} must be on the {weight.device} of head.weight, got {tensor.device}"
        )
