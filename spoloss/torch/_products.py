"""Matrix products of half-precision factors, in float32 where the device allows it."""

from __future__ import annotations

import torch
from torch import Tensor

from spoloss.torch._devices import WIDE_TOTALS, Device


def product(
    a: Tensor, b: Tensor, dtype: torch.dtype, device: Device, out: Tensor | None = None
) -> Tensor:
    """A @ b in `dtype`, written to `out` if it is given.

    A device without wide sums rounds the product to the factors' dtype first.
    """
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    if device.wide_sums:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def accumulate(total: Tensor, a: Tensor, b: Tensor, device: Device, *, empty: bool = False) -> None:
    """Add a @ b to `total` in the dtype of `total`. With `empty`, overwrite `total`.

    On a device with wide sums, a `b` that is wider than `a` is rounded to the dtype of `a`.
    """
    beta = 0.0 if empty else 1.0
    if not device.wide_sums or a.dtype == total.dtype:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)
        return
    b, unit = _narrowed(b, a.dtype)
    if unit is None and WIDE_TOTALS:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
        return
    more = product(a, b, total.dtype, device)
    if unit is not None:
        more.mul_(unit)
    total.copy_(more) if empty else total.add_(more)


def scaled(rows: Tensor, factor: Tensor, device: Device) -> Tensor:
    """Rows [n, D] times a factor [n, 1], as a right factor of `accumulate`."""
    if not device.wide_sums or rows.dtype != torch.bfloat16:
        return rows * factor
    # One kernel multiplies in float32 and rounds, where an array in float32 would take two.
    return torch.mul(rows, factor, out=torch.empty_like(rows))


def _narrowed(b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`b` in `dtype`, and the 0-d factor to multiply it by afterwards, or None."""
    if b.dtype == dtype or dtype != torch.float16 or b.numel() == 0:
        return b.to(dtype), None  # a tile without tokens has no largest number
    # A pair's slope may be outside float16's range, so scale the largest number to 1.
    unit = b.abs().amax().clamp(min=torch.finfo(b.dtype).tiny)
    return (b / unit).to(dtype), unit


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows at an index that may repeat, deterministically to the last bit."""
    rows = rows.to(total.dtype)
    if total.device.type == "cpu":  # where index_add_ adds in order and is faster
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)
