"""Matrix products of half-precision factors, in float32 where the device allows it."""

from __future__ import annotations

import math

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


def accumulate(
    total: Tensor,
    a: Tensor,
    b: Tensor,
    device: Device,
    *,
    unit: Tensor | None = None,
    empty: bool = False,
) -> None:
    """Add a @ b to `total` in the dtype of `total`. With `empty`, overwrite `total`.

    On a device with wide sums, `b` is rounded to the dtype of `a`. There, `unit`, 0-d, multiplies
    the product.
    """
    beta = 0.0 if empty else 1.0
    if not device.wide_sums or a.dtype == total.dtype:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)
        return
    b = b.to(a.dtype)
    if WIDE_TOTALS and unit is None:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
        return
    more = product(a, b, total.dtype, device)
    if empty:
        total.copy_(more) if unit is None else torch.mul(more, unit, out=total)
    else:
        total.add_(more) if unit is None else total.addcmul_(more, unit)


def scaled(rows: Tensor, factor: Tensor, device: Device) -> Tensor:
    """Rows [n, D] times a factor [n, 1], as a right factor of `accumulate`."""
    if not device.wide_sums:
        return rows * factor
    # One kernel multiplies in float32 and rounds, where an array in float32 would take two.
    return torch.mul(rows, factor, out=torch.empty_like(rows))


def unit_of(rows: Tensor, factor: Tensor) -> Tensor:
    """A power of two, 0-d, by which a tile's factors [n] are divided to be in float16's range.

    A pair's slope may be outside of it. With this unit, rows * factor / unit and factor / unit are
    at most 2**14 and not all much less, so that the small ones keep their digits.
    """
    largest = torch.linalg.vector_norm(rows, math.inf, dim=1).clamp(min=1.0) * factor.abs()
    largest = largest.new_zeros(()) if len(largest) == 0 else largest.amax()
    exponent = torch.frexp(largest).exponent.to(largest.dtype)
    return torch.exp2(exponent.clamp(min=-100.0) - 14.0)


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows at an index that may repeat, deterministically to the last bit."""
    rows = rows.to(total.dtype)
    if total.device.type == "cpu":  # where index_add_ adds in order and is faster
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)
