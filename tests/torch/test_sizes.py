"""The memory of a tile. Tensors on the meta device have shapes alone."""

from __future__ import annotations

import math

import pytest
import torch

from spoloss.torch._devices import CPU, CUDA, Device
from spoloss.torch._head import Head, HeadOptions
from spoloss.torch._plan import Budget
from spoloss.torch._products import _narrowed
from spoloss.torch.logps import _tiles

MIB = 2**20
DEVICES = {"cpu": CPU, "cuda": CUDA}
BLOCK = {"cpu": 16 * MIB, "cuda": 512 * MIB}
KEPT = {"cpu": 64 * MIB, "cuda": 2048 * MIB}
ROWS = {"cpu": 1024, "cuda": 4096}
VOCABULARIES = (31_999, 32_000, 50_257, 151_936)


def head(
    vocabulary: int,
    device: Device,
    *,
    width: int = 512,
    dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
) -> Head:
    weight = torch.empty(vocabulary, width, dtype=dtype, device="meta")
    return Head(weight, None, HeadOptions(None, 1.0, 1.0, chunk_size, None), device)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", DEVICES)
def test_a_kept_tile_fills_its_memory(name: str, vocabulary: int) -> None:
    budget = head(vocabulary, DEVICES[name]).budget(keep=True)
    row = 4 * vocabulary
    assert budget.part == max(256, KEPT[name] // row)
    assert budget.shared == budget.part // 2
    # One pair may have as much as a second gradient of the weight, which it makes unnecessary.
    assert budget.single == max(budget.part, 512)


def test_a_kept_tile_in_half_precision_has_more_tokens_where_products_sum_in_float32() -> None:
    rows = {name: 2048 * MIB // (size * 32_000) for name, size in (("half", 2), ("full", 4))}
    for dtype, name, single in (
        (torch.bfloat16, "half", 2 * 40_000),  # float32 [V, D] in numbers of two bytes
        (torch.float32, "full", 40_000),
    ):
        budget = head(32_000, CUDA, width=40_000, dtype=dtype).budget(keep=True)
        assert budget == Budget(rows[name] // 2, single, rows[name])
    on_cpu = [head(32_000, CPU, dtype=d).budget(keep=True) for d in (torch.half, torch.float32)]
    assert on_cpu[0] == on_cpu[1]


@pytest.mark.parametrize("name", DEVICES)
def test_a_tile_that_is_not_kept_has_a_fixed_number_of_tokens(name: str) -> None:
    assert head(32_000, DEVICES[name]).budget(keep=False) == Budget(*3 * (ROWS[name],))


@pytest.mark.parametrize("keep", [True, False])
def test_chunk_size_is_the_number_of_tokens(keep: bool) -> None:
    chosen = head(32_000, CPU, chunk_size=7)
    assert chosen.budget(keep=keep) == Budget(7, 7, 7)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", DEVICES)
def test_blocks_are_as_wide_as_their_memory_allows(name: str, vocabulary: int) -> None:
    rows = ROWS[name]
    blocks = list(head(vocabulary, DEVICES[name]).blocks(rows))
    widths = [block.stop - block.start for block in blocks]
    assert sum(widths) == vocabulary
    *aligned, last = widths
    assert all(width % 64 == 0 for width in aligned)
    assert last % 64 == 0 or last < 64
    most = BLOCK[name] // (4 * rows) // 64 * 64
    assert max(widths) <= most
    # The fewest blocks of that width, and a last one for what is not aligned.
    assert len(widths) == math.ceil(vocabulary // 64 * 64 / most) + (vocabulary % 64 > 0)
    assert len(set(aligned[:-1])) <= 1  # of one width, except that the last may be narrower


@pytest.mark.parametrize("vocabulary", [100, 4_160, *VOCABULARIES, 128_256])
@pytest.mark.parametrize("name", DEVICES)
def test_the_blocks_of_shorter_tiles_fit_in_the_workspace(name: str, vocabulary: int) -> None:
    made = head(vocabulary, DEVICES[name])
    for rows in (1, 600, ROWS[name]):
        memory = made.largest_block(rows)
        assert 4 * memory <= max(BLOCK[name], 4 * 1024 * rows)
        for shorter in range(1, rows + 1, 7):
            widths = [block.stop - block.start for block in made.blocks(shorter)]
            assert shorter * max(widths) <= memory


def test_blocks_of_a_tall_tile_keep_a_least_width() -> None:
    widths = {block.stop - block.start for block in head(32_768, CPU).blocks(10**6)}
    assert widths == {1024}


def test_tiles_of_logits_fill_their_memory() -> None:
    logits = torch.empty(5_000, 32_000, dtype=torch.bfloat16, device="meta")
    rows = [rows for rows, _ in _tiles(logits)]
    heights = [block.stop - block.start for block in rows]
    assert set(heights) == {64 * MIB // (4 * 32_000)}
    wide = torch.empty(3, 32 * MIB, device="meta")
    assert [rows for rows, _ in _tiles(wide)] == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_only_float16_pays_for_a_scale() -> None:
    """bfloat16 has the range of float32, so no pass looks for its largest number."""
    wide = torch.tensor([1e-30, 3.0])
    for dtype in (torch.bfloat16, torch.float32):
        narrow, unit = _narrowed(wide, dtype)
        assert (narrow.dtype, unit) == (dtype, None)
    narrow, unit = _narrowed(wide, torch.float16)
    assert narrow.dtype == torch.float16
    assert unit == 3.0
    half = torch.ones(2, dtype=torch.float16)
    assert _narrowed(half, torch.float16)[1] is None
