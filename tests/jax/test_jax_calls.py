"""`spoloss.jax`: what it alone refuses, and its objects as pytrees."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

from helpers.interpreter import run_python
from helpers.wings import WINGS, D, P, T, completions_of, fused, head_of, make_arrays
from spoloss import SPO
from spoloss.jax import Completions, Head, linear_logps

JAX = WINGS["jax"]


def test_the_wing_names_its_extra() -> None:
    code = "import sys; sys.modules['jax'] = None; import spoloss.jax"
    done = run_python("-c", code)
    assert done.stderr.strip().endswith(
        'ImportError: spoloss.jax needs JAX: pip install "spoloss[jax]"'
    )


class Unhashable(SPO):
    __hash__ = None


def test_a_loss_without_a_hash() -> None:
    with pytest.raises(TypeError, match="loss must be hashable, because it is static"):
        fused(JAX, Unhashable(), make_arrays(JAX))


def test_a_flax_kernel_that_is_not_transposed() -> None:
    arrays = make_arrays(JAX)
    del arrays["bias"]
    arrays["weight"] = arrays["weight"].T
    with pytest.raises(ValueError, match=re.escape("For a Flax kernel [D, V], pass kernel.T")):
        fused(JAX, SPO(), arrays)


MESH = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
WIDE = AbstractMesh((4, 2), ("data", "model"))
MESHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"batch_axis": "data"}, ValueError, "name axes of a mesh: pass a mesh"),
    ({"mesh": MESH}, ValueError, "with head.mesh, pass head.batch_axis, head.vocab_axis or both"),
    ({"mesh": "cpu", "batch_axis": "data"}, TypeError, "head.mesh must be a jax.sharding.Mesh"),
    ({"mesh": MESH, "batch_axis": "x"}, ValueError, "head.batch_axis must name axes of ('data',"),
    ({"mesh": MESH, "vocab_axis": 1}, TypeError, "head.vocab_axis must be an axis name or a tuple"),
    ({"mesh": MESH, "batch_axis": "data", "vocab_axis": "data"}, ValueError, "must differ"),
    (
        {"mesh": WIDE, "batch_axis": "data"},
        ValueError,
        "head.batch_axis has 4 parts, which do not divide the 5 rows of completions.hidden",
    ),
    (
        {"mesh": WIDE, "vocab_axis": ("data", "model")},
        ValueError,
        "head.vocab_axis has 8 parts, which do not divide the 13 rows of head.weight",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), MESHES, ids=[m for *_, m in MESHES])
def test_meshes_that_do_not_fit(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arrays = make_arrays(JAX)
    head = Head(arrays["weight"], **options)
    with pytest.raises(error, match=re.escape(message)):
        linear_logps(head, completions_of(JAX, arrays, "chosen", {}))


def test_a_packed_row_is_not_split() -> None:
    row = Completions(
        jnp.zeros((1, P * T, D)), jnp.zeros((1, P * T), int), cu_seqlens=jnp.array([0, P * T])
    )
    head = Head(jnp.zeros((4, D)), mesh=MESH, batch_axis="data")
    with pytest.raises(ValueError, match=r"head\.batch_axis cannot split the packed row of"):
        linear_logps(head, row)


def test_the_objects_are_pytrees_of_their_arrays() -> None:
    arrays = make_arrays(JAX)
    head = head_of(JAX, arrays, {"softcap": 2.0, "chunk_size": 3})
    side = completions_of(JAX, arrays, "chosen", {"shift": False})
    for each, names in ((head, ["weight", "bias"]), (side, ["hidden", "labels", "token_weights"])):
        assert [a.shape for a in jax.tree.leaves(each)] == [getattr(each, n).shape for n in names]
        again = jax.tree.map(lambda array: array, each)
        for field in dataclasses.fields(each):
            assert getattr(again, field.name) is getattr(each, field.name)


def test_heads_under_transforms() -> None:
    """A gradient with respect to a head is a head; heads pass through jit and vmap."""
    arrays = make_arrays(JAX)
    side = completions_of(JAX, arrays, "chosen", {})
    head = head_of(JAX, arrays, {"softcap": 2.0})

    def total(head: Head, side: Completions) -> jax.Array:
        return linear_logps(head, side).sum()

    grad = jax.jit(jax.grad(total))(head, side)
    assert isinstance(grad, Head)
    assert grad.softcap == 2.0
    by_weight, by_bias = jax.grad(
        lambda weight, bias: total(Head(weight, bias, softcap=2.0), side), (0, 1)
    )(head.weight, head.bias)
    np.testing.assert_allclose(grad.weight, by_weight, rtol=1e-12)
    np.testing.assert_allclose(grad.bias, by_bias, rtol=1e-12)
    two = jax.tree.map(lambda array: jnp.stack([array, 2.0 * array]), head)
    got = jax.vmap(total, in_axes=(0, None))(two, side)
    want = [total(head, side), total(jax.tree.map(lambda array: 2.0 * array, head), side)]
    np.testing.assert_allclose(got, want, rtol=1e-12)
