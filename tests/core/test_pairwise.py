"""Rows of options in which every two values meet."""

from __future__ import annotations

import itertools
from typing import Any

from helpers.pairwise import pairwise

OPTIONS: dict[str, list[Any]] = {
    "loss": ["spo", "dpo", "squared"],
    "reduction": ["mean", "sum", "none"],
    "chunk_size": [None, 1, 3, 20],
    "shift": [True, False],
    "unhashable": [[1], [2]],
}


def apart(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The pairs of values of two options that stand in no row together."""
    return [
        (a, x, b, y)
        for a, b in itertools.combinations(OPTIONS, 2)
        for x, y in itertools.product(OPTIONS[a], OPTIONS[b])
        if not any(row[a] == x and row[b] == y for row in rows)
    ]


def test_every_two_values_meet() -> None:
    rows = pairwise(OPTIONS)
    assert all(list(row) == list(OPTIONS) for row in rows)
    assert apart(rows) == []
    assert len(rows) < 20  # all combinations are 144, and 12 is the least there can be
