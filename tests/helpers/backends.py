"""The array libraries that the core is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_strict
import jax.numpy as jnp
import numpy as np
import torch


@dataclass(frozen=True)
class Backend:
    """One array library: how to make its arrays from NumPy's and what its float types are."""

    name: str
    array: Callable[[np.ndarray], Any]
    float32: Any
    float64: Any

    def arrays(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        return tuple(self.array(np.asarray(array)) for array in arrays)


BACKENDS = {
    "numpy": Backend("numpy", np.array, np.float32, np.float64),
    "torch": Backend("torch", torch.tensor, torch.float32, torch.float64),
    "jax": Backend("jax", jnp.asarray, jnp.float32, jnp.float64),
    "strict": Backend(
        "strict", array_api_strict.asarray, array_api_strict.float32, array_api_strict.float64
    ),
}
