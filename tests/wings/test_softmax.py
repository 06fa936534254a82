"""Log-probabilities against 60 digits and a loop over tokens, at any offset and probability."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest

from helpers.fused import cut_blocks
from helpers.wings import IGNORED, WINGS, D, Margin, P, T, V, Wing, fused, make_arrays
from spoloss.torch import _devices, _exponentials, _tiles

GAPS = (27.0, 18.0, 9.0, 4.0, 1.0, 0.0, -10.0, -1000.0, -10_000.0)
"""The target's logit minus the others': -log p from about 1e-12 to 1e4."""


@pytest.fixture(params=["torch, in place", "torch, fused kernel", "jax"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Wing:
    """A wing; PyTorch in blocks of two vocabulary entries, in both forms of the exponentials."""
    cut_blocks(monkeypatch, 2)
    if request.param == "torch, fused kernel":
        monkeypatch.setattr(_devices, "CPU", _devices.CPU._replace(compiles=True))
        monkeypatch.setattr(_exponentials, "_VECTOR", 1)
        monkeypatch.setattr(_exponentials, "compiled", lambda function: function)
    return WINGS[request.param.partition(",")[0]]


def recomputed(wing: Wing, a: Any, **options: Any) -> Any:
    head = wing.api.Head(a["weight"], a.get("bias"), **options)
    side = wing.api.Completions(a["chosen_hidden"], a["chosen_labels"], shift=False)
    return wing.api.linear_logps(head, side)


def one_pass(wing: Wing, a: Any, **options: Any) -> Any:
    """The log-probabilities, which are constants, and the loss, their sum, added to the last."""
    empty = {"rejected_hidden": 0.0 * a["chosen_hidden"]}
    empty["rejected_labels"] = 0 * a["chosen_labels"] + IGNORED
    options = {"reduction": "sum", "shift": False, **options}
    out = fused(wing, Margin(), {**a, **empty, "beta": 1.0}, **options)
    last = np.arange(len(a["chosen_labels"])) == len(a["chosen_labels"]) - 1
    return out.chosen_logps + out.loss * wing.array(last.astype(float))


WAYS = {"recomputed": recomputed, "one pass": one_pass}


def exact(logits: list[float], target: int) -> tuple[float, list[float]]:
    """Log p of the target, and its derivative with respect to each logit."""
    with mpmath.workdps(60):
        exps = [mpmath.exp(z) for z in map(mpmath.mpf, logits)]
        total = mpmath.fsum(exps)
        others = mpmath.fsum(e for v, e in enumerate(exps) if v != target)
        slopes = [others / total if v == target else -e / total for v, e in enumerate(exps)]
        return float(-mpmath.log1p(others / exps[target])), list(map(float, slopes))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e8])
@pytest.mark.parametrize("trained", [False, True])
def test_no_digit_is_lost(
    block: Wing, way: str, dtype: str, offset: float, *, trained: bool
) -> None:
    eps, least = float(np.finfo(dtype).eps), float(np.finfo(dtype).tiny)
    need = ["chosen_hidden", *(["weight"] if trained else [])]
    gaps = [8.0 * round(gap / 8.0) for gap in GAPS] if abs(offset) > 1e7 else GAPS
    rows = [[offset, offset + gap, offset - 1e3, offset, offset] for gap in gaps]
    assert np.array(rows, dtype).tolist() == rows
    arrays = {
        "chosen_hidden": block.array(np.array([*rows, 5 * [0.0]])[:, None], dtype),
        "weight": block.array(np.eye(5), dtype),  # the hidden states are the logits
        "chosen_labels": block.array([[1]] * len(rows) + [[IGNORED]]),
    }
    logps, grads = block.grads(lambda a: WAYS[way](block, a), arrays, need)
    found = zip(block.numpy(logps).tolist(), grads["chosen_hidden"][:, 0].tolist(), strict=True)
    for logits, (logp, slopes) in zip(rows, found, strict=False):
        want, want_slopes = exact(logits, 1)
        assert logp == pytest.approx(want, rel=8.0 * eps, abs=least)
        assert slopes == pytest.approx(want_slopes, rel=8.0 * eps, abs=least)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"softcap": 1.0}, {"softcap": 30.0, "logit_scale": -0.5}])
@pytest.mark.parametrize("trained", [False, True])
def test_an_entry_that_a_bias_forbids(
    block: Wing, way: str, options: dict[str, float], *, trained: bool
) -> None:
    """Padding of the vocabulary adds nothing; as a label, it has log-probability -inf."""
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(5, 2)), random.normal(size=5) - 20.0
    plain = {
        "chosen_hidden": block.array(random.normal(size=(3, 4, 2))),
        "chosen_labels": block.array(random.integers(0, 5, (3, 4))),
        "weight": block.array(weight),
        "bias": block.array(bias),
    }
    first, last = np.full(2, -np.inf), np.full(3, -np.inf)  # whole blocks of PyTorch's
    padded = {
        **plain,
        "chosen_labels": plain["chosen_labels"] + 2,
        "weight": block.array(np.concatenate([np.ones((2, 2)), weight, np.ones((3, 2))])),
        "bias": block.array(np.concatenate([first, bias, last])),
    }
    need = ["chosen_hidden", *(["weight", "bias"] if trained else [])]
    call = lambda a: WAYS[way](block, a, **options)  # noqa: E731
    want, want_grads = block.grads(call, plain, need)
    got, grads = block.grads(call, padded, need)
    np.testing.assert_allclose(block.numpy(got), block.numpy(want), rtol=1e-12)
    for name, grad in grads.items():
        inner = grad if name == "chosen_hidden" else grad[2:7]
        np.testing.assert_allclose(inner, want_grads[name], rtol=1e-10, atol=1e-14)
        assert np.count_nonzero(grad) == np.count_nonzero(inner)
    labels = block.numpy(padded["chosen_labels"]).copy()
    labels[0, 2] = 8
    padded["chosen_labels"] = block.array(labels)
    logp, grads = block.grads(lambda a: recomputed(block, a, **options), padded, need)
    assert np.isneginf(block.numpy(logp)).tolist() == [True, False, False]
    assert all(np.isfinite(grad).all() for grad in grads.values())


def test_a_vocabulary_of_one_entry(wing: Wing) -> None:
    arrays = {**make_arrays(wing), "weight": wing.array(np.ones((1, D)))}
    arrays["chosen_labels"] = wing.array(np.zeros((P, T), int))
    del arrays["bias"]
    logps, grads = wing.grads(lambda a: recomputed(wing, a).sum(), arrays, ["weight"])
    assert wing.numpy(logps) == 0.0
    assert not grads["weight"].any()


# Of logits.


def by_hand(
    logits: np.ndarray, labels: np.ndarray, *, shift: bool = True, average: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and the derivative of their sum, one token at a time."""
    values, grads = np.zeros(len(logits)), np.zeros_like(logits)
    for row, targets in enumerate(labels):
        counted = [t for t in range(shift, len(targets)) if targets[t] != IGNORED]
        factor = 1.0 / len(counted) if average and counted else 1.0
        for t in counted:
            p = np.exp(logits[row, t - shift])
            p /= p.sum()
            values[row] += factor * np.log(p[targets[t]])
            grads[row, t - shift] = factor * (np.eye(len(p))[targets[t]] - p)
    return values, grads


def logits_of(wing: Wing, dtype: str = "float64") -> tuple[dict[str, Any], np.ndarray]:
    labels = wing.numpy(make_arrays(wing)["chosen_labels"])
    logits = 3.0 * np.random.default_rng(0).normal(size=(P, T, V))
    return {"logits": wing.array(logits, dtype)}, labels


@pytest.fixture(params=[1, 3, 10**6], ids=lambda rows: f"{rows} rows a tile")
def tile_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "LOGITS_BYTES", request.param * V * 8)  # PyTorch has tiles here


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_a_loop_over_tokens(wing: Wing, *, shift: bool, average: bool) -> None:
    arrays, labels = logits_of(wing)
    how = {"shift": shift, "average": average}
    call = lambda a: wing.api.sequence_logps(a["logits"], wing.array(labels), **how)  # noqa: E731
    got, grads = wing.grads(call, arrays, ["logits"])
    want, want_grad = by_hand(wing.numpy(arrays["logits"]), labels, **how)
    np.testing.assert_allclose(wing.numpy(got), want, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(grads["logits"], want_grad, rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_in_half_precision_are_summed_in_float32(wing: Wing, dtype: str) -> None:
    arrays, labels = logits_of(wing, dtype)
    call = lambda a: wing.api.sequence_logps(a["logits"], wing.array(labels))  # noqa: E731
    got, grads = wing.grads(call, arrays, ["logits"])
    want, want_grad = by_hand(wing.numpy(arrays["logits"]).astype("float64"), labels)
    assert wing.numpy(got).dtype == "float32"
    np.testing.assert_allclose(wing.numpy(got), want, rtol=1e-5, atol=1e-5)
    assert grads["logits"].dtype == dtype
    # One rounding to the half dtype of a gradient made in float32.
    rounded = want_grad.astype(dtype).astype("float64")
    eps = {"bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
    np.testing.assert_allclose(grads["logits"].astype("float64"), rounded, rtol=eps, atol=1e-6)


def test_a_sure_token_of_half_precision_logits_keeps_its_gradient(wing: Wing) -> None:
    arrays, labels = {"logits": wing.array([[[8.0, 0.0]]], "bfloat16")}, wing.array([[0]])
    call = lambda a: wing.api.sequence_logps(a["logits"], labels, shift=False)  # noqa: E731
    _, grads = wing.grads(call, arrays, ["logits"])
    np.testing.assert_allclose(float(grads["logits"][0, 0, 0]), 3.3535e-4, rtol=5e-3)
