"""Log-probabilities against JAX's own log_softmax and against 50 digits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax import Array

from helpers.wings import IGNORED, WINGS, D, P, T, V, make_arrays
from spoloss import SPO
from spoloss.jax import Completions, Head, linear_logps, linear_pair_loss, sequence_logps

pytestmark = pytest.mark.usefixtures("quick_compiler")

ARRAYS = make_arrays(WINGS["jax"])
HIDDEN, LABELS = ARRAYS["chosen_hidden"], ARRAYS["chosen_labels"]
WEIGHT, BIAS = ARRAYS["weight"], ARRAYS["bias"]
LOGITS = HIDDEN @ WEIGHT.T
UPSTREAM = jnp.array([1.0, -2.0, 0.5, 3.0, 1.0])


def by_log_softmax(logits: Array, *, shift: bool = True, average: bool = False) -> Array:
    """`sequence_logps` of the case, from JAX's own functions."""
    logps, labels = jax.nn.log_softmax(logits), LABELS
    if shift:
        logps, labels = logps[:, :-1], labels[:, 1:]
    counts = labels != IGNORED
    found = jnp.take_along_axis(logps, jnp.where(counts, labels, 0)[..., None], axis=2)[..., 0]
    sums = jnp.where(counts, found, 0.0).sum(axis=1)
    return sums / jnp.maximum(counts.sum(axis=1), 1) if average else sums


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_sequence_logps(*, shift: bool, average: bool) -> None:
    how = {"shift": shift, "average": average}
    got, back = jax.vjp(lambda z: sequence_logps(z, LABELS, **how), LOGITS)
    want, want_back = jax.vjp(lambda z: by_log_softmax(z, **how), LOGITS)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(back(UPSTREAM)[0], want_back(UPSTREAM)[0], rtol=1e-10, atol=1e-14)


def test_sequence_logps_in_half_precision() -> None:
    logits = LOGITS.astype("bfloat16")
    exact = sequence_logps(logits.astype(jnp.float64), LABELS)
    got, back = jax.vjp(lambda logits: sequence_logps(logits, LABELS), logits)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=1e-5)
    assert back(jnp.ones(P, jnp.float32))[0].dtype == jnp.bfloat16


def test_logits_of_ignored_labels_may_be_nan() -> None:
    lost = jnp.pad(LABELS[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED) == IGNORED
    dirty = jnp.where(lost[..., None], jnp.nan, LOGITS)
    value_and_grad = jax.value_and_grad(lambda logits: sequence_logps(logits, LABELS).sum())
    for got, want in zip(value_and_grad(dirty), value_and_grad(LOGITS), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


def of_three(logits: Array) -> Array:
    """Log p of the first of three tokens, by the identity as the head."""
    tokens = Completions(logits[None, None], jnp.zeros((1, 1), int), shift=False)
    return linear_logps(Head(jnp.eye(3, dtype=logits.dtype)), tokens)[0]


@pytest.mark.parametrize("offset", [0.0, 2.0**20])
@pytest.mark.parametrize("x", [28.0, 9.0, 0.0, -1.0, -40.0, -1e4])
def test_no_digit_is_lost_to_an_offset_or_near_p_1(x: float, offset: float) -> None:
    """-log p from 1e-12 to 1e4 in float32, against 50 digits."""
    with mpmath.workdps(50):
        others = 1 + mpmath.exp(-1)
        total = mpmath.exp(x) + others
        logp = -mpmath.log1p(others / mpmath.exp(x))
        slopes = [others / total, -1 / total, -mpmath.exp(-1) / total]
        want, want_grad = float(logp), np.array([float(slope) for slope in slopes])
    logits = jnp.array([x, 0.0, -1.0], "float32") + jnp.float32(offset)
    got, grad = jax.value_and_grad(of_three)(logits)
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(got, want, rtol=4 * eps)
    np.testing.assert_allclose(grad, want_grad, rtol=8 * eps)
    by_logits = sequence_logps(logits[None, None], jnp.zeros((1, 1), int), shift=False)
    library = jax.nn.log_softmax(logits)[0]
    np.testing.assert_allclose(by_logits[0], library, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("options", [{"softcap": 1.0}, {"logit_scale": -0.5}], ids=str)
def test_a_bias_of_minus_infinity_is_probability_0(options: dict[str, float]) -> None:
    """With low logits too: the padded entries are as if absent, and their labels impossible."""
    wide = jnp.concatenate([WEIGHT, jnp.ones((3, D))])
    low = BIAS - 60.0
    padding = jnp.concatenate([low, jnp.full(3, -jnp.inf)])

    def logps(hidden: Array, weight: Array, bias: Array, labels: Array = LABELS) -> Array:
        return linear_logps(Head(weight, bias, **options), Completions(hidden, labels)).sum()

    value_and_grads = jax.value_and_grad(logps, (0, 1, 2))
    got, got_grads = value_and_grads(HIDDEN, wide, padding)
    want, want_grads = value_and_grads(HIDDEN, WEIGHT, low)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g[: len(w)], w, rtol=1e-10, atol=1e-14)
        assert not g[len(w) :].any()
    padded = LABELS.at[0, 4].set(len(wide) - 1)
    logp, grads = value_and_grads(HIDDEN, wide, padding, padded)
    assert logp == -jnp.inf
    assert all(np.isfinite(grad).all() for grad in grads)


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
