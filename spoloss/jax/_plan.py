"""How many tokens a tile holds: integers in, integers out, before anything is traced."""

from __future__ import annotations

import jax

_LEAST_ROWS = 256


def tile_rows(sides: tuple[int, ...], pairs: int, words: int, chunk_size: int | None) -> int:
    """The tokens of a tile, such that full pairs leave no place of a tile empty.

    Whole pairs share a tile where it holds one; the sides of a longer pair take some tiles each.

    Args:
      sides: the most tokens that count in a sequence, by side.
      pairs: the number of pairs.
      words: the vocabulary of this device.
      chunk_size: the most tokens of a tile; None for what fits into the default memory.
    """
    budget = chunk_size or max(_LEAST_ROWS, _tile_bytes() // (4 * max(1, words)))
    pair = max(1, sum(sides))
    if pair > budget:
        return evenly(max(sides), budget)
    return pair * evenly(pairs, budget // pair)


def evenly(count: int, most: int) -> int:
    """The size of the parts when `count` things are cut into the fewest parts of at most `most`."""
    return max(1, -(-count // max(1, -(-count // most))))


def _tile_bytes() -> int:
    """Memory of one tile of float32 logits."""
    return 64 * 2**20 if jax.default_backend() == "cpu" else 2**30
