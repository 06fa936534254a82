"""Residuals: what a forward rule passes to its backward rule, and what that returns.

With `symbolic_zeros`, JAX traces a forward rule once for each set of differentiated arguments, but
uses the residual tree of the last trace for all of them. So the tree must not depend on which
arguments are differentiated. Shapes may depend on it: a missing result is an empty array. JAX
before 0.7 also requires one tree of gradients: a missing gradient is a symbolic zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from spoloss.jax._softmax import Wanted


def marks_of(wanted: Wanted) -> Array:
    """An empty array that encodes the wanted gradients in its shape."""
    return jnp.zeros((*map(int, (*wanted.hidden, wanted.weight, wanted.bias)), 0))


def wanted_of(marks: Array) -> Wanted:
    """The wanted gradients that `marks_of` encoded."""
    *hidden, weight, bias = (bool(size) for size in marks.shape[:-1])
    return Wanted(tuple(hidden), weight=weight, bias=bias)


def or_empty(array: Array | None, dtype: DTypeLike) -> Array:
    """An array, or an empty array for None."""
    return jnp.zeros(0, dtype) if array is None else array


def or_none(array: Array) -> Array | None:
    """An array, or None for an empty array."""
    return array if array.size else None


@jax.tree_util.register_static
@dataclass(frozen=True)
class Kinds:
    """Shape and dtype of each argument, for rules that do not read its numbers."""

    each: tuple[Any, ...]

    @classmethod
    def of(cls, arrays: Iterable[Array | None]) -> Kinds:
        """The kinds of some arrays; None for None."""
        return cls(tuple(None if array is None else jax.typeof(array) for array in arrays))

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the first, which head and hidden states share."""
        return self.each[0].dtype  # type: ignore[no-any-return]


def or_zero(gradient: Array | None, kind: Any) -> Any:
    """A gradient, or a zero that takes no memory in its place; None for no argument."""
    return SymbolicZero(kind) if gradient is None and kind is not None else gradient
