"""The number of tokens per tile: integers in, integers out, before tracing."""

from __future__ import annotations

import jax

_LEAST_ROWS = 256


def tile_rows(sides: tuple[int, ...], pairs: int, words: int, chunk_size: int | None) -> int:
    """The number of tokens per tile, chosen so that pairs of full length leave no place empty.

    Whole pairs share a tile if at least one fits. Otherwise each side of a pair uses some tiles.

    Args:
      sides: the largest number of tokens that count in a sequence, by side.
      pairs: the number of pairs.
      words: the number of words on this device.
      chunk_size: the largest number of tokens per tile; None for the default memory.
    """
    budget = chunk_size or max(_LEAST_ROWS, _tile_bytes() // (4 * max(1, words)))
    pair = max(1, sum(sides))
    if pair > budget:
        return evenly(max(sides), budget)
    return pair * evenly(pairs, budget // pair)


def evenly(count: int, most: int) -> int:
    """The size of the parts if `count` items are split into the fewest parts of at most `most`."""
    return max(1, -(-count // max(1, -(-count // most))))


def _tile_bytes() -> int:
    """Memory of one tile of float32 logits."""
    return 64 * 2**20 if jax.default_backend() == "cpu" else 2**30
