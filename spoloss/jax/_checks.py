"""Checks of a call's arrays and axes: by shape and dtype alone, so that nothing breaks `jax.jit`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from spoloss.jax._labels import Labels
from spoloss.jax._mesh import Axis, Split


def check_floating(name: str, array: Any) -> None:
    """Refuse what is not a JAX array of real floating numbers.

    Raises:
      TypeError: it is none.
    """
    if not isinstance(array, jax.Array):
        raise TypeError(f"{name} must be a JAX array, got {type(array).__name__}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be real floating, got {array.dtype}")


def check_head(weight: Array, bias: Array | None) -> None:
    """Refuse a weight that is not [V, D], or a bias that is not [V].

    Raises:
      TypeError: one of them is not a real floating JAX array.
      ValueError: a shape does not fit.
    """
    check_floating("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape [V, D], got {weight.shape}")
    if bias is None:
        return
    check_floating("bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [V] = {weight.shape[:1]}, got {bias.shape}")


def check_hidden(name: str, hidden: Array, weight: Array) -> None:
    """Refuse hidden states that are not [B, T, D] in the weight's dtype.

    Raises:
      TypeError: they are no JAX array, or of another dtype.
      ValueError: the shape does not fit.
    """
    check_floating(name, hidden)
    if hidden.ndim != 3 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(
            f"{name} must have shape [B, T, D] with D = {weight.shape[1]} as in weight [V, D], "
            f"got {hidden.shape}; pass kernel.T for a kernel [D, V], as Flax keeps it"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{name} must have the weight's dtype {weight.dtype}, got {hidden.dtype}; "
            "cast one of them with astype"
        )


def check_labels(
    name: str, labels: Array, other: str, states: Array, cu_name: str, cu_seqlens: Array | None
) -> Labels:
    """The labels, after refusing what is not [B, T] or cannot be cut by the offsets.

    Raises:
      TypeError: labels or offsets are not integer.
      ValueError: a shape does not fit.
    """
    _check_integers(name, labels)
    if labels.shape != states.shape[:2]:
        raise ValueError(
            f"{name} must have the shape [B, T] = {states.shape[:2]} of {other}, got {labels.shape}"
        )
    if cu_seqlens is not None:
        _check_integers(cu_name, cu_seqlens)
        if len(labels) != 1:
            raise ValueError(
                f"{cu_name} cuts one row: {name} must have shape [1, T], got {labels.shape}"
            )
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                f"{cu_name} must have shape [S + 1] with S >= 1, got {cu_seqlens.shape}"
            )
    return Labels(labels, cu_seqlens)


def make_split(
    mesh: Mesh | None, batch_axis: Axis, vocab_axis: Axis, weight: Array, labels: Labels
) -> Split:
    """How a call is split over a mesh.

    Raises:
      TypeError: `mesh` is no mesh, or an axis no name.
      ValueError: mesh and axes do not go together, or do not divide what they split.
    """
    axes = {
        "batch_axis": _names("batch_axis", batch_axis),
        "vocab_axis": _names("vocab_axis", vocab_axis),
    }
    if mesh is None:
        for name, names in axes.items():
            if names:
                raise ValueError(f"{name} names an axis of a mesh: pass mesh, too")
        return Split(None, (), ())
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    split = Split(mesh, axes["batch_axis"], axes["vocab_axis"])
    for name, names in axes.items():
        for axis in names:
            if axis not in mesh.shape:
                raise ValueError(
                    f"{name} must be of the mesh's axes {mesh.axis_names}, got {axis!r}"
                )
    if not (split.pairs_axis or split.words_axis):
        raise ValueError("mesh needs batch_axis, vocab_axis or both")
    if set(split.pairs_axis) & set(split.words_axis):
        raise ValueError(f"batch_axis and vocab_axis must differ, got {batch_axis!r} for both")
    if split.pairs_axis and labels.cu_seqlens is not None:
        raise ValueError(
            "batch_axis cannot split one packed row: leave it out, or pad the sequences"
        )
    _check_divides("batch_axis", split.parts(split.pairs_axis), "sequences", labels.sequences)
    _check_divides("vocab_axis", split.parts(split.words_axis), "rows of weight", len(weight))
    return split


def _names(name: str, axis: Axis) -> tuple[str, ...]:
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    if not isinstance(names, tuple) or not all(isinstance(part, str) for part in names):
        raise TypeError(f"{name} must be an axis name or a tuple of them, got {axis!r}")
    return names


def _check_divides(name: str, parts: int, what: str, count: int) -> None:
    if count % parts:
        raise ValueError(f"{name} cuts into {parts} parts, which do not divide the {count} {what}")


def _check_integers(name: str, array: Any) -> None:
    if not isinstance(array, jax.Array):
        raise TypeError(f"{name} must be a JAX array, got {type(array).__name__}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integer, got {array.dtype}")
