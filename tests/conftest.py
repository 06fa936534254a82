"""Backends and hypothesis profiles.

All of PyTorch, NumPy, JAX and array-api-strict are imported here without a fallback: a missing
one is a failure of the suite, never a skip.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import array_api_strict
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

# Behind all else: the benchmarks come from the checkout, the package as it is installed.
sys.path.append(str(Path(__file__).parents[1]))

jax.config.update("jax_enable_x64", True)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    # array-api-strict computes on NumPy arrays out of our sight; NumPy's own silence is tested.
    unseen = request.param.name == "strict"
    with np.errstate(all="ignore") if unseen else contextlib.nullcontext():
        yield request.param
