"""`spoloss.jax`: the fused losses equal the way by all logits, and what they are not given."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import spoloss
import spoloss.jax
from helpers.jax_fused import (
    IGNORED,
    INPUTS,
    P,
    T,
    V,
    check_fused,
    fused,
    make_inputs,
    make_labels,
    quick_jit,
    unfused,
    value_and_grads,
)
from helpers.pairwise import pairwise
from helpers.wrong import INCONSISTENT, broken
from spoloss import DPO, SPO, Squared
from spoloss.jax import _objective, _one_pass, _softmax, linear_pair_loss

pytestmark = pytest.mark.usefixtures("quick_compiler")

HIDDEN = ("chosen_hidden", "rejected_hidden")
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "softcap": {"softcap": 2.0, "logit_scale": 0.7, "temperature": 1.3},
    "nll": {"nll_weight": 0.3, "logit_scale": -0.5, "shift": False},
    "average": {"nll_weight": 0.3, "average": True, "temperature": 0.8},
}
ROWS = pairwise(
    {
        "loss": [SPO(linear_below=-0.5), DPO(label_smoothing=0.1), Squared()],
        "reduction": ["mean", "sum", "none"],
        "wanted": [INPUTS, HIDDEN, ("rejected_hidden", "weight"), ("bias", "beta")],
        # All pairs in one tile; some of them; some tiles for a pair; token by token.
        "chunk_size": [None, 30, 5, 1],
        "options": list(OPTIONS),
        "without": [(), ("weights",)],
        "packed": [False, True],
    }
)


@dataclass(frozen=True)
class Cubed:
    """A loss of one's own: l = (beta * h - 1)^3."""

    def value(self, margin: Any, beta: Any) -> Any:
        return (beta * margin - 1.0) ** 3

    def slope(self, margin: Any, beta: Any) -> Any:
        return 3.0 * beta * (beta * margin - 1.0) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_fused_equals_unfused(row: dict[str, Any]) -> None:
    inputs = {name: a for name, a in make_inputs().items() if name not in row["without"]}
    check_fused(
        row["loss"],
        inputs,
        [name for name in row["wanted"] if name in inputs],
        reduction=row["reduction"],
        chunk_size=row["chunk_size"],
        packed=row["packed"],
        **OPTIONS[row["options"]],
    )


@pytest.mark.parametrize("options", [{"average": True}, {"nll_weight": 0.3}], ids=str)
def test_a_mean_over_one_token(options: dict[str, Any]) -> None:
    """An answer of one token is its own mean. Only the first position of each row is read."""
    inputs, one = make_inputs(), jnp.full((P, 2), 3).at[:, 1].set(IGNORED)
    sides = [inputs[name][:, :2] for name in HIDDEN]

    def loss(weight: Array, options: dict[str, Any]) -> Array:
        return linear_pair_loss(
            SPO(), *sides, weight, one, one, 0.0, 0.0, beta=0.1, shift=False, **options
        ).loss

    def by_logits(weight: Array) -> Array:
        chosen, rejected = (jax.nn.log_softmax(s[:, 0] @ weight.T)[:, 3] for s in sides)
        value = spoloss.spo_loss(chosen, rejected, 0.0, 0.0, beta=0.1)
        return value - options.get("nll_weight", 0.0) * chosen.mean()

    got = jax.value_and_grad(loss)(inputs["weight"], options)
    want = jax.value_and_grad(by_logits)(inputs["weight"])
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-13), got, want)


def test_a_loss_of_ones_own() -> None:
    check_fused(Cubed(), make_inputs(), INPUTS, chunk_size=13)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("name", sorted(INCONSISTENT.keys() - {"slope cut"}))  # PyTorch's
def test_the_check_sees_a_wrong_loss(name: str, chunk_size: int | None) -> None:
    with pytest.raises(AssertionError):
        check_fused(broken(SPO())[name], make_inputs(), ("weight",), chunk_size=chunk_size)


WRONG: dict[str, tuple[Any, str, Any]] = {
    "a sign lost": (_objective.Objective, "shares", lambda self, n: abs(SHARES(self, n))),
    "no NLL": (_objective.Objective, "nll_slopes", lambda _self, n, *_: 0.0 * n[:, 0]),
    "a token's share lost": (
        _objective.Objective,
        "shares",
        lambda self, n: jnp.sign(SHARES(self, n)),
    ),
    "the gain lost": (_softmax.HeadOptions, "gain", property(lambda _self: 1.0)),
    "the label left out": (
        _softmax.Head,
        "softmax",
        lambda self, *a: SOFTMAX(self, *a)._replace(at_label=jnp.zeros(len(a[1]))),
    ),
    "softcap's slope lost": (
        _softmax.Head,
        "_bend",
        lambda _self, logits: jnp.ones_like(logits),
    ),
    "long pairs not scaled": (
        _one_pass.HeadSums,
        "plus",
        lambda self, _, more: jax.tree.map(jnp.add, self, more),
    ),
}
SHARES, SOFTMAX = _objective.Objective.shares, _softmax.Head.softmax


@dataclass(frozen=True)
class Named(SPO):
    """SPO, but another loss to `jax.jit`, which does not take a compiled program of SPO's."""

    name: str = ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", *WRONG])
def test_the_check_sees_a_wrong_fusion(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = functools.partial(
        check_fused,
        Named(name=name),
        make_inputs(),
        ("chosen_hidden", "weight"),
        chunk_size=7,
        average=True,
        softcap=2.0,
        logit_scale=0.7,
        nll_weight=0.3,
    )
    if not name:
        check()
        return
    monkeypatch.setattr(*WRONG[name])
    with pytest.raises(AssertionError):
        check()


SPELLINGS: dict[str, dict[str, Any]] = {
    "spo": {"reward_gap": jnp.array([0.5, 1.0, 2.0, 1.5, 1.0]), "linear_below": -0.5},
    "dpo": {"label_smoothing": 0.1},
    "squared": {"reward_gap": 0.7},
    "ipo": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    """Each name is its loss, gradients by beta and reward gap included."""
    inputs, labels, options = make_inputs(), make_labels(), SPELLINGS[name]
    sides = [inputs[side] for side in HIDDEN]
    arrays = {"beta": inputs["beta"]}
    arrays |= {k: jnp.asarray(v) for k, v in options.items() if k == "reward_gap"}
    numbers = {k: v for k, v in options.items() if k not in arrays}
    references = (inputs["reference_chosen"], inputs["reference_rejected"])

    def one_pass(weight: Array, arrays: dict[str, Array]) -> Array:
        function = getattr(spoloss.jax, f"linear_{name}_loss")
        return function(*sides, weight, *labels, *references, **arrays, **numbers).loss

    def two(weight: Array, arrays: dict[str, Array]) -> Array:
        function = getattr(spoloss, f"{name}_loss")
        logps = (
            spoloss.jax.sequence_logps(hidden @ weight.T, ids)
            for hidden, ids in zip(sides, labels, strict=True)
        )
        return function(*logps, *references, **arrays, **numbers)

    got, want = (
        quick_jit(jax.value_and_grad(f, (0, 1)))(inputs["weight"], arrays) for f in (one_pass, two)
    )
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-12), got, want)


@pytest.mark.slow
def test_log_probabilities_are_returned_as_constants() -> None:
    inputs, (chosen, rejected) = make_inputs(), make_labels()

    def metric(weight: Array) -> Any:
        sides = [inputs[side] for side in HIDDEN]
        out = linear_pair_loss(SPO(), *sides, weight, chosen, rejected, 0.0, 0.0, beta=0.1)
        return out.chosen_logps.sum() + out.rejected_logps.sum(), out

    grad, out = jax.grad(metric, has_aux=True)(inputs["weight"])
    assert not grad.any()
    for hidden, labels, logps in (
        (inputs["chosen_hidden"], chosen, out.chosen_logps),
        (inputs["rejected_hidden"], rejected, out.rejected_logps),
    ):
        want = spoloss.jax.linear_logps(hidden, inputs["weight"], labels)
        np.testing.assert_allclose(logps, want, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("wanted", [INPUTS[:4], HIDDEN])
def test_nan_in_ignored_rows_and_in_pairs_of_weight_0(
    wanted: tuple[str, ...], chunk_size: int | None
) -> None:
    """Nothing of them reaches a gradient, and the rest is as it was."""
    inputs = make_inputs()
    dirty = dict(inputs)
    for side, labels in zip(HIDDEN, make_labels(), strict=True):
        predicts = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
        lost = (predicts == IGNORED) | (inputs["weights"] == 0.0)[:, None]
        dirty[side] = jnp.where(lost[..., None], jnp.nan, inputs[side])
    call = functools.partial(fused, SPO(), chunk_size=chunk_size, nll_weight=0.2)
    clean, noisy = (value_and_grads(call, each, wanted) for each in (inputs, dirty))
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12),
        noisy,
        clean,
    )


def test_a_reward_gap_of_0_in_a_pair_of_weight_0() -> None:
    inputs, labels = make_inputs(), make_labels()

    def loss(gap: Array) -> Array:
        return spoloss.jax.linear_spo_loss(
            *(inputs[side] for side in HIDDEN),
            inputs["weight"],
            *labels,
            0.0,
            0.0,
            reward_gap=gap,
            weights=inputs["weights"],
        ).loss

    value, grad = quick_jit(jax.value_and_grad(loss))(jnp.where(inputs["weights"] == 0.0, 0.0, 1.0))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


@pytest.mark.slow
def test_what_cannot_be_looked_at_makes_nan() -> None:
    """A label outside of the vocabulary, offsets out of order: no wrong number, and no error."""
    inputs, labels = make_inputs(), make_labels()
    by_head, by_logits = map(quick_jit, (spoloss.jax.linear_logps, spoloss.jax.sequence_logps))
    for wrong in (V, -1):
        outside = labels[0].at[1, 2].set(wrong)
        logps = by_head(inputs["chosen_hidden"], inputs["weight"], outside)
        others = by_logits(inputs["chosen_hidden"] @ inputs["weight"].T, outside)
        for each in (logps, others):
            assert np.isnan(each).tolist() == [False, True, False, False, False]
    hidden, ids = inputs["chosen_hidden"].reshape(1, P * T, -1), labels[0].reshape(1, P * T)
    for offsets in ([0, 9, 7, P * T], [1, 9, P * T], [0, 9, P * T - 1]):
        cu = jnp.array(offsets)
        assert np.isnan(by_head(hidden, inputs["weight"], ids, cu_seqlens=cu)).all()
        assert np.isnan(by_logits(hidden @ inputs["weight"].T, ids, cu_seqlens=cu)).all()


@pytest.mark.parametrize("wrong", ["chosen_cu_seqlens", "rejected_cu_seqlens"])
@pytest.mark.parametrize("offsets", [[0, 9, 7, P * T], [1, 9, P * T], [0, 9, P * T - 1]], ids=str)
def test_offsets_of_either_side_that_do_not_rise_make_nan(wrong: str, offsets: list[int]) -> None:
    inputs, labels = make_inputs(), make_labels()
    hidden, ids = inputs["chosen_hidden"].reshape(1, P * T, -1), labels[0].reshape(1, P * T)
    sides = (hidden, hidden, inputs["weight"], ids, ids, 0.0, 0.0)
    in_order = jnp.array([*range(len(offsets) - 1), P * T])
    rising = {f"{side}_cu_seqlens": in_order for side in ("chosen", "rejected")}
    broken = {**rising, wrong: jnp.array(offsets)}
    assert np.isfinite(linear_pair_loss(SPO(), *sides, beta=0.1, **rising).loss)
    assert np.isnan(linear_pair_loss(SPO(), *sides, beta=0.1, **broken).loss)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [1, 7])
def test_any_number_of_pairs(pairs: int) -> None:
    """Also a prime, whose last group of pairs is smaller."""
    random = np.random.default_rng(3)
    hidden = jnp.asarray(random.normal(size=(2, pairs, 4, 3)))
    labels = jnp.asarray(random.integers(0, 5, (2, pairs, 4)))
    weight = jnp.asarray(random.normal(size=(5, 3)))

    def loss(weight: Array, chunk_size: int) -> Array:
        return linear_pair_loss(
            DPO(), *hidden, weight, *labels, 0.0, 0.0, beta=0.1, chunk_size=chunk_size
        ).loss

    want, got = (
        quick_jit(jax.grad(functools.partial(loss, chunk_size=rows)))(weight) for rows in (1000, 14)
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)


def three_ways(dtype: Any) -> tuple[Any, Any, Any]:
    """Loss and gradients of one pass and of all logits in half precision, and in float64."""
    half = make_inputs(dtype)
    exact = {name: array.astype(jnp.float64) for name, array in half.items()}
    call = functools.partial(fused, SPO(), nll_weight=0.2)
    wanted = INPUTS[:4]
    return (
        value_and_grads(call, half, wanted),
        value_and_grads(functools.partial(unfused, SPO(), nll_weight=0.2), half, wanted),
        value_and_grads(call, exact, wanted),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype: Any) -> None:
    """Sums in at least float32: as near to float64 as the rounding of the results allows."""
    (value, grads), (plain_value, plain_grads), (exact_value, exact) = three_ways(dtype)
    assert value.dtype == jnp.float64  # the references are
    error = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))  # noqa: E731
    assert error(value, exact_value) <= max(1.1 * error(plain_value, exact_value), 1e-5)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        assert error(grad, exact[name]) <= max(1.1 * error(plain_grads[name], exact[name]), eps)


@pytest.mark.slow
def test_small_slopes_in_float16() -> None:
    """A slope of 1e-7 is below float16's smallest number, and its loss scale brings it back."""
    inputs = make_inputs(jnp.float16)

    def loss(weight: Array) -> Array:
        return 2.0**20 * fused(SPO(), {**inputs, "weight": weight, "beta": 1e-7 * inputs["beta"]})

    exact = {name: array.astype(jnp.float64) for name, array in inputs.items()}
    got = jax.grad(loss)(inputs["weight"])
    inputs = exact
    want = jax.grad(loss)(exact["weight"])
    assert jnp.linalg.norm(got - want) <= 2e-3 * jnp.linalg.norm(want)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float32_sums_of_long_sequences(*, packed: bool, reduction: str) -> None:
    """One summation for all ways: 20,000 tokens to a few eps of the sum."""
    tokens = 20_000
    random = np.random.default_rng(4)
    hidden = jnp.asarray(random.normal(size=(1, tokens, 4)), "float32")
    weight = jnp.asarray(random.normal(size=(21, 4)), "float32")
    labels = jnp.asarray(random.integers(0, 21, (1, tokens)))
    offsets = {"cu_seqlens": jnp.array([0, tokens])} if packed else {}
    each = spoloss.jax.linear_logps(hidden, weight, labels, per_token=True)
    exact = np.asarray(each, np.float64).sum()

    def loss(weight: Array) -> tuple[Array, Any]:
        cu = {f"{side}_{k}": v for side in ("chosen", "rejected") for k, v in offsets.items()}
        out = linear_pair_loss(
            *(SPO(), hidden, hidden, weight, labels, labels, 0.0, 0.0),
            beta=0.1,
            chunk_size=100,
            reduction=reduction,
            **cu,
        )
        return out.loss.sum(), out

    _, out = quick_jit(jax.grad(loss, has_aux=True))(weight)
    ways = [
        out.chosen_logps,
        out.rejected_logps,
        spoloss.jax.linear_logps(hidden, weight, labels, chunk_size=100, **offsets),
        spoloss.jax.sequence_logps(hidden @ weight.T, labels, **offsets),
    ]
    np.testing.assert_allclose(jnp.concatenate(ways), exact, rtol=4 * np.finfo(np.float32).eps)
