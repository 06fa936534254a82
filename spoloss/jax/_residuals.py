"""Residuals: what a forward rule passes to its backward rule, and what that returns.

With `symbolic_zeros`, JAX traces a forward rule once for each set of differentiated arguments, but
uses the residual tree of the last trace for all of them. So the tree must not depend on which
arguments are differentiated. Shapes may depend on it: a missing result is an empty array. JAX
before 0.7 also requires one tree of gradients: a missing gradient is a symbolic zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from spoloss.jax._arguments import Head
from spoloss.jax._softmax import HeadSums, Wanted


def marks_of(wanted: Wanted) -> Wanted:
    """Arrays in place of the wanted gradients, empty in place of the others."""
    marks: Wanted = jax.tree.map(lambda want: jnp.zeros(int(want)), wanted)
    return marks


def wanted_of(marks: Wanted) -> Wanted:
    """The wanted gradients that `marks_of` encoded."""
    wanted: Wanted = jax.tree.map(lambda mark: mark.size > 0, marks)
    return wanted


def or_empty(array: Array | None, dtype: DTypeLike) -> Array:
    """An array, or an empty array for None."""
    return jnp.zeros(0, dtype) if array is None else array


def or_none(array: Array) -> Array | None:
    """An array, or None for an empty array."""
    return array if array.size else None


@jax.tree_util.register_static
@dataclass(frozen=True)
class Kinds:
    """Shape and dtype of head and hidden states, for rules that do not read their numbers."""

    each: tuple[Any, ...]
    tree: Any

    @classmethod
    def of(cls, head: Head, hidden: tuple[Array, ...]) -> Kinds:
        """The kinds of a call's arrays."""
        arrays, tree = jax.tree.flatten((head, hidden))
        return cls(tuple(map(jax.typeof, arrays)), tree)

    def gradients(
        self, by_head: HeadSums, by_hidden: tuple[Array | None, ...]
    ) -> tuple[Head, tuple[Any, ...]]:
        """What a backward rule returns for head and hidden states, in their dtypes."""
        head, hidden = jax.tree.unflatten(self.tree, self.each)
        weight, bias = map(_or_zero, by_head, (head.weight, head.bias))
        of_head = replace(head, weight=weight, bias=bias)
        return of_head, tuple(map(_or_zero, by_hidden, hidden))


def _or_zero(gradient: Array | None, kind: Any) -> Any:
    """A gradient, or a zero that takes no memory in its place; None for no argument."""
    if gradient is None:
        return None if kind is None else SymbolicZero(kind)
    return gradient.astype(kind.dtype)
