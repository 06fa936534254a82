"""One block of an online softmax: exponentials of the logits [n, C], and running sums of them.

There are two equivalent forms. One works in place, for PyTorch's eager kernels on a CPU. The other
has no side effects, so that torch.compile can fuse it into a single kernel on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_VECTOR = 16
"""If the width is a known multiple of 16, the compiled kernel loads and stores 16 bytes at once."""


class Exponentials(NamedTuple):
    """The exponentials of a block of n tokens, and the running sums with this block included.

    Attributes:
      exps: [n, C] exp(logit - shift), 0 at the targets.
      shift: [n] at least the largest logit so far, unless the dtype is float16.
      peak: [n] the largest logit so far, a float that no operation has rounded.
      others: [n] the sum of exp(logit - peak) so far, without the target.
    """

    exps: Tensor
    shift: Tensor
    peak: Tensor
    others: Tensor


def exponentials_of(
    logits: Tensor,
    column: Tensor,
    peak: Tensor,
    others: Tensor,
    target: Tensor,
    *,
    dtype: torch.dtype,
    compiles: bool,
) -> Exponentials:
    """The exponentials of a block in `dtype`, and the sums with this block included.

    Args:
      logits: [n, C]; overwritten if nothing is compiled.
      column: [n] the target's column, -1 if it is not in this block.
      peak: [n] the largest logit of earlier blocks.
      others: [n] the sum of exp(logit - peak) over earlier blocks, without the target.
      target: [n] the target's logit, -inf if no block so far contains it.
      dtype: the dtype of the exponentials.
      compiles: whether torch.compile fuses the block.
    """
    if not compiles:
        exps, peak, others = exponentials_(logits, column, peak, others)
        return Exponentials(exps.to(dtype), peak, peak, others)
    fused = _compiled() if logits.shape[1] % _VECTOR == 0 else exponentials
    return Exponentials(*fused(logits, column, peak, others, target, dtype))


def exponentials(
    logits: Tensor,
    column: Tensor,
    peak: Tensor,
    others: Tensor,
    target: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`exponentials_of` without side effects.

    The shift is the log-sum-exp of all logits so far, so the exponentials are at most 1 and fit in
    half precision. The smallest float16 is 6e-8, so in float16 they are scaled by 2**14.
    """
    before, peak = peak, torch.maximum(peak, logits.amax(dim=1))
    is_target = torch.arange(logits.shape[1], device=logits.device) == column[:, None]
    exps = torch.where(is_target, 0.0, (logits - peak[:, None]).exp())
    others = others * (before - peak).exp() + exps.sum(dim=1)
    # The largest term is 1; the total is less only if all logits are -inf or the peak is known.
    total = (others + (target - peak).exp()).clamp(min=1.0)
    if dtype == torch.float16:
        total = total * 2.0**-14
    shift = peak + total.log()
    # The shift is rounded to the size of the peak, so divide by what it adds after rounding.
    return (exps / (shift - peak).exp()[:, None]).to(dtype), shift, peak, others


def exponentials_(
    logits: Tensor, column: Tensor, peak: Tensor, others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`exponentials_of` in place. The shift is the new peak, which saves a pass."""
    before, peak = peak, torch.maximum(peak, logits.amax(dim=1))
    exps = logits.sub_(peak[:, None]).exp_()
    index = column.clamp(min=0)[:, None]
    exps.scatter_(1, index, torch.where(column[:, None] >= 0, 0.0, exps.gather(1, index)))
    return exps, peak, others * (before - peak).exp() + exps.sum(dim=1)


def _aligned_exponentials(logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
    # Inductor uses this fact for exactly 16 and does not derive it from a larger multiple.
    torch._check(logits.shape[1] % _VECTOR == 0)  # type: ignore[no-untyped-call]
    return exponentials(logits, *others)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_aligned_exponentials, dynamic=True)
