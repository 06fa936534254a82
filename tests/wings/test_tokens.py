"""Which tokens count: labels of any integer dtype, weights of tokens, packing, empty batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from helpers.wings import (
    IGNORED,
    ORACLE,
    TOKENS,
    D,
    Margin,
    P,
    T,
    V,
    Wing,
    check_same,
    completions_of,
    fused,
    head_of,
    make_arrays,
    unfused,
)
from spoloss import SPO, Squared

Logps = Callable[..., Any]


def by_logits(wing: Wing, arrays: Any, labels: Any, **options: Any) -> Any:
    logits = arrays["chosen_hidden"] @ arrays["weight"].T
    return wing.api.sequence_logps(logits, labels, **options)


def by_head(wing: Wing, arrays: Any, labels: Any, **options: Any) -> Any:
    how = {name: options.pop(name) for name in ("average", "per_token") if name in options}
    completions = wing.api.Completions(arrays["chosen_hidden"], labels, **options)
    return wing.api.linear_logps(wing.api.Head(arrays["weight"], chunk_size=3), completions, **how)


WAYS: dict[str, Logps] = {"logits": by_logits, "head": by_head}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request: pytest.FixtureRequest) -> Logps:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("dtype", "vocabulary"),
    [
        ("uint8", 200),  # -100 is 156 there
        ("uint8", 256),  # V does not fit
        ("uint8", 300),
        ("int8", 100),
        ("int16", 400),
        ("uint16", 400),
        ("int32", 400),
    ],
)
def test_labels_of_any_integer_dtype(wing: Wing, way: Logps, dtype: str, vocabulary: int) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, min(vocabulary, np.iinfo(dtype).max), (2, 5))
    if vocabulary > 156 and dtype != "int8":
        labels[:, 1:3] = 156
    arrays = {
        "chosen_hidden": wing.array(random.normal(size=(2, 5, D))),
        "weight": wing.array(random.normal(size=(vocabulary, D))),
    }
    want = way(wing, arrays, wing.array(labels))
    got = way(wing, arrays, wing.array(labels.astype(dtype)))
    np.testing.assert_allclose(wing.numpy(got), wing.numpy(want), rtol=1e-14)


def test_another_ignore_index(wing: Wing, way: Logps) -> None:
    arrays = make_arrays(wing)
    labels = wing.numpy(arrays["chosen_labels"])
    other = wing.array(np.where(labels == IGNORED, 0, labels))
    used = wing.array(np.where(labels == 0, IGNORED, labels))
    got, want = way(wing, arrays, other, ignore_index=0), way(wing, arrays, used)
    np.testing.assert_allclose(wing.numpy(got), wing.numpy(want), rtol=1e-14)


@pytest.mark.parametrize("average", [False, True])
def test_whole_weights_are_repetitions(wing: Wing, way: Logps, *, average: bool) -> None:
    """A weight of 2 counts a token twice, a weight of 0 as an ignored label."""
    arrays = make_arrays(wing)
    labels = wing.numpy(arrays["chosen_labels"])
    weights = np.random.default_rng(0).integers(0, 3, labels.shape).astype(float)
    weights[0], weights[1] = 0.0, 1.0
    how = {"token_weights": wing.array(weights), "average": average}
    got = way(wing, arrays, arrays["chosen_labels"], **how)
    want = sum(
        wing.numpy(way(wing, arrays, wing.array(np.where(weights >= n, labels, IGNORED))))
        for n in (1, 2)
    )
    if average:
        counted = (weights * (labels != IGNORED))[:, 1:].sum(axis=1)
        want = want / np.maximum(counted, 1.0)
    np.testing.assert_allclose(wing.numpy(got), want, rtol=1e-12, atol=1e-14)


def test_a_token_that_does_not_count_may_hold_anything(wing: Wing, way: Logps) -> None:
    """Its label is ignored, its weight is 0, or it is the last one, which predicts nothing."""
    arrays, weights = make_arrays(wing), np.ones((P, T))
    weights[:, 3] = 0.0
    labels, hidden = (wing.numpy(arrays[f"chosen_{name}"]).copy() for name in ("labels", "hidden"))
    hidden[:, :-1][(labels[:, 1:] == IGNORED) | (weights[:, 1:] == 0.0)] = np.nan
    hidden[:, -1] = np.inf
    poisoned = {**arrays, "chosen_hidden": wing.array(hidden)}
    call = lambda a: way(wing, a, a["chosen_labels"], token_weights=wing.array(weights))  # noqa: E731
    (want, want_grads), (got, grads) = (
        wing.grads(call, each, ["chosen_hidden"]) for each in (arrays, poisoned)
    )
    np.testing.assert_allclose(wing.numpy(got), wing.numpy(want), rtol=1e-14)
    np.testing.assert_allclose(grads["chosen_hidden"], want_grads["chosen_hidden"], rtol=1e-12)


def test_the_derivative_with_respect_to_a_token_weight(wing: Wing, way: Logps) -> None:
    """It is the token's log-probability, and 0 for a weight of 0, which leaves the token out."""
    arrays = make_arrays(wing)
    call = lambda a: way(  # noqa: E731
        wing, a, a["chosen_labels"], token_weights=a["chosen_token_weights"], shift=False
    )
    _, grads = wing.grads(call, arrays, ["chosen_token_weights"])
    side = wing.api.Completions(arrays["chosen_hidden"], arrays["chosen_labels"], shift=False)
    each = wing.api.linear_logps(wing.api.Head(arrays["weight"]), side, per_token=True)
    counts = wing.numpy(arrays["chosen_token_weights"]) != 0.0
    assert not counts.all()
    want = np.where(counts, wing.numpy(each), 0.0)
    np.testing.assert_allclose(grads["chosen_token_weights"], want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_packed_rows_equal_padded_ones(
    wing: Wing, way: Logps, dtype: str, *, average: bool, shift: bool
) -> None:
    """Sequences of 5, 1, 0, 7 and 0 tokens in one row; half precision is summed in float32."""
    lengths = np.array([5, 1, 0, 7, 0])
    inside = np.arange(T) < lengths[:, None]
    padded = make_arrays(wing, dtype)
    labels = wing.numpy(padded["chosen_labels"])
    padded["chosen_labels"] = wing.array(np.where(inside, labels, IGNORED))
    names = ("chosen_hidden", "chosen_labels", "chosen_token_weights")
    row = padded | {name: padded[name][inside][None] for name in names}
    offsets = wing.array(np.cumsum([0, *lengths]).astype("int32"))

    def logps(a: Any, **how: Any) -> Any:
        weights = a["chosen_token_weights"]
        return way(wing, a, a["chosen_labels"], token_weights=weights, shift=shift, **how)

    tight = {"rtol": 1e-6, "atol": 1e-6} if dtype == "bfloat16" else {"rtol": 1e-12, "atol": 1e-14}
    if way is by_head:
        each = wing.numpy(logps(padded, per_token=True))
        one = wing.numpy(logps(row, per_token=True, cu_seqlens=offsets))
        np.testing.assert_allclose(one, each[inside][None], **tight)
    need = ["chosen_hidden", "weight"]
    want, want_grads = wing.grads(lambda a: logps(a, average=average), padded, need)
    got, grads = wing.grads(lambda a: logps(a, average=average, cu_seqlens=offsets), row, need)
    np.testing.assert_allclose(wing.numpy(got), wing.numpy(want), **tight)
    if dtype == "float64":
        want_grads["chosen_hidden"] = want_grads["chosen_hidden"][inside][None]
        for name in need:
            np.testing.assert_allclose(grads[name], want_grads[name], rtol=1e-11, atol=1e-12)


def test_sums_are_accurate_to_a_few_eps(wing: Wing, way: Logps) -> None:
    """20,000 tokens, which lose 0.1 nats if they are added one by one in float32."""
    length, random = 20_000, np.random.default_rng(0)
    arrays = {
        "chosen_hidden": wing.array(random.normal(size=(1, length, 2)), "float32"),
        "weight": wing.array(random.normal(size=(11, 2)), "float32"),
    }
    labels = wing.array(random.integers(0, 11, (1, length)))
    cuts = [0, 0, 1, 255, 256, 256, 300, 1024, 3_000, length, length]
    packs = {"shift": False, "cu_seqlens": wing.array(np.array(cuts))}
    head, side = wing.api.Head(arrays["weight"]), wing.api.Completions
    each = side(arrays["chosen_hidden"], labels, shift=False)
    tokens = wing.numpy(wing.api.linear_logps(head, each, per_token=True)).astype(np.float64)[0]
    want = np.array([tokens[a:b].sum() for a, b in itertools.pairwise(cuts)])
    got = wing.numpy(way(wing, arrays, labels, **packs))
    np.testing.assert_allclose(got, want, rtol=6 * np.finfo(np.float32).eps)
    whole = wing.numpy(way(wing, arrays, labels, shift=False))
    np.testing.assert_allclose(whole, [tokens.sum()], rtol=6 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("need", [["weight"], ["chosen_hidden"], []])
def test_the_reductions_agree_on_long_sequences(
    wing: Wing, need: list[str], reduction: str
) -> None:
    """Their log-probabilities come from tiles, or from sums over rows."""
    length, random = 20_000, np.random.default_rng(0)
    states = random.normal(size=(1, length, 2))
    arrays = {
        "chosen_hidden": wing.array(states, "float32"),
        "rejected_hidden": wing.array(states[:, :5], "float32"),
        "chosen_labels": wing.array(random.integers(0, 11, (1, length))),
        "rejected_labels": wing.array(np.full((1, 5), IGNORED)),
        "weight": wing.array(random.normal(size=(11, 2)), "float32"),
        "beta": 1.0,
    }
    side = completions_of(wing, arrays, "chosen", {"shift": False})
    tokens = wing.api.linear_logps(head_of(wing, arrays, {}), side, per_token=True)
    want = wing.numpy(tokens).astype(np.float64).sum()
    options = {"chunk_size": 5_000, "shift": False, "reduction": reduction}
    value, _ = wing.grads(lambda a: fused(wing, Margin(), a, **options).loss, arrays, need)
    np.testing.assert_allclose(wing.numpy(value), want, rtol=6 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(
    ("pairs", "length", "reduction"),
    [(0, 4, "mean"), (0, 0, "none"), (3, 1, "sum"), (3, 0, "none"), (3, 4, "mean")],
)
def test_no_pairs_and_no_tokens(wing: Wing, pairs: int, length: int, reduction: str) -> None:
    arrays = {
        "chosen_hidden": wing.array(np.ones((pairs, length, D))),
        "rejected_hidden": wing.array(np.ones((pairs, 0, D))),
        "chosen_labels": wing.array(np.full((pairs, length), IGNORED)),
        "rejected_labels": wing.array(np.full((pairs, 0), IGNORED)),
        "weight": wing.array(np.ones((V, D))),
        "beta": 0.1,
    }
    for need in (["weight", "chosen_hidden"], ["chosen_hidden"], []):
        call = lambda a: fused(wing, SPO(), a, reduction=reduction, nll_weight=1.0).loss  # noqa: E731
        value, grads = wing.grads(call, arrays, need)
        want = {"mean": np.nan if pairs == 0 else 0.0, "sum": 0.0, "none": np.zeros(pairs)}
        np.testing.assert_array_equal(wing.numpy(value), want[reduction])
        for grad in grads.values():
            assert (grad == 0.0).all()


LONG = {"chunk_size": 3, "nll_weight": 0.5}


@pytest.mark.parametrize(
    ("options", "need"),
    [
        ({}, []),
        ({}, ["chosen_hidden", "rejected_hidden"]),
        ({}, ["chosen_hidden", "rejected_hidden", "weight", "bias"]),
        (LONG, ["chosen_hidden", "rejected_hidden", "weight", "bias"]),
        ({"reduction": "none"}, ["chosen_hidden", "rejected_hidden"]),
        ({"reduction": "none"}, ["chosen_hidden", "rejected_hidden", "weight", "bias"]),
    ],
    ids=["evaluated", "frozen", "trained", "long", "each frozen", "each trained"],
)
@pytest.mark.parametrize("poison", ["nan", "a label of probability 0"])
def test_a_pair_of_weight_0_is_left_out_whatever_it_holds(
    wing: Wing, poison: str, options: dict[str, Any], need: list[str]
) -> None:
    """Pair 3 of the case. What it holds stays visible in its log-probabilities."""
    clean = make_arrays(wing)
    numbers = {name: wing.numpy(array).copy() for name, array in clean.items()}
    for side in ("chosen", "rejected"):  # entry 0 belongs to pair 3 alone
        numbers[f"{side}_labels"][numbers[f"{side}_labels"] == 0] = 1
    numbers["bias"][0] = -np.inf
    clean = {name: wing.array(array) for name, array in numbers.items()}
    if poison == "nan":
        for name in ("chosen_hidden", "rejected_hidden", "reference_chosen"):
            numbers[name][3] = np.nan
    else:
        numbers["chosen_labels"][3] = 0
    poisoned = {name: wing.array(array) for name, array in numbers.items()}
    call = lambda a: fused(wing, SPO(), a, **options)  # noqa: E731
    want, want_grads = wing.grads(lambda a: call(a).loss, clean, ["weights", *need])
    got, grads = wing.grads(lambda a: call(a).loss, poisoned, ["weights", *need])
    np.testing.assert_allclose(wing.numpy(got), wing.numpy(want), rtol=1e-13)
    want_grads["weights"][3] = 0.0  # no derivative is made up
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, want_grads[name], rtol=1e-12, atol=1e-13)
    if not need:
        logps = wing.numpy(call(poisoned).chosen_logps)
        np.testing.assert_array_equal(np.isfinite(logps), np.arange(P) != 3)


@pytest.mark.parametrize("need", [["chosen_hidden"], ["chosen_hidden", "weight"]])
def test_hidden_states_that_do_not_count_may_hold_anything(wing: Wing, need: list[str]) -> None:
    arrays = make_arrays(wing)
    dirty = {name: wing.numpy(arrays[f"{name}_hidden"]).copy() for name in ("chosen", "rejected")}
    dirty["chosen"][2], dirty["rejected"][1, 4:] = np.nan, np.inf
    other = {**arrays, **{f"{name}_hidden": wing.array(a) for name, a in dirty.items()}}
    call = lambda a: fused(wing, SPO(), a).loss  # noqa: E731
    (want, want_grads), (got, grads) = (wing.grads(call, each, need) for each in (arrays, other))
    np.testing.assert_allclose(wing.numpy(got), wing.numpy(want), rtol=1e-14)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, want_grads[name], rtol=1e-12, atol=1e-14)


def test_a_tied_pair_under_weights_that_are_the_squared_gap(wing: Wing) -> None:
    gap = np.array([0.5, 0.0, 2.0, 1.0, 0.0])
    arrays = make_arrays(wing)
    arrays |= {"reward_gap": wing.array(gap), "weights": wing.array(gap**2)}
    check_same(
        wing,
        lambda a: fused(wing, SPO(), a).loss,
        lambda a: unfused(ORACLE, SPO(), a),
        arrays,
        ["weight", "reward_gap", "chosen_hidden"],
        oracle=ORACLE,
    )


@pytest.mark.parametrize("references", ["float32", "float64"])
def test_weights_do_not_change_the_dtype(wing: Wing, references: str) -> None:
    arrays = make_arrays(wing, "float32")
    for name in ("reference_chosen", "reference_rejected"):
        arrays[name] = wing.array(wing.numpy(arrays[name]), references)
    arrays["beta"] = 0.1
    del arrays["reward_gap"]
    for options in ({}, {"nll_weight": 0.5}, {"nll_weight": 0.5, "reduction": "none"}):
        call = lambda a, o=options: fused(wing, SPO(), a, **o).loss  # noqa: E731
        value, grads = wing.grads(call, arrays, ["weight", "chosen_hidden"])
        assert wing.numpy(value).dtype == references
        assert {str(grad.dtype) for grad in grads.values()} == {"float32"}


def test_a_gap_in_float64_is_not_rounded_by_hidden_states_in_float32(wing: Wing) -> None:
    arrays = make_arrays(wing, "float32")
    arrays = {n: a for n, a in arrays.items() if n not in ("weights", *TOKENS)}
    arrays |= {"reward_gap": wing.array(np.full(P, 1.0 / 3.0)), "beta": 0.1}
    out = fused(wing, Squared(), arrays, reduction="none")
    chosen, rejected = (wing.numpy(logps) for logps in (out.chosen_logps, out.rejected_logps))
    references = wing.numpy(arrays["reference_chosen"]) - wing.numpy(arrays["reference_rejected"])
    want = (chosen.astype("float64") - rejected.astype("float64") - references - 10.0 / 3.0) ** 2
    np.testing.assert_allclose(wing.numpy(out.loss), want, rtol=1e-12)
