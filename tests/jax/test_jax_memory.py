"""Memory of the compiled programs: one tile of logits, and never tokens x vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from spoloss import DPO
from spoloss.jax import Completions, Head, linear_logps, linear_pair_loss
from spoloss.jax._labels import Sequences, sequences_of
from spoloss.jax._tiles import evenly, tile_rows
from spoloss.jax._tokens import rows_for_pairs

D, V = 64, 8192
ROWS = 128
TILE, HEAD = 4 * ROWS * V, 4 * V * D
HELD = TILE if jax.__version_info__ >= (0, 7) else 2 * TILE  # XLA of JAX 0.6 copies a tile


def temporaries(pairs: int, tokens: int, wanted: tuple[int, ...], chunk_size: int | None) -> int:
    """Bytes of a compiled loss and its gradients beyond what goes in and out."""
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    hidden = shape(pairs, tokens, D)
    labels = shape(pairs, tokens, dtype=jnp.int32)

    def loss(chosen: Any, rejected: Any, weight: Any, *labels: Any) -> Any:
        sides = map(Completions, (chosen, rejected), labels)
        head = Head(weight, chunk_size=chunk_size)
        return linear_pair_loss(DPO(), head, *sides, 0.0, 0.0, beta=0.1).loss

    function = jax.value_and_grad(loss, wanted) if wanted else loss
    compiled = jax.jit(function).lower(hidden, hidden, shape(V, D), labels, labels).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


LONG = 1.2 * HELD + 2.25 * HEAD
"""A pair that is longer than a tile has an array of the weight's size for each side."""


@pytest.mark.parametrize(
    ("pairs", "tokens", "wanted", "bound"),
    [
        pytest.param(16, 64, (), 1.2 * HELD, marks=pytest.mark.extended),
        (16, 64, (0, 1), 1.2 * HELD),
        pytest.param(16, 64, (0, 1, 2), 1.2 * HELD + 0.25 * HEAD, marks=pytest.mark.extended),
        (3, 512, (0, 1, 2), LONG),
        pytest.param(3, 512, (0, 1), 1.3 * HELD, marks=pytest.mark.extended),
    ],
)
def test_temporaries(pairs: int, tokens: int, wanted: tuple[int, ...], bound: float) -> None:
    states = 2 * 4 * pairs * tokens * D
    found = temporaries(pairs, tokens, wanted, ROWS)
    assert found <= bound + states
    assert found < 4 * 2 * pairs * tokens * V / 3  # of all logits


@pytest.mark.extended
def test_log_probabilities_of_a_frozen_head() -> None:
    hidden, head = jnp.zeros((8, 128, D)), Head(jnp.zeros((V, D)), chunk_size=ROWS)
    labels = jnp.zeros((8, 128), jnp.int32)
    run = jax.jit(lambda hidden: linear_logps(head, Completions(hidden, labels)).sum())
    temporary = jax.jit(jax.grad(run)).lower(hidden).compile().memory_analysis()
    assert temporary.temp_size_in_bytes < 2 * (1.5 * HELD + hidden.nbytes)


def test_rows_of_a_tile() -> None:
    assert tile_rows((64, 64), 16, 512) == 512  # 4 pairs of 128
    assert tile_rows((63, 63), 16, 512) == 504
    assert tile_rows((64, 64), 5, 512) == 3 * 128  # 3 and 2, not 4 and 1
    assert tile_rows((64, 64), 2, 512) == 2 * 128  # all there is
    assert tile_rows((1024, 1000), 2, 512) == 512  # 2 tiles for a side
    assert tile_rows((300, 300), 2, 512) == 300  # longer than a tile: by side
    assert tile_rows((1, 0), 3, 512) == 3  # pairs of one token
    assert tile_rows((0, 0), 1, 512) >= 1
    assert [evenly(10, 4), evenly(8, 4), evenly(1, 4), evenly(0, 4)] == [4, 4, 1, 1]


def test_a_tile_of_a_packed_row_has_no_place_to_leave_empty() -> None:
    """Whole pairs of full length fill a tile of a padded batch; a packed pair has any length."""

    def side(rows: int, cu_seqlens: Any = None) -> Sequences:
        hidden, labels = (
            jnp.zeros((rows, 4 * 48 // rows, 1)),
            jnp.zeros((rows, 4 * 48 // rows), int),
        )
        return sequences_of(Completions(hidden, labels, cu_seqlens=cu_seqlens, shift=False))

    padded, packed = side(4), side(1, jnp.arange(5) * 48)
    assert rows_for_pairs((padded, padded), most=200) == 2 * 96
    assert rows_for_pairs((packed, packed), most=150) == 4 * 96 // 3
    assert rows_for_pairs((padded, packed), most=150) == (48 + 4 * 48) // 2
