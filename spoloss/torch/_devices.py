"""Device-dependent settings of the fused head: the size of its tiles, and its matrix products.

CPUs round half-precision products to half precision, as the model's own logits are. There, the sums
of the gradients have factors in float32. NVIDIA GPUs multiply half precision and sum in float32:
bfloat16 since Ampere (compute capability 8), float16 before it too.

Read in PyTorch's source (ATen/cuda/CUDABlas.cpp), and not run on such a card: `mm` and `addmm` with
float32 results refuse bfloat16 below compute capability 8 and float16 on none, where they call
cublasGemmEx with float32 sums; but they refuse float16 if
`torch.backends.cuda.matmul.allow_fp16_accumulation` is set.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from spoloss.torch._tiles import CPU_MEMORY, GPU_MEMORY, MPS_MEMORY, Memory, gpu_memory

# Before 2.10, addmm does not accept a total wider than its factors (pytorch/pytorch#167931).
WIDE_TOTALS = torch.__version__ >= "2.10"


class Device(NamedTuple):
    """How the fused head works on one kind of device.

    Attributes:
      memory: what it spends on tiles.
      wide_sums: whether products of half precision can be summed and returned in float32.
      compiles: whether torch.compile fuses the exponentials of a block into one kernel.
    """

    memory: Memory
    wide_sums: bool
    compiles: bool

    def factor_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of exponentials for a head with products in `dtype`."""
        return dtype if self.wide_sums else torch.promote_types(dtype, torch.float32)


CPU = Device(CPU_MEMORY, wide_sums=False, compiles=False)
CUDA = Device(GPU_MEMORY, wide_sums=True, compiles=importlib.util.find_spec("triton") is not None)
BEFORE_AMPERE = CUDA._replace(wide_sums=False, compiles=False)
OTHERS = {
    "xpu": BEFORE_AMPERE,
    "npu": BEFORE_AMPERE,
    "mps": Device(MPS_MEMORY, wide_sums=False, compiles=False),
}


def device_of(tensor: Tensor) -> Device:
    """The kind of device that a tensor is on."""
    if not tensor.is_cuda:
        return OTHERS.get(tensor.device.type, CPU)
    card = torch.cuda.get_device_properties(tensor.device)
    device = CUDA if card.major >= 8 else BEFORE_AMPERE
    if torch.version.hip is not None:
        device = CUDA if WIDE_TOTALS else BEFORE_AMPERE
    elif tensor.dtype == torch.float16:
        narrow = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
        device = device._replace(wide_sums=not narrow)
    memory = Memory(*map(min, device.memory, gpu_memory(card.total_memory)))
    return device._replace(memory=memory, compiles=device.compiles and not _is_disabled())


def _is_disabled() -> bool:
    """Whether torch.compile does nothing, as with TORCH_COMPILE_DISABLE=1."""
    from torch._dynamo import config  # takes a second, and a CPU does not need it

    return bool(config.disable)
