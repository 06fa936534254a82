"""What the fused head does by device: how large its tiles are, and its products in half precision.

A CPU, and a card before Ampere, has half-precision products of its own only where they are rounded
to half precision; there what must not be rounded is widened first. CUDA multiplies half precision
and sums in float32.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

# Before 2.10 addmm takes no total that is wider than its factors (pytorch/pytorch#167931).
_WIDE_TOTALS = torch.__version__ >= "2.10"


class Device(NamedTuple):
    """How the head works on one kind of device.

    Attributes:
      block_bytes: memory of a block of logits.
      rows: the height of a tile whose blocks are dropped one by one.
      kept_bytes: memory of a tile that is kept whole.
      wide_sums: whether products of half precision can be summed and returned in float32.
      compiles: whether a compiler makes one pass of a block's exponentials.
    """

    block_bytes: int
    rows: int
    kept_bytes: int
    wide_sums: bool
    compiles: bool


CPU = Device(16 * 2**20, 1024, 64 * 2**20, wide_sums=False, compiles=False)
CUDA = Device(
    512 * 2**20,
    4096,
    2 * 2**30,
    wide_sums=True,
    compiles=importlib.util.find_spec("triton") is not None,
)
BEFORE_AMPERE = CUDA._replace(wide_sums=False, compiles=False)


def device_of(tensor: Tensor) -> Device:
    """The kind of device that a tensor is on."""
    if not tensor.is_cuda:
        return CPU
    # NVIDIA's cards before Ampere refuse a wider result, as ROCm did before PyTorch 2.10.
    ampere = torch.cuda.get_device_properties(tensor.device).major >= 8
    wide = ampere and (torch.version.hip is None or _WIDE_TOTALS)
    return CUDA if wide else BEFORE_AMPERE


def product(
    a: Tensor, b: Tensor, dtype: torch.dtype, device: Device, out: Tensor | None = None
) -> Tensor:
    """The product in `dtype`, in `out` if given: not rounded to half precision where possible."""
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    if device.wide_sums:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def accumulate(total: Tensor, a: Tensor, b: Tensor, device: Device, *, empty: bool = False) -> None:
    """Add a @ b to `total`, which holds nothing yet if it is empty.

    Factors of half precision are summed in the dtype of `total`, for which a `b` that is wider than
    `a` is narrowed.
    """
    beta = 0.0 if empty else 1.0
    if not device.wide_sums or a.dtype == total.dtype:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)
        return
    b, unit = _narrowed(b, a.dtype)
    if unit is None and _WIDE_TOTALS and not torch.compiler.is_compiling():
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
        return
    # Inductor of 2.13 has no addmm with an out_dtype (pytorch/pytorch#163880).
    more = product(a, b, total.dtype, device)
    if unit is not None:
        more.mul_(unit)
    total.copy_(more) if empty else total.add_(more)


def _narrowed(b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`b` in `dtype`, and the 0-d unit that it is then counted in, if any."""
    if b.dtype == dtype or dtype != torch.float16:
        return b.to(dtype), None
    # float16 may be too narrow for a pair's slope: the largest number becomes 1.
    unit = b.abs().amax().clamp(min=torch.finfo(b.dtype).tiny)
    return (b / unit).to(dtype), unit


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows at an index that may name one twice, the same to the last bit each time."""
    rows = rows.to(total.dtype)
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)
    else:  # in one order there, and quicker
        total.index_add_(0, index, rows)
