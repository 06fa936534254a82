"""What an operation allocates, as PyTorch's dispatcher sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor of a dtype that any operation returns."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.bytes = dtype, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == self.dtype:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out
