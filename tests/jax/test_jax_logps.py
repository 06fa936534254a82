"""`spoloss.jax`: log-probabilities of sequences, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
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


LABEL_DTYPES = [
    ("uint8", 200),  # 156 is -100 mod 256
    ("uint8", 256),
    ("uint8", 300),
    ("uint16", 65_536),
    ("int16", 50_257),
]


@pytest.mark.parametrize(("dtype", "vocabulary"), LABEL_DTYPES)
def test_labels_and_offsets_of_any_integer_dtype(dtype: str, vocabulary: int) -> None:
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(1, 4, 2)))
    weight = jnp.asarray(random.normal(size=(vocabulary, 2)))
    ids = jnp.array([[3, 156, vocabulary - 1, 7]])
    ids = jnp.where(ids > jnp.iinfo(dtype).max, 5, ids)
    cu = jnp.array([0, 1, 4])

    def logps(labels: Array, cu_seqlens: Array) -> tuple[Array, ...]:
        options = {"cu_seqlens": cu_seqlens, "ignore_index": 7}
        return (
            linear_logps(hidden, weight, labels, **options),
            sequence_logps(hidden @ weight.T, labels, **options),
            linear_logps(hidden, weight, labels, shift=False),
        )

    for got, want in zip(logps(ids.astype(dtype), cu.astype(dtype)), logps(ids, cu), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    # Also of a length that the offsets' dtype cannot hold.
    row = jnp.zeros((1, 300), "uint8")
    assert np.isnan(sequence_logps(jnp.zeros((1, 300, 2)), row, cu_seqlens=jnp.uint8([0, 44])))


@pytest.mark.parametrize("softcap", [None, 1.0, 30.0])
@pytest.mark.parametrize("logit_scale", [1.0, -0.5])
def test_a_bias_of_minus_infinity_is_probability_0(
    softcap: float | None, logit_scale: float
) -> None:
    """Under a soft-cap too, and with low logits: the padded entries are as if absent."""
    arrays = inputs()
    wide = jnp.concatenate([arrays["weight"], jnp.ones((3, 4))])
    low = arrays["bias"] - 60.0
    bias = jnp.concatenate([low, jnp.full(3, -jnp.inf)])
    head = {"softcap": softcap, "logit_scale": logit_scale}

    def logps(hidden: Array, weight: Array, bias: Array) -> Array:
        return linear_logps(hidden, weight, CHOSEN, bias=bias, **head).sum()

    hidden = arrays["chosen_hidden"]
    got, got_grads = jax.value_and_grad(logps, (0, 1, 2))(hidden, wide, bias)
    want, want_grads = jax.value_and_grad(logps, (0, 1, 2))(hidden, arrays["weight"], low)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g[: len(w)], w, rtol=1e-10, atol=1e-14)
        assert not g[len(w) :].any()
    padded = CHOSEN.at[0, 4].set(len(wide) - 1)
    logp, grad = jax.value_and_grad(
        lambda bias: linear_logps(hidden, wide, padded, bias=bias, **head)[0]
    )(bias)
    assert logp == -jnp.inf
    assert np.isfinite(grad).all()


def of_three(logits: Array) -> Array:
    """Log p of the first of three tokens, by the identity as the head."""
    head = jnp.eye(3, dtype=logits.dtype)
    return linear_logps(logits[None, None], head, jnp.zeros((1, 1), int), shift=False)[0]


@pytest.mark.parametrize("offset", [0.0, 2.0**20, -(2.0**20)])
@pytest.mark.parametrize("x", [28.0, 9.0, 1.0, 0.0, -1.0, -40.0, -1e4])
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
