"""Calls of every function with arguments of every kind, drawn by hypothesis, and wrong arguments.

JAX is left out, because it compiles each new combination of dtypes and shapes for a second.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import spoloss
from helpers.backends import BACKENDS, Backend
from helpers.pairs import NAMES, four
from spoloss import SPO

LIBRARIES = ("numpy", "torch", "mlx", "strict")
HALF = {"numpy": np.float16, "torch": "float16", "mlx": "float16"}
SHAPES = ((), (1,), (4,), (2, 3))
X0, SMOOTHING = -1.0, 0.1


def spo(x: Any) -> Any:
    return -x * np.exp(-x)


def guarded(x: Any) -> Any:
    return np.where(x < X0, spo(X0) + (X0 - 1.0) * np.exp(-X0) * (x - X0), spo(np.maximum(x, X0)))


def dpo(x: Any) -> Any:
    return np.logaddexp(0.0, -x)


# Each loss as the paper writes it, of h and beta; the options that select it; whether it has a gap.
LOSSES: dict[str, tuple[Any, Any, dict[str, float], bool]] = {
    "spo": (spoloss.spo_loss, lambda h, b: spo(b * h), {}, True),
    "guarded": (spoloss.spo_loss, lambda h, b: guarded(b * h), {"linear_below": X0}, True),
    "dpo": (spoloss.dpo_loss, lambda h, b: dpo(b * h), {}, False),
    "smoothed": (
        spoloss.dpo_loss,
        lambda h, b: (1.0 - SMOOTHING) * dpo(b * h) + SMOOTHING * dpo(-b * h),
        {"label_smoothing": SMOOTHING},
        False,
    ),
    "squared": (spoloss.squared_loss, lambda h, b: (h - 1.0 / b) ** 2, {}, True),
    "ipo": (spoloss.ipo_loss, lambda h, b: (h - 0.5 / b) ** 2, {}, False),
}
SIZES: dict[str, Any] = {"float16": np.float16, "float32": np.float32, "float64": np.float64}
Argument = tuple[np.ndarray, str]
"""Values that every dtype holds exactly, and the dtype of the array, or "number" for a float."""


def values(shape: tuple[int, ...], low: int, high: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, shape, elements=st.integers(8 * low, 8 * high).map(lambda i: i / 8))


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, list[Argument], dict[str, Argument], str]:
    """A loss, its four log-probabilities, its parameters and a reduction."""
    name, shape = draw(st.sampled_from(sorted(LOSSES))), draw(st.sampled_from(SHAPES))
    dtypes = st.sampled_from(sorted(SIZES))
    logps = [(draw(values(shape, -20, 0)), draw(dtypes)) for _ in range(2)]
    for _ in range(2):
        as_number = draw(st.booleans())
        size = () if as_number else shape
        logps.append((draw(values(size, -20, 0)), "number" if as_number else draw(dtypes)))
    ranges = {"beta": (1, 2), "weights": (-2, 2)} | (
        {"reward_gap": (1, 3)} if LOSSES[name][3] else {}
    )
    parameters = {}
    for parameter in draw(st.sets(st.sampled_from(sorted(ranges)))) | {"beta"}:
        kind = draw(st.sampled_from(("number", "0-d", "per pair")))
        drawn = draw(values(shape if kind == "per pair" else (), *ranges[parameter]))
        parameters[parameter] = (drawn, "number" if kind == "number" else draw(dtypes))
    return name, logps, parameters, draw(st.sampled_from(("mean", "sum", "none")))


def given_to(backend: Backend, argument: Argument) -> Any:
    value, dtype = argument
    if dtype == "number":
        return float(value)
    # array-api-strict has no half precision.
    dtype = "float32" if dtype == "float16" and backend.name == "strict" else dtype
    if backend.name == "mlx" and dtype == "float64":
        return backend.array(value)
    return backend.array(value.astype(SIZES[dtype]))


@pytest.mark.parametrize("library", LIBRARIES)
@given(calls())
def test_a_call_returns_the_loss_of_the_paper_in_the_widest_dtype(library: str, call: Any) -> None:
    """Without a warning, which pytest turns into an error."""
    backend, (name, logps, parameters, reduction) = BACKENDS[library], call
    function, formula, options, _ = LOSSES[name]
    four = [given_to(backend, argument) for argument in logps]
    options = options | {key: given_to(backend, value) for key, value in parameters.items()}
    got = function(*four, reduction=reduction, **options)

    pc, pr, rc, rr = (value for value, _ in logps)
    one = np.array(1.0)
    beta, gap, weights = (
        parameters.get(key, (one, ""))[0] for key in ("beta", "reward_gap", "weights")
    )
    each = weights * formula((pc - rc) - (pr - rr), beta / gap) * np.ones(pc.shape)
    want = {"none": each, "sum": each.sum(), "mean": each.mean()}[reduction]
    wide = "float64" in [dtype for _, dtype in logps]
    assert got.dtype == (backend.float64 if wide else backend.float32)
    assert tuple(got.shape) == want.shape
    eps = float(np.finfo(np.float64 if wide and library != "mlx" else np.float32).eps)
    # |x| is at most 80, and rounding x costs |x| * eps in e^-x. beta / gap rounds in float32.
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=400 * eps * np.abs(each).sum())


FUNCTIONS = [
    name
    for name in spoloss.__all__
    if inspect.isfunction(getattr(spoloss, name)) and not name.startswith("pair")
]


def wrong_arguments(backend: Backend) -> dict[str, dict[str, Any]]:
    """For each argument, what it must refuse, and the message after the argument's name."""
    stranger = torch.ones(4) if backend.name != "torch" else np.ones(4)
    everywhere = {
        "must be real floating, got .*int64": backend.array(np.ones(4, np.int64)),
        "must be real floating, got .*complex": backend.array(np.ones(4, np.complex64)),
        "must be a PyTorch, NumPy, JAX or MLX array.*, got list": [1.0] * 4,
        "must be a PyTorch, NumPy, JAX or MLX array.*, got str": "1",
        "must be from the same library as .* Convert it with": stranger,
        r"must be .* got (bool|numpy|.*Convert)": np.True_,
        "must be a PyTorch, NumPy, JAX or MLX array.*, got bool": True,
    }
    if backend.name == "numpy":  # JAX's bfloat16 arrays become arrays of a dtype of ml_dtypes
        bfloat16 = np.asarray(jnp.ones(4, jnp.bfloat16))
        advice = r"must be real floating, got bfloat16\. Convert it with astype\(numpy\.float32\)$"
        everywhere[advice] = bfloat16
    finite = {"must be .*finite, got nan": np.nan, "must be .*finite, got -?inf": -np.inf}
    column = {r"must be a number or .* \(4,\), got \(4, 1\)": backend.array(np.ones((4, 1)))}
    numbers = everywhere | finite | column
    positive = numbers | {"must be positive and finite, got 0": 0, "must be positive .* -1": -1.0}
    array = everywhere | {"must be a PyTorch, .*, got NoneType": None}
    leader = {text: value for text, value in array.items() if value is not stranger}
    return {
        **dict.fromkeys(NAMES, array),
        **{NAMES[0]: leader | {"must be a PyTorch, .* array, got float": 1.0}},
        **{NAMES[1]: array | {"must be a PyTorch, .* array, got float": 1.0}},
        **{"beta": positive, "reward_gap": positive, "weights": numbers},
        "reduction": dict.fromkeys(("must be one of mean, sum, none, got",), "avg"),
        "linear_below": {"must be a number or None, got bool": True, "must lie in": 2.0},
        "label_smoothing": {"must be a number, got bool": True, "must lie in": 0.5},
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_error_names_the_wrong_argument(name: str, backend: Backend) -> None:
    function = getattr(spoloss, name)
    wrong = wrong_arguments(backend)
    parameters = inspect.signature(function).parameters
    right = dict.fromkeys(NAMES, backend.array(np.ones(4)))
    if "beta" in parameters:  # it means four times as much to SPO as to DPO, so it has no default
        assert parameters["beta"].default is inspect.Parameter.empty
        right["beta"] = 0.5
    function(**right)
    for parameter in parameters:
        for message, value in wrong[parameter].items():
            with pytest.raises((TypeError, ValueError), match=f"^{parameter} {message}"):
                function(**right | {parameter: value})
    for parameter in NAMES:
        column = {parameter: backend.array(np.ones((4, 1)))}
        shapes = ", ".join(f"{n} {(4, 1) if n == parameter else (4,)}" for n in NAMES)
        with pytest.raises(
            ValueError, match=f"^expected one shape for all, got {re.escape(shapes)}"
        ):
            function(**right | column)


def test_errors_of_no_single_argument() -> None:
    with pytest.raises(TypeError, match=r"^margin must be a PyTorch, NumPy, JAX or MLX array, got"):
        SPO().value([1.0], 0.1)
    with pytest.raises(ValueError, match=r"^beta / reward_gap must be positive and finite, got"):
        spoloss.spo_loss(*np.zeros((4, 2)), beta=1e-300, reward_gap=1e300)


@pytest.mark.parametrize(
    ("first", "converter"),
    [
        ("jax", "jax.numpy.asarray"),
        ("torch", "torch.as_tensor"),
        ("numpy", "numpy.asarray"),
        ("mlx", "mlx.core.array"),
        ("strict", "array_api_strict.asarray"),
    ],
)
def test_a_mixed_call_is_told_how_to_convert(first: str, converter: str) -> None:
    other = BACKENDS["torch" if first == "numpy" else "numpy"]
    policies, references = BACKENDS[first].arrays(*four()[:2]), other.arrays(*four()[2:])
    loss = lambda *policies: spoloss.spo_loss(*policies, *references, beta=0.1)  # noqa: E731
    for function in (loss, jax.jit(loss)) if first == "jax" else (loss,):
        with pytest.raises(
            TypeError, match=rf"^reference_chosen_logps .*\. Convert it with {converter}(\n|$)"
        ):
            function(*policies)
    if first != "numpy":  # NumPy reads no tensor that requires a gradient, but any other
        convert = pkgutil.resolve_name(converter)
        spoloss.spo_loss(*policies, *(convert(array) for array in references), beta=0.1)


def test_arguments_that_a_loss_cannot_honour_do_not_exist() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        spoloss.dpo_loss(*four(), reward_gap=1.0, beta=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword"):
        spoloss.squared_loss(*four(), linear_below=0.0, beta=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        spoloss.spo_loss(*four(), 0.1, beta=0.1)  # type: ignore[misc]
