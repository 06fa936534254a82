"""Memory of the compiled programs: one tile of logits, and never tokens x vocabulary."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from spoloss import DPO
from spoloss.jax import linear_logps, linear_pair_loss
from spoloss.jax._labels import Labels, Reading
from spoloss.jax._plan import evenly, tile_rows
from spoloss.jax._softmax import Head, HeadOptions, Wanted
from spoloss.jax._tokens import rows_for_pairs

D, V = 64, 8192
ROWS = 128
TILE, HEAD = 4 * ROWS * V, 4 * V * D
HELD = TILE if jax.__version_info__ >= (0, 7) else 2 * TILE  # XLA of JAX 0.6 copies a tile


def temporaries(pairs: int, tokens: int, wanted: tuple[int, ...], chunk_size: int | None) -> int:
    """Bytes of a compiled loss and its gradients beyond what goes in and out."""
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    sides = (shape(pairs, tokens, D), shape(pairs, tokens, D))
    labels = (shape(pairs, tokens, dtype=jnp.int32),) * 2

    def loss(chosen: Any, rejected: Any, weight: Any, *labels: Any) -> Any:
        return linear_pair_loss(
            DPO(), chosen, rejected, weight, *labels, 0.0, 0.0, beta=0.1, chunk_size=chunk_size
        ).loss

    function = jax.value_and_grad(loss, wanted) if wanted else loss
    compiled = jax.jit(function).lower(*sides, shape(V, D), *labels).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "tokens", "wanted", "bound"),
    [
        (16, 64, (), 1.2 * HELD),
        (16, 64, (0, 1), 1.2 * HELD),
        (16, 64, (0, 1, 2), 1.2 * HELD + 0.25 * HEAD),
        (3, 512, (0, 1, 2), 1.2 * HELD + 1.25 * HEAD),
        (3, 512, (0, 1), 1.3 * HELD),
    ],
)
def test_temporaries(pairs: int, tokens: int, wanted: tuple[int, ...], bound: float) -> None:
    states = 2 * 4 * pairs * tokens * D
    found = temporaries(pairs, tokens, wanted, ROWS)
    assert found <= bound + states
    assert found < 4 * 2 * pairs * tokens * V / 3  # of all logits


@pytest.mark.slow
def test_the_bound_sees_all_logits() -> None:
    """A tile as high as the batch is what a loss by all logits would need."""
    assert temporaries(16, 64, (0, 1), 16 * 64 * 2) > 1.3 * HELD


@pytest.mark.slow
def test_log_probabilities_of_a_frozen_head() -> None:
    hidden, weight = jnp.zeros((8, 128, D)), jnp.zeros((V, D))
    labels = jnp.zeros((8, 128), jnp.int32)
    run = jax.jit(lambda hidden: linear_logps(hidden, weight, labels, chunk_size=ROWS).sum())
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
    rows = functools.partial(rows_for_pairs, reading=Reading(ignore_index=-100, shift=False))
    padded, packed = (
        Labels(jnp.zeros((4, 48), int), None),
        Labels(jnp.zeros((1, 4 * 48), int), jnp.arange(5) * 48),
    )
    assert rows((padded, padded), most=200) == 2 * 96
    assert rows((packed, packed), most=150) == 4 * 96 // 3


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_loop_carries_no_gradient_that_nobody_wants(weight: bool, bias: bool) -> None:
    head = Head.of(jnp.ones((V, D)), jnp.ones(V), HeadOptions(None, 1.0, 1.0, None, ()))
    zeros = head.zeros(Wanted((True, True), weight, bias))
    assert [total is not None for total in zeros] == [weight, bias]
