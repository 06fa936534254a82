"""Checks of the head and the completions by shape and dtype only, so that `jax.jit` can trace them.

They name arguments as the caller spells them: `head.weight`, `chosen.labels`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from spoloss._checks import check_floating, check_tokens
from spoloss._options import check_head_options
from spoloss.jax._arguments import Axis, Completions, Head
from spoloss.jax._mesh import Split, names_of


def prepare(head: Head, sides: Mapping[str, Completions]) -> None:
    """Check the head and the completions, by the names of their arguments.

    Raises:
      TypeError: a dtype does not fit, an option is not a number, an argument is not a JAX array, or
        an axis is not a name.
      ValueError: a shape or a number does not fit, or the mesh, its axes and the arrays do not fit
        together.
    """
    if not isinstance(head, Head):
        raise TypeError(f"head must be a Head, got {type(head).__name__}")
    for name, side in sides.items():
        if not isinstance(side, Completions):
            raise TypeError(f"{name} must be Completions, got {type(side).__name__}")
    check_head_options(head.softcap, head.logit_scale, head.temperature, head.chunk_size)
    check_floating(jnp, "head.weight", head.weight)
    if head.weight.ndim != 2:
        raise ValueError(f"head.weight must have shape [V, D], got {head.weight.shape}")
    if head.bias is not None:
        _check_bias(head.bias, head.weight)
    for name, side in sides.items():
        _check_hidden(f"{name}.hidden", side.hidden, head.weight)
        check_tokens(jnp, f"{name}.", side, f"{name}.hidden")
    _check_mesh(head)
    if head.mesh is not None:
        _check_parts(head, sides)


def _check_bias(bias: Array, weight: Array) -> None:
    check_floating(jnp, "head.bias", bias)
    _check_dtype("head.bias", bias, weight)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"head.bias must have shape [V] = {weight.shape[:1]}, got {bias.shape}")


def _check_hidden(name: str, hidden: Array, weight: Array) -> None:
    check_floating(jnp, name, hidden)
    _check_dtype(name, hidden, weight)
    if hidden.ndim != 3 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(
            f"{name} must have shape [B, T, D] with the D = {weight.shape[1]} of head.weight, "
            f"got {hidden.shape}. For a Flax kernel [D, V], pass kernel.T as the weight"
        )


def _check_dtype(name: str, array: Array, weight: Array) -> None:
    if array.dtype != weight.dtype:
        raise TypeError(
            f"{name} must have the dtype {weight.dtype} of head.weight, got {array.dtype}. "
            "Cast one of them with astype"
        )


def _check_mesh(head: Head) -> None:
    axes = {"head.batch_axis": head.batch_axis, "head.vocab_axis": head.vocab_axis}
    for name, axis in axes.items():
        _check_axis(name, axis)
    if head.mesh is None:
        if head.batch_axis or head.vocab_axis:
            raise ValueError("head.batch_axis and head.vocab_axis name axes of a mesh: pass a mesh")
        return
    if not isinstance(head.mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"head.mesh must be a jax.sharding.Mesh, got {type(head.mesh).__name__}")
    if not (head.batch_axis or head.vocab_axis):
        raise ValueError("with head.mesh, pass head.batch_axis, head.vocab_axis or both")
    for name, axis in axes.items():
        for part in names_of(axis):
            if part not in head.mesh.shape:
                raise ValueError(f"{name} must name axes of {head.mesh.axis_names}, got {part!r}")
    if set(names_of(head.batch_axis)) & set(names_of(head.vocab_axis)):
        raise ValueError(
            f"head.batch_axis and head.vocab_axis must differ, got {head.batch_axis!r} for both"
        )


def _check_axis(name: str, axis: Axis) -> None:
    names = names_of(axis)
    if not isinstance(names, tuple) or not all(isinstance(part, str) for part in names):
        raise TypeError(f"{name} must be an axis name or a tuple of them, got {axis!r}")


def _check_parts(head: Head, sides: Mapping[str, Completions]) -> None:
    """Check that the axes divide the completions and the vocabulary."""
    split = Split.of(head)
    for name, side in sides.items():
        if split.batch_axis and side.cu_seqlens is not None:
            raise ValueError(
                f"head.batch_axis cannot split the packed row of {name}: omit it, or pad the "
                "completions"
            )
        parts = split.parts(split.batch_axis)
        _check_divides("head.batch_axis", parts, f"{name}.hidden", len(side.hidden))
    parts = split.parts(split.vocab_axis)
    _check_divides("head.vocab_axis", parts, "head.weight", len(head.weight))


def _check_divides(name: str, parts: int, of: str, count: int) -> None:
    if count % parts:
        raise ValueError(f"{name} has {parts} parts, which do not divide the {count} rows of {of}")
