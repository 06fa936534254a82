"""`spoloss.jax`: its signatures, its docstrings, and calls that are refused in words."""

from __future__ import annotations

import inspect
import re
import typing
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

import spoloss.jax
import spoloss.torch
from helpers.interpreter import run_python
from helpers.jax_fused import D, P, T, V, make_inputs, make_labels
from spoloss import SPO
from spoloss.jax import linear_logps, linear_pair_loss, sequence_logps

FUNCTIONS = [name for name in spoloss.jax.__all__ if name != "LinearPairLoss"]
ONLY_TORCH, ONLY_JAX = {"vocab_parallel_group"}, {"mesh", "batch_axis", "vocab_axis"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_those_of_the_torch_wing(name: str) -> None:
    mine, theirs = (
        inspect.signature(getattr(wing, name)).parameters.values()
        for wing in (spoloss.jax, spoloss.torch)
    )
    own = [(p.name, p.kind, p.default) for p in mine if p.name not in ONLY_JAX]
    assert own == [(p.name, p.kind, p.default) for p in theirs if p.name not in ONLY_TORCH]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_and_hints(name: str) -> None:
    function = getattr(spoloss.jax, name)
    hints = typing.get_type_hints(function)
    for argument in inspect.signature(function).parameters:
        assert argument in hints
        assert re.search(rf"^ +{argument}: ", function.__doc__, re.M), argument


def test_the_wing_names_its_extra() -> None:
    code = "import sys; sys.modules['jax'] = None; import spoloss.jax"
    done = run_python("-c", code)
    assert done.stderr.strip().endswith(
        'ImportError: spoloss.jax needs JAX: pip install "spoloss[jax]"'
    )


@dataclass
class Unhashable:
    """A dataclass that is not frozen has no hash."""

    def value(self, margin: Any, beta: Any) -> Any:
        return margin * beta

    def slope(self, margin: Any, beta: Any) -> Any:
        return beta + 0.0 * margin


def pair_call(**changes: Any) -> Any:
    """`linear_pair_loss` of the case, with some arguments changed."""
    inputs, labels = make_inputs(), make_labels()
    call: dict[str, Any] = {
        "loss": SPO(),
        "chosen_hidden": inputs["chosen_hidden"],
        "rejected_hidden": inputs["rejected_hidden"],
        "weight": inputs["weight"],
        "chosen_labels": labels[0],
        "rejected_labels": labels[1],
        "reference_chosen_logps": 0.0,
        "reference_rejected_logps": 0.0,
        "beta": 0.1,
    }
    return linear_pair_loss(**{**call, **changes})


MESH = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
HIDDEN, WEIGHT = jnp.zeros((P, T, D)), jnp.zeros((V, D))
OFFSETS = jnp.array([0, P * T])
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"loss": SPO}, TypeError, "loss must be an object with value and slope"),
    ({"loss": Unhashable()}, TypeError, "loss must be hashable, because it is static"),
    ({"weight": np.zeros((V, D))}, TypeError, "weight must be a JAX array, got ndarray"),
    ({"weight": jnp.zeros((V, D), int)}, TypeError, "weight must be real floating, got int64"),
    ({"weight": jnp.zeros(V)}, ValueError, "weight must have shape [V, D], got (21,)"),
    ({"weight": WEIGHT.T}, ValueError, "For a Flax kernel [D, V], pass kernel.T"),
    ({"weight": jnp.zeros((V, D), "float32")}, TypeError, "chosen_hidden must have the weight's"),
    ({"bias": jnp.zeros(3)}, ValueError, "bias must have shape [V] = (21,), got (3,)"),
    ({"chosen_labels": jnp.zeros((P, T))}, TypeError, "chosen_labels must be integer, got float64"),
    ({"chosen_labels": jnp.zeros((P, 3), int)}, ValueError, "must have shape [B, T] = (5, 7)"),
    ({"chosen_labels": [1, 2]}, TypeError, "chosen_labels must be a JAX array, got list"),
    ({"reference_chosen_logps": jnp.zeros(3)}, ValueError, "expected one shape for all"),
    ({"reference_chosen_logps": None}, TypeError, "reference_chosen_logps must be"),
    ({"beta": 0.0}, ValueError, "beta must be positive and finite, got 0.0"),
    ({"beta": jnp.zeros(3)}, ValueError, "beta must be a number or have"),
    ({"weights": jnp.zeros(3)}, ValueError, "weights must be a number or have"),
    ({"nll_weight": -1.0}, ValueError, "nll_weight must be finite and not negative"),
    ({"temperature": jnp.ones(())}, TypeError, "temperature must be a number"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive and finite"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be a positive"),
    ({"reduction": "average"}, ValueError, "reduction must be one of"),
    ({"chosen_cu_seqlens": OFFSETS}, ValueError, "chosen_cu_seqlens cuts one row"),
    (
        {
            "chosen_hidden": HIDDEN.reshape(1, -1, D),
            "chosen_labels": jnp.zeros((1, P * T), int),
            "chosen_cu_seqlens": OFFSETS,
        },
        ValueError,
        "must both be given or neither, got chosen_cu_seqlens alone",
    ),
    (
        {"chosen_hidden": HIDDEN[:2], "chosen_labels": jnp.zeros((2, T), int)},
        ValueError,
        "chosen_hidden and rejected_hidden must have the same number of pairs, got 2 and 5",
    ),
    (
        {
            "chosen_hidden": HIDDEN.reshape(1, -1, D),
            "rejected_hidden": HIDDEN.reshape(1, -1, D),
            "chosen_labels": jnp.zeros((1, P * T), int),
            "rejected_labels": jnp.zeros((1, P * T), int),
            "chosen_cu_seqlens": OFFSETS,
            "rejected_cu_seqlens": jnp.array([0, T, P * T]),
        },
        ValueError,
        "chosen_cu_seqlens and rejected_cu_seqlens must have the same number of pairs, got 1 and 2",
    ),
    ({"batch_axis": "data"}, ValueError, "name axes of a mesh: pass mesh as well"),
    ({"mesh": MESH}, ValueError, "with mesh, pass batch_axis, vocab_axis or both"),
    ({"mesh": "cpu", "batch_axis": "data"}, TypeError, "mesh must be a jax.sharding.Mesh, got str"),
    ({"mesh": MESH, "batch_axis": "x"}, ValueError, "must name axes of ('data', 'model'), got 'x'"),
    ({"mesh": MESH, "batch_axis": 0}, TypeError, "batch_axis must be an axis name or a tuple"),
    ({"mesh": MESH, "batch_axis": "data", "vocab_axis": "data"}, ValueError, "must differ"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        pair_call(**changes)


@pytest.mark.parametrize("name", ["temperature", "logit_scale", "softcap", "chunk_size"])
def test_log_probabilities_refuse_the_same_options(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*, got 0"):
        linear_logps(HIDDEN, WEIGHT, make_labels()[0], **{name: 0})


def test_a_mesh_that_does_not_divide() -> None:
    mesh = AbstractMesh((4, 4), ("data", "model"))
    with pytest.raises(ValueError, match="4 parts, but 5 sequences are not divisible"):
        pair_call(mesh=mesh, batch_axis="data")
    with pytest.raises(ValueError, match="8 parts, but 21 rows of weight are not divisible"):
        pair_call(mesh=AbstractMesh((4, 2), ("data", "model")), vocab_axis=("data", "model"))


def test_a_packed_row_is_not_split() -> None:
    with pytest.raises(ValueError, match="batch_axis cannot split a packed row"):
        linear_logps(
            HIDDEN.reshape(1, -1, D),
            WEIGHT,
            jnp.zeros((1, P * T), int),
            cu_seqlens=OFFSETS,
            mesh=MESH,
            batch_axis="data",
        )


def test_traced_options_are_refused() -> None:
    """They are fixed before tracing: an array would need a derivative."""
    for name in ("temperature", "softcap", "logit_scale", "nll_weight"):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            jax.jit(lambda value, name=name: pair_call(**{name: value}))(1.0)


def test_the_rest() -> None:
    labels, _ = make_labels()
    with pytest.raises(ValueError, match=re.escape("logits must have shape [B, T, V]")):
        sequence_logps(WEIGHT, labels)
    with pytest.raises(TypeError, match="logits must be real floating, got int64"):
        sequence_logps(jnp.zeros((P, T, V), int), labels)
    with pytest.raises(ValueError, match="average and per_token exclude each other"):
        linear_logps(HIDDEN, WEIGHT, labels, average=True, per_token=True)
    cu = jnp.array([0.0, 1.0])
    with pytest.raises(TypeError, match="cu_seqlens must be integer, got float64"):
        linear_logps(HIDDEN, WEIGHT, labels, cu_seqlens=cu)
    with pytest.raises(ValueError, match=re.escape("cu_seqlens must have shape [S + 1]")):
        linear_logps(HIDDEN[:1], WEIGHT, labels[:1], cu_seqlens=OFFSETS[:1])
