"""The array libraries of a campaign, and the arrays that it hands to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Value:
    """An array before it has a library: its exact values in float64, and the dtype to make."""

    values: np.ndarray
    dtype: str

    @classmethod
    def rounded(cls, values: Any, dtype: str) -> Value:
        """`values` rounded to `dtype`."""
        values = np.asarray(values, dtype=float)
        with np.errstate(over="ignore", invalid="ignore"):
            if dtype == "bfloat16":  # the sign, the exponent and the upper 7 digits of float32
                bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
                return cls(bits.view(np.float32).astype(float), dtype)
            return cls(values.astype(dtype).astype(float), dtype)


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
        return np.asarray(array.detach() if hasattr(array, "detach") else array)


def _numpy() -> Library:
    return Library("numpy", lambda v: v.values.astype(v.dtype), ("float16", "float32", "float64"))


def _torch() -> Library:
    import torch

    torch.set_num_threads(1)  # the arrays are tiny
    return Library("torch", lambda v: torch.tensor(v.values).to(getattr(torch, v.dtype)), _DTYPES)


def _jax() -> Library:
    import jax

    jax.config.update("jax_enable_x64", True)
    return Library("jax", lambda v: jax.numpy.asarray(v.values).astype(v.dtype), _DTYPES)


def _mlx() -> Library:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)  # the only one of its devices that has float64

    def make(v: Value) -> Any:
        return mx.array(v.values, dtype=mx.float64).astype(getattr(mx, v.dtype))

    return Library("mlx", make, _DTYPES, single_exp=True)


_DTYPES = ("float16", "bfloat16", "float32", "float64")
LOADERS = {"numpy": _numpy, "torch": _torch, "jax": _jax, "mlx": _mlx}
LIBRARIES: dict[str, Library] = {}
"""Those of the campaign."""


def load(names: Iterable[str]) -> None:
    """Import these libraries; the others are not needed."""
    LIBRARIES.clear()
    LIBRARIES.update((name, LOADERS[name]()) for name in names)
