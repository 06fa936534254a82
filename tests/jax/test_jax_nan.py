"""What JAX cannot refuse while it traces makes log-probabilities nan."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from helpers.wings import WINGS, D, P, T, V, make_arrays
from spoloss import SPO
from spoloss.jax import Completions, Head, linear_logps, linear_pair_loss, sequence_logps

pytestmark = pytest.mark.usefixtures("quick_compiler")

ARRAYS = make_arrays(WINGS["jax"])
HIDDEN, LABELS = ARRAYS["chosen_hidden"], ARRAYS["chosen_labels"]
WEIGHT, BIAS = ARRAYS["weight"], ARRAYS["bias"]


def nan_where(head: Head, tokens: Completions) -> list[bool]:
    """Which sequences are nan, by both ways of log-probabilities."""
    got = linear_logps(head, tokens)
    logits = tokens.hidden @ head.weight.T
    how = {"token_weights": tokens.token_weights, "cu_seqlens": tokens.cu_seqlens}
    np.testing.assert_array_equal(
        np.isnan(got), np.isnan(sequence_logps(logits, tokens.labels, **how))
    )
    return np.isnan(got).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrong", [V, -1])
def test_a_label_outside_of_the_vocabulary_makes_its_sequence_nan(wrong: int) -> None:
    outside = LABELS.at[1, 2].set(wrong)
    assert nan_where(Head(WEIGHT), Completions(HIDDEN, outside)) == [False, True, *[False] * 3]


@pytest.mark.parametrize("wrong", [-1.0, jnp.inf, jnp.nan])
def test_a_weight_that_is_negative_or_not_finite_makes_its_sequence_nan(wrong: float) -> None:
    weights = jnp.ones(LABELS.shape).at[1, 2].set(wrong)
    tokens = Completions(HIDDEN, LABELS, token_weights=weights)
    assert nan_where(Head(WEIGHT), tokens) == [False, True, *[False] * 3]


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
@pytest.mark.parametrize("wrong", [[0, 9, 7, P * T], [1, 9, P * T], [0, 9, P * T - 1]], ids=str)
def test_offsets_out_of_order_make_nan(wrong: list[int], dtype: str) -> None:
    hidden, labels = HIDDEN.reshape(1, -1, D), LABELS.reshape(1, -1)
    tokens = Completions(hidden, labels, cu_seqlens=jnp.array(wrong, dtype))
    assert all(nan_where(Head(WEIGHT), tokens))


def test_offsets_in_a_dtype_that_cannot_hold_the_length() -> None:
    """44 is 300 mod 256."""
    tokens = Completions(
        jnp.zeros((1, 300, D)), jnp.zeros((1, 300), "uint8"), cu_seqlens=jnp.uint8([0, 44])
    )
    assert nan_where(Head(WEIGHT), tokens) == [True]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_offsets_of_either_side_make_the_loss_nan(side: str) -> None:
    rows = {"hidden": HIDDEN.reshape(1, -1, D), "labels": LABELS.reshape(1, -1)}
    offsets = {"chosen": [0, 9, P * T], "rejected": [0, 9, P * T]}
    offsets[side] = [1, 9, P * T]
    sides = [Completions(**rows, cu_seqlens=jnp.array(cu)) for cu in offsets.values()]

    def loss(weight: Array, **options: Any) -> Array:
        return linear_pair_loss(SPO(), Head(weight), *sides, 0.0, 0.0, beta=0.1, **options).loss

    assert np.isnan(loss(WEIGHT))
    assert np.isnan(jax.grad(loss)(WEIGHT)).any()
