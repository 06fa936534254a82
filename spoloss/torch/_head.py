"""What a call asks of a language-model head: its options, checked with the tensors it works on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spoloss._arrays import check_positive
from spoloss.torch._rows import check_labels
from spoloss.torch._vocab_parallel import VocabShard, join

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class HeadOptions:
    """What a model does between h W^T + b and the softmax, and how it is worked on here.

        logits = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature

    `chunk_size` is the tokens of a tile, or None for the defaults; `dtype` is autocast's, or None
    where autocast is off; `shard` is this rank's part of a head that is split over the vocabulary,
    or None where it is whole; `vocabulary` is V of the whole head.
    """

    softcap: float | None
    logit_scale: float
    temperature: float
    chunk_size: int | None
    dtype: torch.dtype | None
    shard: VocabShard | None
    vocabulary: int


def head_options(
    hidden: dict[str, Tensor],
    labels: dict[str, Tensor],
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
    """The options of a call, after a check of its tensors (name -> tensor) and numbers.

    Raises:
      TypeError: a dtype does not fit, or a tensor is a DTensor.
      ValueError: a shape or a number does not fit, or the ranks of a split head do not agree.
      RuntimeError: a split head is asked for in a compiled graph.
    """
    _refuse_dtensors(hidden, weight)
    device = weight.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    _check_weight(weight, bias)
    for (name, states), (label_name, ids) in zip(hidden.items(), labels.items(), strict=True):
        _check_hidden(name, states, weight, same_dtype=autocast is None)
        check_labels(label_name, ids, name, states)
    check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap)
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive number of tokens, got {chunk_size!r}")
    shard = None
    if vocab_parallel_group is not None:
        shard = _join(vocab_parallel_group, hidden, labels, weight, bias, ignore_index, chunk_size)
    vocabulary = len(weight) if shard is None else shard.vocabulary
    return HeadOptions(softcap, logit_scale, temperature, chunk_size, autocast, shard, vocabulary)


def _refuse_dtensors(hidden: dict[str, Tensor], weight: Tensor) -> None:
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            "weight is a sharded DTensor: call this inside the forward of the FSDP module that "
            "owns the head, where it is whole and its gradient is averaged over the ranks. Of a "
            "head that is split over the vocabulary pass weight.to_local() and vocab_parallel_group"
        )
    for name, states in hidden.items():
        if hasattr(states, "full_tensor"):
            raise TypeError(f"{name} is a DTensor: pass the whole rows as a plain tensor")


def _join(
    group: ProcessGroup,
    hidden: dict[str, Tensor],
    labels: dict[str, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    chunk_size: int | None,
) -> VocabShard:
    if torch.compiler.is_compiling():
        # Dynamo runs the call outside its graph, or says so under fullgraph=True.
        raise RuntimeError("vocab_parallel_group cannot be part of a compiled graph")
    tensors = {**hidden, "weight": weight, "bias": bias}
    facts = {f"the number of tokens of {name}": ids.numel() for name, ids in labels.items()}
    facts |= {
        f"whether {name} requires a gradient": int(tensor is not None and tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    facts |= {"whether there is a bias": int(bias is not None), "chunk_size": chunk_size or 0}
    facts |= {"whether gradients are enabled": int(torch.is_grad_enabled())}
    return join(group, weight, labels.values(), ignore_index, facts)


def _check_weight(weight: Tensor, bias: Tensor | None) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"weight must be real floating, got {weight.dtype}")
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape [V, D], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape [V] = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}"
        )


def _check_hidden(name: str, hidden: Tensor, weight: Tensor, *, same_dtype: bool) -> None:
    if not hidden.is_floating_point() or (same_dtype and hidden.dtype != weight.dtype):
        raise TypeError(f"{name} must have the weight's dtype {weight.dtype}, got {hidden.dtype}")
    if hidden.ndim != 3 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(
            f"{name} must have shape [B, T, D] with the weight's D = {weight.shape[1]}, "
            f"got {tuple(hidden.shape)}"
        )
    if hidden.device != weight.device:
        raise ValueError(f"{name} must be on the weight's {weight.device}, got {hidden.device}")
