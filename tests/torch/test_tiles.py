"""How large tiles and blocks are, and which pairs share a tile: integers alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from spoloss.torch._devices import CPU, CUDA, Device
from spoloss.torch._head import tiles_of
from spoloss.torch._products import unit_of
from spoloss.torch._tiles import Group, Heights, Memory, Tiles, logits_rows, plan, tallest, tiles

LENGTHS = st.lists(st.integers(0, 40), max_size=30)
HEIGHTS = st.builds(Heights, *4 * [st.integers(1, 30)])

MIB = 2**20
DEVICES = {"cpu": CPU, "cuda": CUDA}
MEMORY = {
    "cpu": Memory(block_bytes=16 * MIB, rows=1024, kept_bytes=64 * MIB, sums_bytes=16 * MIB),
    "cuda": Memory(block_bytes=512 * MIB, rows=4096, kept_bytes=2048 * MIB, sums_bytes=32 * MIB),
}
VOCABULARIES = (1, 1024, 31_999, 32_000, 50_257, 151_936)
every_device = pytest.mark.parametrize("name", DEVICES)


def sizes(
    vocabulary: int,
    device: Device,
    *,
    width: int = 512,
    dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
) -> Tiles:
    weight = torch.empty(vocabulary, width, dtype=dtype, device="meta")
    return tiles_of(weight, dtype, chunk_size, device)


def test_pairs_share_a_tile_as_long_as_it_has_room() -> None:
    heights = Heights(rows=1, shared=10, single=12, part=5)
    assert plan([4, 6, 1, 12, 3, 13, 0, 2], heights) == [
        Group(slice(0, 2), fits=True),  # 10 tokens fill the tile
        Group(slice(2, 3), fits=True),
        Group(slice(3, 4), fits=True),  # 12: more than pairs may share, as much as one may take
        Group(slice(4, 5), fits=True),
        Group(slice(5, 6), fits=False),  # 13: a long pair
        Group(slice(6, 8), fits=True),
    ]


@given(LENGTHS, HEIGHTS)
def test_groups_cover_all_pairs_within_the_heights(lengths: list[int], heights: Heights) -> None:
    groups = plan(lengths, heights)
    covered = [pair for group, _ in groups for pair in range(group.start, group.stop)]
    assert covered == list(range(len(lengths)))
    for group in groups:
        tokens = sum(lengths[group.pairs])
        alone = group.pairs.stop == group.pairs.start + 1
        assert group.fits == (tokens <= (heights.single if alone else heights.shared))
        assert alone or tokens <= heights.shared
        if group.pairs.stop < len(lengths) and group.fits:
            assert tokens + lengths[group.pairs.stop] > heights.shared


@given(st.integers(0, 50), st.integers(0, 300), st.integers(1, 40))
def test_tiles_cover_all_rows_in_about_one_size(start: int, count: int, most: int) -> None:
    parts = list(tiles(slice(start, start + count), most))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(
        range(start, start + count)
    )
    heights = [part.stop - part.start for part in parts]
    assert all(0 < height <= most for height in heights)
    assert len(parts) == -(-count // most)  # as few as possible


@given(LENGTHS, HEIGHTS)
@example([0, 0], Heights(8, 8, 8, 8))
def test_no_tile_is_taller_than_the_tallest(lengths: list[int], heights: Heights) -> None:
    groups = plan(lengths, heights)
    bound = tallest(lengths, groups, heights)
    for group in groups:
        tokens = sum(lengths[group.pairs])
        assert (tokens if group.fits else min(tokens, heights.part)) <= bound
    assert any(lengths) or bound == 0


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@every_device
def test_a_kept_tile_fills_its_memory(name: str, vocabulary: int) -> None:
    heights = sizes(vocabulary, DEVICES[name]).heights
    assert heights.rows == MEMORY[name].rows
    assert heights.part == max(256, MEMORY[name].kept_bytes // (4 * vocabulary))
    assert heights.shared == heights.part // 2
    # One pair may have as much as a direction of the weight's size, which it makes unnecessary.
    assert heights.single == max(heights.part, 512)


def test_a_kept_tile_in_half_precision_has_more_tokens_where_products_sum_in_float32() -> None:
    rows = {name: 2048 * MIB // (size * 32_000) for name, size in (("half", 2), ("full", 4))}
    for dtype, name, single in (
        (torch.bfloat16, "half", 2 * 40_000),  # float32 [V, D] in numbers of two bytes
        (torch.float32, "full", 40_000),
    ):
        heights = sizes(32_000, CUDA, width=40_000, dtype=dtype).heights
        assert heights == Heights(4096, rows[name] // 2, single, rows[name])
    on_cpu = [sizes(32_000, CPU, dtype=dtype) for dtype in (torch.half, torch.float32)]
    assert on_cpu[0] == on_cpu[1]


def test_chunk_size_is_the_number_of_tokens() -> None:
    assert sizes(32_000, CPU, chunk_size=7).heights == Heights(7, 7, 7, 7)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("rows", [1, 342, None, 10**6])
@every_device
@pytest.mark.parametrize("sums", [False, True])
def test_blocks_are_as_wide_as_their_memory_allows(
    name: str, rows: int | None, vocabulary: int, *, sums: bool
) -> None:
    memory = MEMORY[name]
    rows = rows or memory.rows
    blocks = list(sizes(vocabulary, DEVICES[name]).blocks(rows, sums=sums))
    assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, vocabulary)
    widths = [block.stop - block.start for block in blocks]
    *aligned, last = widths
    assert all(width % 64 == 0 for width in aligned)
    assert last % 64 == 0 or last < 64
    most = max(1024, (memory.sums_bytes if sums else memory.block_bytes) // (4 * rows) // 64 * 64)
    assert max(widths) <= most
    # The fewest blocks of that width, and a last one for what is not aligned.
    assert len(widths) == math.ceil(vocabulary // 64 * 64 / most) + (vocabulary % 64 > 0)
    assert len(set(aligned[:-1])) <= 1  # of one width, except that the last may be narrower


@pytest.mark.parametrize("vocabulary", [100, 4_160, *VOCABULARIES, 128_256])
@every_device
def test_the_blocks_of_shorter_tiles_fit_in_the_workspace(name: str, vocabulary: int) -> None:
    made = sizes(vocabulary, DEVICES[name])
    for rows in (1, 600, MEMORY[name].rows):
        largest = made.largest_block(rows)
        assert 4 * largest <= max(MEMORY[name].block_bytes, 4 * 1024 * rows)
        for shorter in range(1, rows + 1, 23):
            widths = [block.stop - block.start for block in made.blocks(shorter)]
            assert shorter * max(widths) <= largest


def test_tiles_of_logits_fill_their_memory() -> None:
    heights = {rows.stop - rows.start for rows in logits_rows(5_000, 32_000, 4)}
    assert heights == {64 * MIB // (4 * 32_000)}
    assert list(logits_rows(3, 32 * MIB, 4)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(logits_rows(0, 10, 4)) != []  # so that there is something to concatenate


@pytest.mark.parametrize("slope", [0.0, 1e-45, 1e-20, 3.0, 1e30])
@pytest.mark.parametrize("state", [0.0, 1e-6, 1.0, 60_000.0])
def test_a_unit_of_float16(slope: float, state: float) -> None:
    """A power of two that leaves the largest products in the upper half of float16's range."""
    rows, factor = torch.tensor([[state, 0.0], [0.0, 0.0]]).half(), torch.tensor([slope, -slope])
    unit = unit_of(rows, factor)
    assert math.frexp(unit.item())[0] == 0.5
    largest = max(state, 1.0) * factor[0] / unit
    assert largest <= 2**14
    assert largest >= 2**13 or slope < 1e-30
    assert unit_of(rows[:0], factor[:0]) > 0.0  # a tile without tokens
