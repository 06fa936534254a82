"""Every test of this folder runs once for each wing."""

from __future__ import annotations

import pytest

from helpers.wings import WINGS, Wing

COMPILED = ("test_fused.py", "test_half_precision.py", "test_softmax.py", "test_tokens.py")
"""XLA compiles a program for each row of these files."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The default run has a third of JAX's rows where a test has more than six."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        name, _, row = item.name.partition("[")
        if item.path.name in COMPILED and row.startswith("jax"):
            tests.setdefault(f"{item.path}{name}", []).append(item)
    for rows in tests.values():
        for i, item in enumerate(rows):
            if len(rows) > 6 and i % 3:
                item.add_marker(pytest.mark.extended)


@pytest.fixture(params=WINGS.values(), ids=WINGS)
def wing(request: pytest.FixtureRequest) -> Wing:
    return request.param


@pytest.fixture(autouse=True)
def of_every_test(quick_compiler: None) -> None:
    """All of them run programs of a few numbers."""
