"""Combinations of options in which every two values of two options meet at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

TRIES = 40


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows of one value per option, by name; a few more than the two longest options multiply to.

    Greedy: of some random rows the one that meets most pairs of values which have not met. The
    rows are the same at each call.
    """
    generator = random.Random(2)
    values = [[(name, value) for value in options[name]] for name in options]
    missing = dict.fromkeys(
        pair for two in itertools.combinations(values, 2) for pair in itertools.product(*two)
    )

    def random_row() -> dict[str, Any]:
        row = dict(map(generator.choice, values))
        row.update(generator.choice([*missing]))
        return row

    rows = []
    while missing:
        tries = [random_row() for _ in range(TRIES)]
        rows.append(max(tries, key=lambda row: len(missing.keys() & pairs_of(row))))
        for pair in pairs_of(rows[-1]):
            missing.pop(pair, None)
    return rows


def pairs_of(row: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations(row.items(), 2))
