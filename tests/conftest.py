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

import spoloss
from helpers.backends import BACKENDS, Backend
from helpers.interpreter import run_python

TESTS = Path(__file__).parent
EXTENDED = {"extended", "study"}
"""Folders whose tests are all extended; the default run does not even import them."""

# Behind all else: the benchmarks come from the checkout, the package as it is installed.
sys.path.append(str(TESTS.parent))

jax.config.update("jax_enable_x64", True)
# Half the time of compilation, which takes longer than programs of a few numbers run.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".lstrip()
)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile(
    "nightly", deadline=None, derandomize=False, max_examples=1000, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure() -> None:
    """Tests and the processes that they start must import one package, the installed one."""
    theirs = run_python("-c", "import spoloss; print(spoloss.__file__)").stdout.strip()
    if Path(theirs).resolve() != Path(spoloss.__file__).resolve():
        pytest.exit(
            f"The tests import {spoloss.__file__}, but the processes that they start import "
            f"{theirs or 'no spoloss'}: install the package, and run `pytest`, not "
            "`python -m pytest`.",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Importing the frameworks takes as long as many tests.
    default = config.option.markexpr == "not extended"
    return True if default and is_extended(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_extended(item.path):
            item.add_marker("extended")


def is_extended(path: Path) -> bool:
    """Whether a file lies in such a folder, or is one."""
    return TESTS in path.parents and not EXTENDED.isdisjoint(path.relative_to(TESTS).parts)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """XLA does not optimise, which takes longer than programs of a few numbers run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    # array-api-strict computes on NumPy arrays out of our sight; NumPy's own silence is tested.
    unseen = request.param.name == "strict"
    with np.errstate(all="ignore") if unseen else contextlib.nullcontext():
        yield request.param
