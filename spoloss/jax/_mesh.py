"""The layout of a call's arrays on a mesh, and how a function runs on each device's part.

The differentiation rules are outside of `shard_map`, so no derivative passes through it. The
communication between devices is explicit: sums over the vocabulary, and the sum of the head's
gradient over the completions.

Inside a `shard_map` of the user's own, JAX tracks over which axes of the mesh an array varies, and
a loop must start with what it ends with. So all arrays of a call vary over the same axes, and the
zeros that a loop starts with vary like them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from spoloss.jax._arguments import Axis, Head


@dataclass(frozen=True)
class Split:
    """The mesh axes over which completions and vocabulary are split. Static under `jax.jit`."""

    mesh: Mesh | None
    batch_axis: tuple[str, ...]
    vocab_axis: tuple[str, ...]

    @classmethod
    def of(cls, head: Head) -> Split:
        """How a call with this head is split."""
        return cls(head.mesh, names_of(head.batch_axis), names_of(head.vocab_axis))

    # The type is Any because layouts replace arrays in trees with array fields.
    @property
    def whole(self) -> Any:
        """The layout of an array that every device has in full."""
        return PartitionSpec()  # type: ignore[no-untyped-call]

    @property
    def of_batch(self) -> Any:
        """The layout of an array with completions as its first axis."""
        return PartitionSpec(self.batch_axis or None)  # type: ignore[no-untyped-call]

    @property
    def of_vocab(self) -> Any:
        """The layout of an array with vocabulary entries as its first axis."""
        return PartitionSpec(self.vocab_axis or None)  # type: ignore[no-untyped-call]

    def parts(self, axes: tuple[str, ...]) -> int:
        """The number of parts that the axes split an array into."""
        return math.prod(self.mesh.shape[axis] for axis in axes) if self.mesh is not None else 1

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        """`function`, applied to each device's part of its arguments."""
        if self.mesh is None:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def sum_batch(self, values: Any) -> Any:
        """The sum over the devices that have different completions."""
        return lax.psum(values, self.batch_axis) if self.batch_axis else values  # type: ignore[no-untyped-call]


def names_of(axis: Axis) -> tuple[str, ...]:
    """The names of one mesh axis, of several or of none."""
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def vary_alike(values: Any) -> Any:
    """A tree of arrays that all vary over the axes over which any of them varies."""
    axes = frozenset[str]().union(*map(_varying, jax.tree.leaves(values)))
    return _vary(values, axes)


def vary_like(values: Any, like: Array) -> Any:
    """A tree of arrays that also vary over the axes over which `like` varies."""
    return _vary(values, _varying(like))


def _vary(values: Any, axes: frozenset[str]) -> Any:
    def vary(array: Array) -> Any:
        missing = tuple(axes - _varying(array))
        return _over(array, missing) if missing else array

    return jax.tree.map(vary, values)


def _over(array: Array, axes: tuple[str, ...]) -> Any:
    if hasattr(lax, "pcast"):
        return lax.pcast(array, axes, to="varying")
    return getattr(lax, "pvary")(array, axes)  # noqa: B009  # its name in older versions of JAX


def _varying(array: Array) -> frozenset[str]:
    kind: Any = jax.typeof(array)
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else kind.vma)  # vma in older ones
