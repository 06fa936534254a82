"""Checks of a call's arrays and axes by shape and dtype only, so that `jax.jit` can trace them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from spoloss.jax._labels import Labels
from spoloss.jax._mesh import Axis, Split


def check_floating(name: str, array: Any) -> None:
    """Check that an argument is a JAX array of real floating numbers.

    Raises:
      TypeError: it is not.
    """
    if not isinstance(array, jax.Array):
        raise TypeError(f"{name} must be a JAX array, got {type(array).__name__}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be real floating, got {array.dtype}")


def check_head(weight: Array, bias: Array | None) -> None:
    """Check that the weight is [V, D] and the bias [V].

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
    if bias.dtype != weight.dtype:
        raise TypeError(
            f"bias must have the weight's dtype {weight.dtype}, got {bias.dtype}. "
            "Cast one of them with astype"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [V] = {weight.shape[:1]}, got {bias.shape}")


def check_labels(
    prefix: str, hidden: Array, labels: Array, cu_seqlens: Array | None, weight: Array
) -> Labels:
    """Check all arrays of a side, and return its labels.

    Args:
      prefix: the prefix of the arguments' names, for messages.
      hidden: must be [B, T, D] in the weight's dtype.
      labels: must be integers [B, T].
      cu_seqlens: must be integers [S + 1], with B = 1, or None.
      weight: the head's weight.

    Raises:
      TypeError: one of them is not a JAX array, or has another dtype.
      ValueError: a shape does not fit.
    """
    check_floating(f"{prefix}hidden", hidden)
    if hidden.ndim != 3 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden must have shape [B, T, D] with the weight's D = {weight.shape[1]}, "
            f"got {hidden.shape}. For a Flax kernel [D, V], pass kernel.T as weight"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{prefix}hidden must have the weight's dtype {weight.dtype}, got {hidden.dtype}. "
            "Cast one of them with astype"
        )
    return sequences(prefix, labels, cu_seqlens, hidden)


def sequences(prefix: str, labels: Array, cu_seqlens: Array | None, states: Array) -> Labels:
    """Check the labels of a side against the shape of hidden states or logits, and return them.

    They are returned in JAX's default integer dtype. JAX wraps a Python number into the dtype of
    the array beside it, so in uint8, -100 would be token 156, and V = 256 would be 0.

    Raises:
      TypeError: labels or offsets are not integer JAX arrays.
      ValueError: a shape does not fit.
    """
    _check_integers(f"{prefix}labels", labels)
    if labels.shape != states.shape[:2]:
        raise ValueError(
            f"{prefix}labels must have shape [B, T] = {states.shape[:2]}, got {labels.shape}"
        )
    if cu_seqlens is None:
        return Labels(labels.astype(int), None)
    _check_integers(f"{prefix}cu_seqlens", cu_seqlens)
    if len(labels) != 1:
        raise ValueError(
            f"{prefix}cu_seqlens cuts one row into sequences: {prefix}labels must have shape "
            f"[1, T], got {labels.shape}"
        )
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{prefix}cu_seqlens must have shape [S + 1] with S >= 1, got {cu_seqlens.shape}"
        )
    return Labels(labels.astype(int), cu_seqlens.astype(int))


def make_split(
    mesh: Mesh | None, batch_axis: Axis, vocab_axis: Axis, weight: Array, labels: Labels
) -> Split:
    """How a call is split over a mesh.

    Raises:
      TypeError: `mesh` is not a mesh, or an axis is not a name.
      ValueError: mesh and axes do not fit together, or an axis does not divide the array.
    """
    pairs, words = _names("batch_axis", batch_axis), _names("vocab_axis", vocab_axis)
    if mesh is None:
        if pairs or words:
            raise ValueError("batch_axis and vocab_axis name axes of a mesh: pass mesh as well")
        return Split(None, (), ())
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    if not (pairs or words):
        raise ValueError("with mesh, pass batch_axis, vocab_axis or both")
    for name, axes in (("batch_axis", pairs), ("vocab_axis", words)):
        for axis in axes:
            if axis not in mesh.shape:
                raise ValueError(f"{name} must name axes of {mesh.axis_names}, got {axis!r}")
    if set(pairs) & set(words):
        raise ValueError(f"batch_axis and vocab_axis must differ, got {batch_axis!r} for both")
    if pairs and labels.cu_seqlens is not None:
        raise ValueError("batch_axis cannot split a packed row: omit it, or pad the sequences")
    split = Split(mesh, pairs, words)
    _check_divides("batch_axis", split.parts(pairs), "sequences", labels.sequences)
    _check_divides("vocab_axis", split.parts(words), "rows of weight", len(weight))
    return split


def _names(name: str, axis: Axis) -> tuple[str, ...]:
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    if not isinstance(names, tuple) or not all(isinstance(part, str) for part in names):
        raise TypeError(f"{name} must be an axis name or a tuple of them, got {axis!r}")
    return names


def _check_divides(name: str, parts: int, what: str, count: int) -> None:
    if count % parts:
        raise ValueError(f"{name} splits into {parts} parts, but {count} {what} are not divisible")


def _check_integers(name: str, array: Any) -> None:
    if not isinstance(array, jax.Array):
        raise TypeError(f"{name} must be a JAX array, got {type(array).__name__}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integer, got {array.dtype}")
