"""Every test of this folder runs once for each wing."""

from __future__ import annotations

import pytest

from helpers.wings import WINGS, Wing


@pytest.fixture(params=WINGS.values(), ids=WINGS)
def wing(request: pytest.FixtureRequest) -> Wing:
    return request.param  # type: ignore[no-any-return]
