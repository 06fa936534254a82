"""Backends and hypothesis profiles.

All of PyTorch, NumPy, JAX and array-api-strict are imported here without a fallback: a missing
one is a failure of the suite, never a skip.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
import torch

from helpers.backends import BACKENDS, Backend

# Behind all else: the benchmarks come from the checkout, the package as it is installed.
sys.path.append(str(Path(__file__).parents[1]))

jax.config.update("jax_enable_x64", True)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


SLOW = (
    *("distributed", "recipes", "study"),
    *("test_explorer.py", "test_more_losses.py", "test_real_model.py", "test_your_own_loss.py"),
)
"""Tests that start other processes, whole training frameworks, models or a browser."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Importing the frameworks takes as long as many tests.
    return True if config.option.markexpr == "not slow" and is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path):
            item.add_marker("slow")


def is_slow(path: Path) -> bool:
    """Whether all tests of a file are slow."""
    return path.name in SLOW or path.parent.name in SLOW


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    # array-api-strict computes on NumPy arrays out of our sight; NumPy's own silence is tested.
    unseen = request.param.name == "strict"
    with np.errstate(all="ignore") if unseen else contextlib.nullcontext():
        yield request.param
