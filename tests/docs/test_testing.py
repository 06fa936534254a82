"""docs/testing.md accounts for every mutant that the tests do not notice."""

from __future__ import annotations

import pytest

from helpers.pages import RESULTS, measured

SAMPLES = sorted(path.name for path in RESULTS.glob("mutants_*.csv"))
REASONS = measured("mutant_reasons.csv")


def about(row: dict[str, str]) -> tuple[str, ...]:
    """What makes two mutants the same; the line's number changes with the lines above."""
    return row["file"], row["code"], row["was"], row["mutant"]


@pytest.mark.parametrize("name", SAMPLES)
def test_every_survivor_has_its_reason(name: str) -> None:
    survived = {about(row) for row in measured(name) if row["outcome"] == "survived"}
    assert survived <= {about(row) for row in REASONS}


def test_every_reason_has_its_survivor() -> None:
    rows = [row for name in SAMPLES for row in measured(name)]
    survived = {about(row) for row in rows if row["outcome"] == "survived"}
    assert {about(row) for row in REASONS} <= survived
    assert all(row["reason"] for row in REASONS)
