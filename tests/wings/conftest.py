"""Every test of this folder runs once for each wing."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from helpers.wings import WINGS, Wing


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """XLA compiles a program for each row, so the default run has a third of JAX's rows."""
    rows = [item for item in items if item.name.startswith("test_fused_is_unfused[jax")]
    for i, item in enumerate(rows):
        if i % 3:
            item.add_marker(pytest.mark.extended)


@pytest.fixture(params=WINGS.values(), ids=WINGS)
def wing(request: pytest.FixtureRequest) -> Iterator[Wing]:
    """The wing. XLA does not optimise, which takes longer than these programs run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield request.param
    jax.config.update("jax_disable_most_optimizations", False)
