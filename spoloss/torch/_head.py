"""The language-model head by tiles: rows of hidden states -> log-probabilities and gradients.

A tile is [n, V]: n tokens against the whole vocabulary. It exists once, is filled, turned in place
into softmax - onehot, multiplied into the gradients, and filled again.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spoloss._arrays import check_positive
from spoloss.torch._rows import check_labels
from spoloss.torch._vocab_parallel import VocabShard, join

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TILE_BYTES = 48 * 2**20
# A pair that fits a tile needs no scratch of the weight's size, so a trained head's tile is larger.
_TILE_BYTES_TRAINED = 64 * 2**20
_TILE_BYTES_CUDA = 2**30
_LEAST_ROWS = 256
_HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class HeadOptions:
    """What a model does between h W^T + b and the softmax, and how it is worked on here.

        logits = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature

    `rows` is the height of a tile; `dtype` is autocast's, or None where autocast is off; `shard`
    is this rank's part of a head that is split over the vocabulary, or None where it is whole.
    """

    softcap: float | None
    logit_scale: float
    temperature: float
    rows: int
    dtype: torch.dtype | None
    shard: VocabShard | None


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
    rows = chunk_size or _default_rows(weight, len(weight) if shard is None else shard.largest)
    return HeadOptions(softcap, logit_scale, temperature, rows, autocast, shard)


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


def _default_rows(weight: Tensor, vocabulary: int) -> int:
    budget = _TILE_BYTES_TRAINED if weight.requires_grad else _TILE_BYTES
    if weight.is_cuda:
        budget = _TILE_BYTES_CUDA
    row = vocabulary * torch.promote_types(weight.dtype, torch.float32).itemsize
    return max(_LEAST_ROWS, budget // max(row, 1))


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


class Head:
    """weight [V, D], bias [V] and the options of the model. A split head's V is its shard's."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> None:
        self.weight = weight if options.dtype is None else weight.to(options.dtype)
        self.bias = bias
        self.softcap = options.softcap
        self.logit_scale = options.logit_scale
        self.temperature = options.temperature
        self.rows = options.rows
        self.shard = options.shard

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, log-probabilities and sums: at least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def gain(self) -> float:
        """Derivative of the logits by h W^T + b, without the factor of softcap."""
        return self.logit_scale / self.temperature

    def buffer(self, rows: int) -> Tensor:
        """An empty tile."""
        return self.weight.new_empty(min(rows, self.rows), self.weight.shape[0], dtype=self.dtype)

    def direction(self, hidden: Tensor, targets: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of n targets, and -(their derivative) by h W^T + b, over gain.

        Args:
          hidden: [n, D].
          targets: [n], in [0, V).
          tile: at least [n, V]; overwritten.

        Returns:
          Log-probabilities [n], and softmax - onehot [n, V] (times softcap's derivative).
        """
        logits, bend = self._logits(hidden, tile[: len(hidden)])
        if self.shard is not None:
            logps, direction = self.shard.softmax_minus_onehot_(logits, targets)
        elif torch.compiler.is_compiling():
            logps, direction = softmax_minus_onehot(logits, targets, logits.dtype)
        elif logits.is_cuda and _HAS_TRITON:
            logps, direction = _compiled()(logits, targets, self.weight.dtype)
        else:
            logps, direction = softmax_minus_onehot_(logits, targets)
        return logps, direction if bend is None else direction.mul_(bend)

    def logps(self, hidden: Tensor, targets: Tensor, tile: Tensor) -> Tensor:
        """The log-probabilities alone, [n]."""
        logits, _ = self._logits(hidden, tile[: len(hidden)])
        if self.shard is not None:
            return self.shard.log_softmax_at(logits, targets)
        if torch.compiler.is_compiling():
            logits = logits.log_softmax(dim=1)
        else:
            torch.log_softmax(logits, dim=1, out=logits)
        return logits.gather(1, targets[:, None]).squeeze(1)

    def back(self, direction: Tensor) -> Tensor:
        """The derivative by the hidden rows, direction @ weight: [n, D], in at least float32."""
        return _product(direction.to(self.weight.dtype), self.weight, self.dtype)

    def complete(self, *grad_hidden: Tensor | None) -> None:
        """Add to gradients by hidden states what the other shards of the head contribute."""
        if self.shard is not None:
            self.shard.sum_(*grad_hidden)

    def _logits(self, hidden: Tensor, tile: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits [n, V] in `tile`, and softcap's derivative 1 - tanh^2 where there is one."""
        logits = _product(hidden, self.weight.t(), self.dtype, out=tile)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.softcap is None:
            return (logits if self.gain == 1.0 else logits.mul_(self.gain)), None
        logits.mul_(self.logit_scale / self.softcap).tanh_()
        bend = 1.0 - logits * logits
        return logits.mul_(self.softcap / self.temperature), bend


class HeadGrad:
    """The gradient of a head, gathered over tiles in at least float32."""

    def __init__(self, head: Head, *, weight: bool, bias: bool) -> None:
        self.dtype = head.weight.dtype
        self.weight = torch.zeros_like(head.weight, dtype=head.dtype) if weight else None
        self.bias = (
            torch.zeros_like(head.bias, dtype=head.dtype)
            if bias and head.bias is not None
            else None
        )

    def add(self, direction: Tensor, hidden: Tensor, factor: Tensor) -> None:
        """Add a tile's: (factor of each row * direction)^T @ hidden."""
        if self.weight is not None:
            # The factor goes where the array is small: on n x D, not on n x V.
            _accumulate(self.weight, direction, hidden * factor[:, None], self.dtype)
        if self.bias is not None:
            _accumulate(self.bias[:, None], direction, factor[:, None], self.dtype)

    def add_scaled(self, other: HeadGrad, factor: Tensor) -> None:
        """Add another gradient times a 0-d factor, without a temporary of its size."""
        if self.weight is not None and other.weight is not None:
            self.weight.addcmul_(other.weight, factor)
        if self.bias is not None and other.bias is not None:
            self.bias.addcmul_(other.bias, factor)

    def like(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The two gradients, in the dtypes of what they are gradients of."""
        return (
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )

    def clear(self) -> None:
        """Back to zero."""
        for grad in (self.weight, self.bias):
            if grad is not None:
                grad.zero_()


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


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A matrix product in `dtype`: not rounded to half precision first where CUDA can do so."""
    if a.dtype == dtype:
        return torch.mm(a, b, out=None if torch.compiler.is_compiling() else out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _accumulate(total: Tensor, direction: Tensor, scaled: Tensor, dtype: torch.dtype) -> None:
    """Add direction^T @ scaled; on CUDA by a product in `dtype`, never rounded to it afterwards."""
    if total.is_cuda and dtype != total.dtype:
        rows = direction.to(dtype).t()
        torch.addmm(total, rows, scaled.to(dtype), out_dtype=total.dtype, out=total)
    else:
        total.addmm_(direction.t(), scaled.to(total.dtype))


def softmax_minus_onehot(
    logits: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n] and softmax - onehot [n, V] in `dtype`, for a compiler to fuse."""
    logps = logits.log_softmax(dim=1)
    onehot = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    chosen = logps.gather(1, targets[:, None]).squeeze(1)
    return chosen, (logps.exp() - onehot.to(logps.dtype)).to(dtype)


def softmax_minus_onehot_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same in place: on the CPU a second tile would cost as much time as it does memory."""
    torch.log_softmax(logits, dim=1, out=logits)
    logps = logits.gather(1, targets[:, None])
    logits.exp_().scatter_add_(1, targets[:, None], -torch.ones_like(logps))
    return logps.squeeze(1), logits


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]:
    return torch.compile(softmax_minus_onehot, dynamic=True)
