"""Which pairs share a tile: integers alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spoloss.torch._plan import Budget, Group, plan, tallest, tiles

LENGTHS = st.lists(st.integers(0, 40), max_size=30)
BUDGETS = st.builds(Budget, st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))


def test_pairs_share_a_tile_as_long_as_the_budget_lasts() -> None:
    budget = Budget(shared=10, single=12, part=5)
    assert plan([4, 6, 1, 12, 3, 13, 0, 2], budget) == [
        Group(0, 2, fits=True),  # 10 tokens fill the tile
        Group(2, 3, fits=True),
        Group(3, 4, fits=True),  # 12: more than pairs may share, as much as one may take
        Group(4, 5, fits=True),
        Group(5, 6, fits=False),  # 13: a long pair
        Group(6, 8, fits=True),
    ]


@given(LENGTHS, BUDGETS)
def test_groups_cover_all_pairs_within_the_budget(lengths: list[int], budget: Budget) -> None:
    groups = plan(lengths, budget)
    assert [g.first for g in groups] + [len(lengths)] == [0] * (not groups) + [
        *(g.first for g in groups[:1]),
        *(g.last for g in groups),
    ]
    for group in groups:
        tokens = sum(lengths[group.first : group.last])
        alone = group.last == group.first + 1
        assert group.fits == (tokens <= (max(budget.single, 0) if alone else budget.shared))
        if not alone:
            assert tokens <= budget.shared
        if group.last < len(lengths) and group.fits:
            assert tokens + lengths[group.last] > budget.shared


@given(st.integers(0, 50), st.integers(0, 300), st.integers(1, 40))
def test_tiles_cover_all_rows_in_about_one_size(start: int, count: int, most: int) -> None:
    parts = list(tiles(slice(start, start + count), most))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(
        range(start, start + count)
    )
    heights = [part.stop - part.start for part in parts]
    assert all(0 < height <= most for height in heights)
    assert len(parts) == -(-count // most)  # as few as possible


@given(LENGTHS, BUDGETS)
def test_no_tile_is_taller_than_the_tallest(lengths: list[int], budget: Budget) -> None:
    groups = plan(lengths, budget)
    bound = tallest(lengths, groups, budget)
    for group in groups:
        tokens = sum(lengths[group.first : group.last])
        assert (tokens if group.fits else min(tokens, budget.part)) <= bound


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_without_tokens_there_is_no_tile(lengths: list[int]) -> None:
    assert tallest(lengths, plan(lengths, Budget(8, 8, 8)), Budget(8, 8, 8)) == 0
