"""The fused losses of JAX: mistakes inside are caught, half precision, any number of pairs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from helpers.wings import (
    HEAD,
    ORACLE,
    STATES,
    WINGS,
    APODown,
    check_same,
    completions_of,
    fused,
    head_of,
    make_arrays,
    unfused,
)
from spoloss import DPO, SPO
from spoloss._objective import Objective
from spoloss.jax import (
    Completions,
    Head,
    _one_pass,
    _softmax,
    _tokens,
    linear_logps,
    linear_pair_loss,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")

JAX = WINGS["jax"]
SOFTMAX = _softmax.Projection.softmax
SLOPES = Objective.slopes
WRONG: dict[str, tuple[Any, str, Any]] = {
    "a slope's sign lost": (
        Objective,
        "slopes",
        lambda *a: (SLOPES(*a)[0], -SLOPES(*a)[1]),
    ),
    "the gain lost": (_softmax.Projection, "gain", property(lambda _self: 1.0)),
    "the label left out": (
        _softmax.Projection,
        "softmax",
        lambda self, *a: SOFTMAX(self, *a)._replace(at_label=jnp.zeros(len(a[1]))),
    ),
    "softcap's slope lost": (
        _softmax.Projection,
        "_bend",
        lambda _self, logits: jnp.ones_like(logits),
    ),
    "long pairs not scaled": (
        _one_pass.HeadSums,
        "plus",
        lambda self, _, more: jax.tree.map(jnp.add, self, more),
    ),
    "a tile's token weights lost": (_tokens.Tile, "weighted", lambda _self, values: values),
}


@dataclass(frozen=True)
class Named(SPO):
    """SPO, but another loss to `jax.jit`, which does not take a compiled program of SPO's."""

    name: str = ""


@pytest.mark.parametrize(
    "name",
    ["", *(pytest.param(each, marks=pytest.mark.extended) for each in WRONG)],
)
def test_the_check_catches_a_wrong_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"softcap": 2.0, "logit_scale": 0.7, "average": True, "nll_weight": 0.3}
    check = functools.partial(
        check_same,
        JAX,
        lambda a: fused(JAX, Named(name=name), a, chunk_size=7, **options).loss,
        lambda a: unfused(ORACLE, SPO(), a, **options),
        make_arrays(JAX),
        (STATES[0], "weight"),
        oracle=ORACLE,
    )
    if not name:
        check()
        return
    monkeypatch.setattr(*WRONG[name])
    with pytest.raises(AssertionError):
        check()


def test_log_probabilities_are_returned_as_constants() -> None:
    arrays = make_arrays(JAX)
    sides = [completions_of(JAX, arrays, side, {}) for side in ("chosen", "rejected")]

    def metric(head: Head) -> Any:
        out = linear_pair_loss(SPO(), head, *sides, 0.0, 0.0, beta=0.1)
        return out.chosen_logps.sum() + out.rejected_logps.sum(), out

    head = head_of(JAX, arrays, {})
    grad, out = jax.grad(metric, has_aux=True)(head)
    assert not grad.weight.any()
    for side, logps in zip(sides, (out.chosen_logps, out.rejected_logps), strict=True):
        np.testing.assert_allclose(logps, linear_logps(head, side), rtol=1e-12)


@pytest.mark.parametrize(
    ("wanted", "reduction", "products"),
    [
        ((), "mean", 1),
        (STATES, "mean", 2),
        (STATES, "none", 2),
        (("weight",), "mean", 2),
        ((*STATES, "weight"), "mean", 3),
        ((*STATES, "weight"), "none", 4),
    ],
)
@pytest.mark.parametrize("loss", [SPO(), APODown()], ids=["margin", "pair"])
def test_products_per_token(
    loss: Any, wanted: tuple[str, ...], reduction: str, products: int
) -> None:
    """The matrix products in the program of a batch whose pairs share a tile."""
    arrays = make_arrays(JAX)
    del arrays["bias"]
    arrays["weight"] = jnp.ones((16, arrays["weight"].shape[1]))  # its update is one slice in eight

    def total(by: dict[str, Array]) -> Array:
        return fused(JAX, loss, {**arrays, **by}, reduction=reduction, softcap=2.0).loss.sum()

    by = {name: arrays[name] for name in wanted}
    program = str(jax.make_jaxpr(jax.grad(total) if wanted else total)(by))
    assert program.count("dot_general") == products


def test_a_reward_gap_of_0_in_a_pair_of_weight_0() -> None:
    arrays = make_arrays(JAX)
    gap = jnp.where(arrays["weights"] == 0.0, 0.0, 1.0)
    value, grads = JAX.grads(
        lambda a: fused(JAX, SPO(), a).loss, {**arrays, "reward_gap": gap}, ["reward_gap", "weight"]
    )
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("pairs", [1, 7])
def test_any_number_of_pairs(pairs: int) -> None:
    """Also a prime, whose last group of pairs is smaller."""
    random = np.random.default_rng(3)
    hidden = jnp.asarray(random.normal(size=(2, pairs, 4, 3)))
    labels = jnp.asarray(random.integers(0, 5, (2, pairs, 4)))
    weight = jnp.asarray(random.normal(size=(5, 3)))

    def loss(weight: Array, chunk_size: int) -> Array:
        head = Head(weight, chunk_size=chunk_size)
        return linear_pair_loss(
            DPO(), head, *map(Completions, hidden, labels), 0.0, 0.0, beta=0.1
        ).loss

    want, got = (
        jax.jit(jax.grad(functools.partial(loss, chunk_size=rows)))(weight) for rows in (1000, 14)
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        ("bfloat16", (*STATES, *HEAD)),
        ("float16", STATES),
        pytest.param("bfloat16", STATES, marks=pytest.mark.extended),
        pytest.param("float16", (*STATES, *HEAD), marks=pytest.mark.extended),
    ],
)
def test_half_precision(dtype: str, wanted: tuple[str, ...]) -> None:
    """Sums in at least float32: as near to float64 as the rounding of the results allows."""
    half = make_arrays(JAX, dtype)
    exact = {
        n: ORACLE.array(a if n.endswith("labels") else a.astype("float64")) for n, a in half.items()
    }
    options = {"nll_weight": 0.2}
    mine = lambda a: fused(JAX, SPO(), a, **options).loss  # noqa: E731
    value, grads = JAX.grads(mine, half, wanted)
    plain, plain_grads = JAX.grads(lambda a: unfused(JAX, SPO(), a, **options), half, wanted)
    truth, true_grads = ORACLE.grads(lambda a: unfused(ORACLE, SPO(), a, **options), exact, wanted)
    truth = ORACLE.numpy(truth)
    error = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))  # noqa: E731
    assert error(value, truth) <= max(1.1 * error(plain, truth), 1e-5)
    eps = float(jnp.finfo(dtype).eps)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        got, naive = (each.astype("float64") for each in (grad, plain_grads[name]))
        # A frozen head's directions are rounded once before the slope.
        most = 1.3 if wanted == STATES else 1.1
        assert error(got, true_grads[name]) <= max(most * error(naive, true_grads[name]), eps)


@pytest.mark.parametrize("trained", [False, True])
def test_a_loss_scale_keeps_the_gradient_of_a_sure_token(*, trained: bool) -> None:
    """Its derivative is 8e-8, which float16 cannot hold before it is scaled."""
    head = Head(20.0 * jnp.eye(3, 2, dtype="float16"))  # logits 20, 0, 0
    hidden, scale = jnp.array([[[1.0, 0.0]]], "float16"), 2.0**16

    def loss(hidden: Array, head: Head) -> Array:
        return (
            linear_logps(head, Completions(hidden, jnp.zeros((1, 1), int), shift=False))[0] * scale
        )

    grad = jax.grad(loss, (0, 1) if trained else 0)(hidden, head)
    of_hidden = grad[0] if trained else grad
    assert of_hidden.dtype == jnp.float16
    expected = 20.0 * 2.0 * math.exp(-20.0) * scale
    np.testing.assert_allclose(of_hidden[0, 0, 0].astype("float64"), expected, rtol=1e-3)


def test_small_slopes_in_float16() -> None:
    """A slope of 1e-7 is below float16's smallest number, and its loss scale brings it back."""
    arrays = make_arrays(JAX, "float16")
    arrays["beta"] = 1e-7 * arrays["beta"]
    scaled = lambda a: 2.0**20 * fused(JAX, SPO(), a).loss  # noqa: E731
    _, got = JAX.grads(scaled, arrays, HEAD)
    exact = {n: a if n.endswith("labels") else a.astype("float64") for n, a in arrays.items()}
    _, want = JAX.grads(scaled, exact, HEAD)
    for name in HEAD:
        error = np.linalg.norm(got[name].astype("float64") - want[name])
        assert error <= 2e-3 * np.linalg.norm(want[name])
