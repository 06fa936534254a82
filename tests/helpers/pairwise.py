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
    generator = random.Random(0)
    names = list(options)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }
    rows = []
    while missing:
        open_pairs = sorted(missing)
        tries = [_row(generator, options, open_pairs) for _ in range(TRIES)]
        row = max(tries, key=lambda row: len(missing & _pairs(names, row)))
        missing -= _pairs(names, row)
        rows.append({name: options[name][row[name]] for name in names})
    return rows


def _row(
    generator: random.Random, options: Mapping[str, Sequence[Any]], missing: list[Any]
) -> dict[str, int]:
    """A random row around a pair of values that have not met."""
    row = {name: generator.randrange(len(values)) for name, values in options.items()}
    row.update(dict(generator.choice(missing)))
    return row


def _pairs(names: Sequence[str], row: dict[str, int]) -> set[Any]:
    return set(itertools.combinations([(name, row[name]) for name in names], 2))
