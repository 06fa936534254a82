"""The array libraries of a campaign, and the arrays that it hands to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import numpy as np
import torch

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Value:
    """An array before it has a library: its exact values in float64, and the dtype to make."""

    values: np.ndarray
    dtype: str

    @classmethod
    def rounded(cls, values: Any, dtype: str) -> Value:
        """`values` rounded to `dtype`."""
        narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        with np.errstate(over="ignore", invalid="ignore"):
            return cls(np.asarray(values, dtype=float).astype(narrow).astype(float), dtype)


@dataclass(frozen=True)
class Library:
    """How to make and read the arrays of one library, and what its exponential is good for."""

    name: str
    make: Callable[[Value], Any]
    dtypes: tuple[str, ...]
    single_exp: bool = False

    def finfo(self, dtype: str) -> np.finfo:
        """The accuracy and range to expect of results in `dtype`."""
        return np.finfo("float32" if self.single_exp else dtype)

    @staticmethod
    def read(array: Any) -> np.ndarray:
        """A result as a NumPy array of its own dtype."""
        return array.detach().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def _torch(value: Value) -> torch.Tensor:
    return torch.tensor(value.values).to(getattr(torch, value.dtype))


def _mlx(value: Value) -> mx.array:
    return mx.array(value.values, dtype=mx.float64).astype(getattr(mx, value.dtype))


ALL = tuple(BYTES)
LIBRARIES = {
    "numpy": Library("numpy", lambda v: v.values.astype(v.dtype), ("float16", *ALL[2:])),
    "torch": Library("torch", _torch, ALL),
    "jax": Library("jax", lambda v: jnp.asarray(v.values).astype(v.dtype), ALL),
    "mlx": Library("mlx", _mlx, ALL, single_exp=True),
}


def set_up() -> None:
    """float64 in JAX and MLX, and one thread: the arrays are tiny."""
    jax.config.update("jax_enable_x64", True)
    mx.set_default_device(mx.cpu)
    torch.set_num_threads(1)
