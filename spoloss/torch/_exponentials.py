"""One block of an online softmax: exponentials of the logits [n, C], and running sums of them.

There are two equivalent forms. One works in place, for PyTorch's eager kernels on a CPU. The other
has no side effects, so that torch.compile can fuse it into a single kernel on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_VECTOR = 16
"""If the width is a known multiple of 16, the compiled kernel loads and stores 16 bytes at once."""


def exponentials_of(
    logits: Tensor,
    column: Tensor,
    shift: Tensor,
    others: Tensor,
    target: Tensor,
    *,
    dtype: torch.dtype,
    compiles: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The exponentials of a block in `dtype`, the new shift and the new sum of the others.

    Args:
      logits: [n, C]; overwritten if nothing is compiled.
      column: [n] the target's column, -1 if it is not in this block.
      shift: [n] the number subtracted from the logits of earlier blocks.
      others: [n] the sum of exp(logit - shift) over earlier blocks, without the target.
      target: [n] the target's logit, -inf if no block so far contains it.
      dtype: the dtype of the exponentials.
      compiles: whether torch.compile fuses the block.
    """
    if not compiles:
        exps, shift, others = exponentials_(logits, column, shift, others)
        return exps.to(dtype), shift, others
    fused = _compiled() if logits.shape[1] % _VECTOR == 0 else exponentials
    return fused(logits, column, shift, others, target, dtype)


def exponentials(
    logits: Tensor,
    column: Tensor,
    shift: Tensor,
    others: Tensor,
    target: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`exponentials_of` without side effects.

    The new shift is the log-sum-exp of all logits so far, so the exponentials are at most 1 and fit
    in half precision. The smallest float16 is 6e-8, so in float16 they are scaled by 2**14.
    """
    peak = torch.maximum(shift, logits.amax(dim=1))
    is_target = torch.arange(logits.shape[1], device=logits.device) == column[:, None]
    exps = torch.where(is_target, 0.0, (logits - peak[:, None]).exp())
    others = others * (shift - peak).exp() + exps.sum(dim=1)
    # The largest term is 1; the total is less only if all logits are -inf or the shift is known.
    total = (others + (target - peak).exp()).clamp(min=1.0)
    if dtype == torch.float16:
        total = total * 2.0**-14
    return (exps / total[:, None]).to(dtype), peak + total.log(), others / total


def exponentials_(
    logits: Tensor, column: Tensor, shift: Tensor, others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`exponentials_of` in place. The new shift is the largest logit so far, which saves a pass."""
    peak = torch.maximum(shift, logits.amax(dim=1))
    exps = logits.sub_(peak[:, None]).exp_()
    index = column.clamp(min=0)[:, None]
    exps.scatter_(1, index, torch.where(column[:, None] >= 0, 0.0, exps.gather(1, index)))
    return exps, peak, others * (shift - peak).exp() + exps.sum(dim=1)


def _aligned_exponentials(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Inductor uses this fact for exactly 16 and does not derive it from a larger multiple.
    torch._check(logits.shape[1] % _VECTOR == 0)  # type: ignore[no-untyped-call]
    return exponentials(logits, *others)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_aligned_exponentials, dynamic=True)
