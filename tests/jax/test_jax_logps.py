"""`spoloss.jax`: log-probabilities of sequences, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from helpers.jax_fused import IGNORED, make_inputs, make_labels, pack, plain_logps, quick_jit
from spoloss.jax import linear_logps, sequence_logps

pytestmark = pytest.mark.usefixtures("quick_compiler")

CHOSEN, _ = make_labels()
UPSTREAM = jnp.array([1.0, -2.0, 0.5, 3.0, 1.0])
HEAD = {"softcap": 2.0, "logit_scale": 0.7, "temperature": 1.3}


def inputs(dtype: Any = jnp.float64) -> dict[str, Array]:
    """Hidden states, weight and bias."""
    found = make_inputs(dtype)
    return {name: found[name] for name in ("chosen_hidden", "weight", "bias")}


@pytest.mark.slow
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_sequence_logps(*, shift: bool, average: bool, packed: bool) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(*CHOSEN.shape, 21)))

    def got(logits: Array) -> Array:
        labels, options = CHOSEN, {}
        if packed:
            logits, labels, options["cu_seqlens"] = pack(logits, labels)
        return sequence_logps(logits, labels, shift=shift, average=average, **options)

    def want(logits: Array) -> Array:
        identity = {"weight": jnp.eye(logits.shape[2])}
        logps, lengths = plain_logps(logits, CHOSEN, identity, shift=shift)
        return logps / jnp.maximum(lengths, 1) if average else logps

    def with_grad(function: Callable[[Array], Array]) -> Any:
        def run(logits: Array) -> tuple[Array, Array]:
            logps, back = jax.vjp(function, logits)
            return logps, *back(UPSTREAM)

        return quick_jit(run)(logits)

    (logps, grad), (want_logps, want_grad) = map(with_grad, (got, want))
    np.testing.assert_allclose(logps, want_logps, rtol=1e-12)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-10, atol=1e-14)


def test_sequence_logps_in_half_precision() -> None:
    logits = jnp.asarray(
        3.0 * np.random.default_rng(0).normal(size=(*CHOSEN.shape, 21)), "bfloat16"
    )
    exact = sequence_logps(logits.astype(jnp.float64), CHOSEN)
    got, back = jax.vjp(lambda logits: sequence_logps(logits, CHOSEN), logits)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=1e-5)
    assert back(jnp.ones(5, jnp.float32))[0].dtype == jnp.bfloat16


def test_sequence_logps_of_nan_that_does_not_count() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(*CHOSEN.shape, 21)))
    lost = jnp.pad(CHOSEN[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED) == IGNORED
    dirty = jnp.where(lost[..., None], jnp.nan, logits)
    value_and_grad = jax.value_and_grad(lambda logits: sequence_logps(logits, CHOSEN).sum())
    for got, want in zip(value_and_grad(dirty), value_and_grad(logits), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [("hidden",), ("weight", "bias"), ("hidden", "bias")])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_linear_logps(*, wanted: tuple[str, ...], chunk_size: int | None, packed: bool) -> None:
    """By a frozen head the gradient is made at once, by a trained one in a second visit."""
    arrays = inputs()
    arrays["hidden"] = arrays.pop("chosen_hidden")

    def got(by: dict[str, Array]) -> Array:
        all_of = {**arrays, **by}
        labels, options = CHOSEN, dict(HEAD)
        if packed:
            all_of["hidden"], labels, options["cu_seqlens"] = pack(all_of["hidden"], labels)
        logps = linear_logps(labels=labels, chunk_size=chunk_size, **all_of, **options)
        return (logps**2) @ UPSTREAM

    def want(by: dict[str, Array]) -> Array:
        all_of = {**arrays, **by}
        logps, _ = plain_logps(all_of["hidden"], CHOSEN, all_of, **HEAD)
        return (logps**2) @ UPSTREAM

    by = {name: arrays[name] for name in wanted}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        quick_jit(jax.value_and_grad(got))(by),
        quick_jit(jax.value_and_grad(want))(by),
    )


@pytest.mark.slow
def test_linear_logps_per_token_and_average() -> None:
    arrays = inputs()
    call = (arrays["chosen_hidden"], arrays["weight"], CHOSEN)
    each = linear_logps(*call, per_token=True)
    total, lengths = plain_logps(arrays["chosen_hidden"], CHOSEN, {"weight": arrays["weight"]})
    assert each.shape == CHOSEN.shape
    assert np.asarray(each == 0.0).sum() == CHOSEN.size - int(lengths.sum())
    np.testing.assert_allclose(each.sum(axis=1), total, rtol=1e-12)
    average = linear_logps(*call, average=True)
    np.testing.assert_allclose(average, total / jnp.maximum(lengths, 1), rtol=1e-12)
    assert average[2] == 0.0  # no token counts


@pytest.mark.slow
def test_padding_of_the_vocabulary() -> None:
    """Rows that are no words take a bias of -inf, and are as if they were not there."""
    arrays = inputs()
    wide = jnp.concatenate([arrays["weight"], jnp.ones((11, 4))])
    bias = jnp.concatenate([arrays["bias"], jnp.full(11, -jnp.inf)])

    def loss(weight: Array, bias: Array) -> Array:
        return linear_logps(arrays["chosen_hidden"], weight, CHOSEN, bias=bias).sum()

    value_and_grads = quick_jit(jax.value_and_grad(loss, (0, 1)))
    value, (by_weight, by_bias) = value_and_grads(wide, bias)
    want, (want_weight, want_bias) = value_and_grads(arrays["weight"], arrays["bias"])
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(by_weight, np.pad(want_weight, ((0, 11), (0, 0))), rtol=1e-10)
    np.testing.assert_allclose(by_bias, np.pad(want_bias, (0, 11)), rtol=1e-10)
