"""The JAX wing on meshes of four virtual devices: equal to one device, and nothing is gathered."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from helpers import processes
from helpers.wings import HEAD, STATES, WINGS, D, completions_of, fused, head_of, make_arrays
from spoloss import SPO
from spoloss.jax import linear_logps

JAX = WINGS["jax"]
PAIRS, ENTRIES = 8, 12
MESHES: dict[str, tuple[tuple[int, int], dict[str, str]]] = {
    # what is split: the sizes of the axes "data" and "model", and the head's options
    "pairs": ((4, 1), {"batch_axis": "data"}),
    "vocabulary": ((1, 4), {"vocab_axis": "model"}),
    "both": ((2, 2), {"batch_axis": "data", "vocab_axis": "model"}),
}
COLLECTIVE = re.compile(r"(\S+) (all-gather|all-reduce|all-to-all|collective-permute)[-(s]")
TRAINED = (*STATES, *HEAD, "beta", "weights")

Arrays = dict[str, Array]


def divisible_arrays() -> Arrays:
    """The case of `make_arrays` in sizes that four devices divide."""
    sized = {
        name: jnp.resize(array, (ENTRIES if name in HEAD else PAIRS, *array.shape[1:]))
        for name, array in make_arrays(JAX).items()
    }
    return sized | {n: a.clip(max=ENTRIES - 1) for n, a in sized.items() if n.endswith("labels")}


def loss(arrays: Arrays, **options: Any) -> Array:
    return fused(JAX, SPO(), arrays, nll_weight=0.1, softcap=3.0, **options).loss


def squared_logps(arrays: Arrays, **options: Any) -> Array:
    """Squared, so that the gradients of the log-probabilities differ."""
    head = head_of(JAX, arrays, {"softcap": 3.0, **options})
    return (linear_logps(head, completions_of(JAX, arrays, "chosen", {})) ** 2).mean()


def check(
    split: str,
    axis_type: AxisType,
    function: Callable[..., Array],
    wanted: Sequence[str],
    chunk_size: int,
) -> None:
    """Value and gradients are those of one device, and only all-reduces leave a device."""
    sizes, axes = MESHES[split]
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(axis_type,) * 2)

    def with_grads(arrays: Arrays, **where: Any) -> tuple[Any, str]:
        def total(by: Arrays, rest: Arrays) -> Array:
            return function({**rest, **by}, chunk_size=chunk_size, **where)

        by = {name: arrays[name] for name in wanted}
        program = jax.jit(jax.value_and_grad(total)).lower(by, arrays).compile()
        return program(by, arrays), program.as_text()

    arrays = divisible_arrays()
    axis_of = {n: axes.get("vocab_axis" if n in HEAD else "batch_axis") for n in arrays}
    placed = {
        name: jax.device_put(array, NamedSharding(mesh, PartitionSpec(axis_of[name])))
        for name, array in arrays.items()
    }
    want, _ = with_grads(arrays)
    # JAX 0.7 has renamed it.
    with (jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh)(mesh):
        got, program = with_grads(placed, mesh=mesh, **axes)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=0.0, atol=1e-10), got, want)
    for name, grad in got[1].items():
        assert grad.sharding.is_equivalent_to(placed[name].sharding, grad.ndim), name
    sent = COLLECTIVE.findall(program)
    assert {kind for _, kind in sent} == {"all-reduce"}, sent
    of_head = [shape for shape, _ in sent if f"[{ENTRIES // sizes[1]},{D}]" in shape]
    assert len(of_head) == ("weight" in wanted and sizes[0] > 1), sent


def check_all(_rank: int) -> None:
    auto, explicit = AxisType.Auto, AxisType.Explicit
    two_pairs = 24  # rows of a tile
    check("pairs", auto, loss, TRAINED, two_pairs)
    check("vocabulary", explicit, loss, TRAINED, two_pairs)
    check("both", explicit, loss, TRAINED, two_pairs)
    check("both", auto, loss, TRAINED, chunk_size=3)  # pairs are longer than a tile
    check("both", auto, loss, STATES, chunk_size=5)
    check("pairs", explicit, squared_logps, (STATES[0], *HEAD), chunk_size=5)


def test_on_a_mesh(tmp_path, monkeypatch) -> None:
    four = "--xla_force_host_platform_device_count=4"
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {four}")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    processes.run(check_all, 1, tmp_path)
