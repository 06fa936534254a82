"""Which pairs share a tile of tokens. Integers in, integers out, without tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Budget(NamedTuple):
    """The largest number of tokens in one tile.

    Attributes:
      shared: if several pairs share the tile.
      single: if the tile is one whole pair.
      part: if the tile is part of a pair that is longer than `single`.
    """

    shared: int
    single: int
    part: int


class Group(NamedTuple):
    """Consecutive pairs, from `first` up to but not including `last`.

    Attributes:
      first: the first pair.
      last: one past the last pair.
      fits: whether all their tokens fit in one tile. If not, the group is one long pair.
    """

    first: int
    last: int
    fits: bool


def plan(lengths: Sequence[int], budget: Budget) -> list[Group]:
    """Groups that cover all pairs in order, each as large as the budget allows.

    Args:
      lengths: the number of tokens of each pair, both sides together.
      budget: the largest number of tokens per tile.
    """
    groups: list[Group] = []
    first = 0
    while first < len(lengths):
        last, tokens = first + 1, lengths[first]
        while last < len(lengths) and tokens + lengths[last] <= budget.shared:
            tokens += lengths[last]
            last += 1
        groups.append(Group(first, last, last > first + 1 or tokens <= budget.single))
        first = last
    return groups


def tiles(rows: slice, most: int) -> Iterator[slice]:
    """Some rows in slices of about equal size, at most `most` rows each."""
    count = rows.stop - rows.start
    even = math.ceil(count / max(1, math.ceil(count / most)))
    for start in range(rows.start, rows.stop, max(1, even)):
        yield slice(start, min(start + even, rows.stop))


def tallest(lengths: Sequence[int], groups: Sequence[Group], budget: Budget) -> int:
    """An upper bound of the tokens of any tile that the groups need."""
    return max(
        (sum(lengths[g.first : g.last]) if g.fits else budget.part for g in groups), default=0
    )
