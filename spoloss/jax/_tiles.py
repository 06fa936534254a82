"""The number of tokens per tile: integers in, integers out, before tracing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax import lax

_LEAST_ROWS = 256
_CPU_BYTES, _OTHER_BYTES = 64 * 2**20, 2**30
"""Memory of one tile of float32 logits."""


def on_platform(
    run: Callable[..., Any],
    rows: Callable[[int], int],
    vocabulary: int,
    chunk_size: int | None,
    *args: Any,
) -> Any:
    """`run(tokens per tile, *args)`, with the tiles of the platform that it is compiled for.

    A traced array does not know its device. So where the size depends on the platform, the program
    contains `run` for each of them, and JAX compiles one. `rows` gives the number of tokens per
    tile from the largest number, which is `chunk_size`, or follows from the default memory.
    """
    if chunk_size is not None:
        return run(rows(chunk_size), *args)
    cpu, other = (
        rows(max(_LEAST_ROWS, memory // (4 * max(1, vocabulary))))
        for memory in (_CPU_BYTES, _OTHER_BYTES)
    )
    if cpu == other:
        return run(cpu, *args)
    return lax.platform_dependent(
        *args, cpu=functools.partial(run, cpu), default=functools.partial(run, other)
    )


def tile_rows(sides: tuple[int, ...], pairs: int, most: int) -> int:
    """The number of tokens per tile, chosen so that pairs of full length leave no place empty.

    Whole pairs share a tile if at least one fits. Otherwise each side of a pair uses some tiles.
    `sides` are the largest numbers of tokens that count in a sequence, and `most` is that of a
    tile.
    """
    pair = max(1, sum(sides))
    if pair > most:
        return evenly(max(sides), most)
    return pair * evenly(pairs, most // pair)


def evenly(count: int, most: int) -> int:
    """The size of the parts if `count` items are split into the fewest parts of at most `most`."""
    return max(1, -(-count // max(1, -(-count // most))))
