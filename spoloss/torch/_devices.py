"""Device-dependent settings of the fused head: the size of its tiles, and its matrix products.

CPUs and GPUs older than Ampere round half-precision products to half precision, so the fused head
converts the factors to float32 first. Newer GPUs multiply half precision and sum in float32.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

# Before 2.10, addmm does not accept a total wider than its factors (pytorch/pytorch#167931).
WIDE_TOTALS = torch.__version__ >= "2.10"


class Device(NamedTuple):
    """How the fused head works on one kind of device.

    Attributes:
      block_bytes: memory of one block of logits, which has some columns of a tile.
      rows: tokens per tile if its blocks are not kept.
      kept_bytes: memory of a tile if all its blocks are kept.
      wide_sums: whether products of half precision can be summed and returned in float32.
      compiles: whether torch.compile fuses the exponentials of a block into one kernel.
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
# A GPU needs larger tiles than a CPU. A Mac shares its memory with everything else.
OTHERS = {
    "xpu": BEFORE_AMPERE,
    "mps": Device(128 * 2**20, 2048, 512 * 2**20, wide_sums=False, compiles=False),
}


def device_of(tensor: Tensor) -> Device:
    """The kind of device that a tensor is on."""
    if not tensor.is_cuda:
        return OTHERS.get(tensor.device.type, CPU)
    # NVIDIA GPUs before Ampere do not support a wider result, nor did ROCm before PyTorch 2.10.
    ampere = torch.cuda.get_device_properties(tensor.device).major >= 8
    wide = ampere and (torch.version.hip is None or WIDE_TOTALS)
    return CUDA if wide else BEFORE_AMPERE
