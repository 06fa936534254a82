"""The array libraries that the core is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_strict
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import torch


@dataclass(frozen=True)
class Backend:
    """One array library: how to make its arrays from NumPy's and what its float types are.

    `exp` is set where the library's exponential has the range and, but for a factor of 1 + |x|,
    the accuracy of that dtype, whatever the dtype of its argument.
    """

    name: str
    array: Callable[[np.ndarray], Any]
    float32: Any
    float64: Any
    exp: type[np.floating] | None = None

    def arrays(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        return tuple(self.array(np.asarray(array)) for array in arrays)

    def rtol(self, wanted: float) -> float:
        """The wanted tolerance, or the one that results of an exponential (|x| < 40) can keep."""
        return wanted if self.exp is None else max(wanted, 40.0 * float(np.finfo(self.exp).eps))


mx.set_default_device(mx.cpu)  # the only one of MLX's devices that has float64


def mlx_array(array: np.ndarray) -> mx.array:
    """As MLX reads NumPy, but for float64, which it would round to float32."""
    return mx.array(array, dtype=mx.float64 if array.dtype == np.float64 else None)


BACKENDS = {
    "numpy": Backend("numpy", np.array, np.float32, np.float64),
    "torch": Backend("torch", torch.tensor, torch.float32, torch.float64),
    "jax": Backend("jax", jnp.asarray, jnp.float32, jnp.float64),
    "mlx": Backend("mlx", mlx_array, mx.float32, mx.float64, exp=np.float32),
    "strict": Backend(
        "strict", array_api_strict.asarray, array_api_strict.float32, array_api_strict.float64
    ),
}
