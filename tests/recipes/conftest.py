"""Fixtures of the tests of recipes."""

from __future__ import annotations

import pytest


@pytest.fixture
def fresh_accelerate() -> None:
    """Accelerate's settings are the process's: accumulation would go on in the next test."""
    from accelerate import state

    state.GradientState._reset_state()
    state.AcceleratorState._reset_state(reset_partial_state=True)
