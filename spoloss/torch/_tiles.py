"""How large a tile is: everything about the sizes of tiles and blocks. Integers alone, no tensors.

A tile is some tokens, and a block is some columns of the tile's logits. A tile whose exponentials
are kept for the weight's gradient must fit in `Memory.kept_bytes`, a block in `Memory.block_bytes`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

LEAST_COLUMNS = 1024
"""The narrowest block of the vocabulary. Products of narrower blocks are slow."""

ALIGNED = 64
"""The width of a block is a multiple of this, so that rows are aligned on a GPU."""

LEAST_KEPT_ROWS = 256
"""The smallest tile whose blocks are kept, for any vocabulary size."""

LOGITS_BYTES = 64 * 2**20
"""Memory of a tile of given logits, whose rows have the whole vocabulary."""


class Memory(NamedTuple):
    """What a device spends on tiles.

    Attributes:
      block_bytes: memory of one block of logits, which has some columns of a tile.
      rows: tokens per tile if its blocks are not kept.
      kept_bytes: memory of a tile if all its blocks are kept.
      sums_bytes: memory of one block of logits if nothing but sums is taken of it.
    """

    block_bytes: int
    rows: int
    kept_bytes: int
    sums_bytes: int


CPU_MEMORY = Memory(16 * 2**20, 1024, 64 * 2**20, 16 * 2**20)
# A GPU needs larger tiles than a CPU. Its second cache holds 40 MB or more since the A100, so a
# block of sums may be read from there. For exponentials, the blocks are as wide as memory allows,
# because each reads and writes the sum [n, D] of their products. A Mac shares its memory.
GPU_MEMORY = Memory(512 * 2**20, 4096, 2 * 2**30, 32 * 2**20)
MPS_MEMORY = Memory(128 * 2**20, 2048, 512 * 2**20, 128 * 2**20)


def gpu_memory(total: int) -> Memory:
    """What a GPU with so many bytes spends: blocks shrink below 32 GiB, tiles below 16 GiB."""
    return GPU_MEMORY._replace(
        block_bytes=min(GPU_MEMORY.block_bytes, total // 64),
        kept_bytes=min(GPU_MEMORY.kept_bytes, total // 8),
    )


class Heights(NamedTuple):
    """The largest number of tokens in one tile.

    Attributes:
      rows: if its blocks are not kept.
      shared: if its blocks are kept and several pairs share it.
      single: if its blocks are kept and it is one whole pair.
      part: if its blocks are kept and it is part of a pair that is longer than `single`.
    """

    rows: int
    shared: int
    single: int
    part: int


@dataclass(frozen=True)
class Tiles:
    """The sizes of the tiles and blocks of one head.

    Attributes:
      vocabulary: the columns of a tile's logits, on this rank.
      block: the logits that fit in a block.
      sums_block: the logits that fit in a block of which only sums are taken.
      heights: the tokens that fit in a tile.
    """

    vocabulary: int
    block: int
    sums_block: int
    heights: Heights

    @classmethod
    def of(
        cls,
        memory: Memory,
        vocabulary: int,
        width: int,
        *,
        logits_bytes: int,
        kept_bytes: int,
        chunk_size: int | None,
    ) -> Tiles:
        """The sizes for a head [vocabulary, width].

        Args:
          memory: what the device spends.
          vocabulary: V, on this rank.
          width: D.
          logits_bytes: bytes of one logit.
          kept_bytes: bytes of one exponential that is kept.
          chunk_size: tokens per tile, or None for what fits in the memory.
        """
        block = memory.block_bytes // logits_bytes
        blocks = block, min(block, memory.sums_bytes // logits_bytes)
        if chunk_size is not None:
            return cls(vocabulary, *blocks, Heights(*4 * [chunk_size]))
        kept = max(LEAST_KEPT_ROWS, memory.kept_bytes // kept_bytes // max(1, vocabulary))
        # One pair may use as much memory as the float32 direction [V, D] of a longer pair.
        single = max(kept, width * logits_bytes // kept_bytes)
        return cls(vocabulary, *blocks, Heights(memory.rows, kept // 2, single, kept))

    def blocks(self, rows: int, *, sums: bool = False) -> Iterator[slice]:
        """The vocabulary in blocks of about equal size for a tile of `rows` tokens, or its `sums`.

        With a width of 30,413, rows would start at odd addresses, which is slow on a GPU. So widths
        are multiples of ALIGNED, and the remainder of the vocabulary is a block of its own.
        """
        aligned = self.vocabulary - self.vocabulary % ALIGNED
        block = self.sums_block if sums else self.block
        widest = max(LEAST_COLUMNS, block // max(1, rows)) // ALIGNED * ALIGNED
        count = max(1, math.ceil(aligned / widest))
        even = ALIGNED * max(1, math.ceil(aligned / ALIGNED / count))
        edges = dict.fromkeys((*range(0, aligned, even), aligned, self.vocabulary))
        for start, stop in itertools.pairwise(edges):
            yield slice(start, stop)

    def largest_block(self, rows: int) -> int:
        """An upper bound of the logits of one block, for any tile of at most `rows` tokens.

        A shorter tile has wider blocks, which may hold more logits than those of the tallest tile.
        """
        return min(rows * self.vocabulary, max(self.block, rows * LEAST_COLUMNS))


class Group(NamedTuple):
    """Consecutive pairs, and whether they fit in one tile. If not, they are one long pair."""

    pairs: slice
    fits: bool


def plan(lengths: Sequence[int], heights: Heights) -> list[Group]:
    """Groups that cover all pairs in order, each as large as a tile allows.

    The length of a pair is the number of tokens of both sides together.
    """
    groups: list[Group] = []
    first = 0
    while first < len(lengths):
        last, tokens = first + 1, lengths[first]
        while last < len(lengths) and tokens + lengths[last] <= heights.shared:
            tokens += lengths[last]
            last += 1
        fits = last > first + 1 or tokens <= heights.single
        groups.append(Group(slice(first, last), fits))
        first = last
    return groups


def tiles(rows: slice, most: int) -> Iterator[slice]:
    """Some rows in slices of about equal size, at most `most` rows each."""
    count = rows.stop - rows.start
    even = math.ceil(count / max(1, math.ceil(count / most)))
    for start in range(rows.start, rows.stop, max(1, even)):
        yield slice(start, min(start + even, rows.stop))


def tallest(lengths: Sequence[int], groups: Sequence[Group], heights: Heights) -> int:
    """An upper bound of the tokens of any tile that the groups need."""
    return max(
        (sum(lengths[group.pairs]) if group.fits else heights.part for group in groups), default=0
    )


def logits_rows(rows: int, vocabulary: int, itemsize: int) -> Iterator[slice]:
    """The rows of given logits [rows, vocabulary], at least one slice of them."""
    height = max(1, LOGITS_BYTES // (vocabulary * itemsize))
    for start in range(0, max(rows, 1), height):
        yield slice(start, start + height)
