"""What surrounds a call: strict modes, the user's own shard_map, other platforms, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax import Array, export, lax
from jax.sharding import AxisType, PartitionSpec

from helpers.wings import (
    OTHER_T,
    STATES,
    WINGS,
    P,
    T,
    completions_of,
    fused,
    head_of,
    make_arrays,
    packed,
    unfused_logps,
)
from spoloss import SPO
from spoloss.jax import Completions, Head, _tiles, linear_logps

pytestmark = pytest.mark.usefixtures("quick_compiler")

JAX = WINGS["jax"]
Arrays = dict[str, Any]


def loss(arrays: Arrays, **options: Any) -> Array:
    found: Array = fused(JAX, SPO(linear_below=-0.5), arrays, **options).loss
    return found


def logps(arrays: Arrays, *, softcap: float | None = None, **options: Any) -> Array:
    head = head_of(JAX, arrays, {"softcap": softcap})
    return linear_logps(head, completions_of(JAX, arrays, "chosen", {}), **options)


def by_logits(arrays: Arrays, **options: Any) -> Array:
    """Without the bias, whose rank strict promotion would refuse."""
    return unfused_logps(JAX, {**arrays, "bias": None}, "chosen", **options)


def in_rows(arrays: Arrays) -> Arrays:
    """The same with each side as one row of five sequences."""
    chosen, rejected = ([0, 3, 9, 9, 20, P * length] for length in (T, OTHER_T))
    rows = packed(JAX, arrays, chosen=chosen, rejected=rejected)
    return rows | {"rejected_cu_seqlens": rows["rejected_cu_seqlens"].astype("uint8")}


def chosen_of(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if name.startswith("chosen")}


WAYS: dict[str, Callable[[Arrays], Array]] = {
    "loss": lambda a: loss(a, average=True, nll_weight=0.5, softcap=2.0),
    "long pairs": lambda a: loss(a, chunk_size=3),
    "each": lambda a: loss(a, reduction="none", nll_weight=0.5),
    "packed loss": lambda a: loss(in_rows(a), average=True, chunk_size=9),
    "one packed side": lambda a: loss({**in_rows(a), **chosen_of(a), "chosen_cu_seqlens": None}),
    "logps": lambda a: logps(a, average=True),
    "packed logps": lambda a: logps(in_rows(a), average=True),
    "per token": lambda a: logps(a, per_token=True, softcap=2.0),
    "by logits": lambda a: by_logits(a, average=True),
    "packed by logits": lambda a: by_logits(in_rows(a), average=True),
}


def floating(arrays: Arrays) -> Arrays:
    """What a function may be differentiated with respect to."""
    return {name: array for name, array in arrays.items() if not name.endswith("labels")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", WAYS)
def test_strict_promotion(name: str, dtype: str) -> None:
    """Traced only, because JAX refuses while it traces. All but head and states are float64."""
    arrays = make_arrays(JAX, dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for wanted in (["chosen_hidden"], list(floating(arrays))):
            by = {each: arrays[each] for each in wanted}
            total = lambda by: WAYS[name]({**arrays, **by}).sum()  # noqa: E731
            jax.eval_shape(jax.value_and_grad(total), by)


@pytest.mark.parametrize("name", ["loss", "long pairs", "each", "logps", "by logits"])
def test_inside_a_shard_map_of_the_users_own(name: str) -> None:
    """With `check_vma=True`, the default: JAX sums the gradients of what the devices share."""
    arrays = make_arrays(JAX)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    data, whole = PartitionSpec("data"), PartitionSpec()
    specs = {n: whole if n in ("weight", "bias") else data for n in arrays}

    def local(arrays: Arrays) -> Array:
        return lax.psum(WAYS[name](arrays).sum(), "data")

    on_mesh = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=whole)

    def with_grads(function: Callable[[Arrays], Array]) -> Any:
        by = floating(arrays)
        return jax.jit(jax.value_and_grad(lambda by: function({**arrays, **by})))(by)

    got, want = with_grads(on_mesh), with_grads(lambda a: WAYS[name](a).sum())
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-14), got, want)


PLATFORMS = ("cuda", "rocm", "tpu")


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ["long pairs", "each", "packed logps"])
def test_export_for_other_platforms(name: str, *, trained: bool) -> None:
    """No operation that only a CPU has: with gradients, for each accelerator."""
    arrays = make_arrays(JAX, "float32")
    wanted = [*STATES, "weight", "bias", "beta"] if trained else list(STATES)

    def with_grads(by: Arrays, rest: Arrays) -> Any:
        return jax.value_and_grad(lambda by: WAYS[name]({**rest, **by}).sum())(by)

    by = {each: arrays[each] for each in wanted}
    exported = export.export(jax.jit(with_grads), platforms=PLATFORMS)(by, arrays)
    assert exported.platforms == PLATFORMS


def test_tiles_are_those_of_the_platform_that_the_program_is_for() -> None:
    """Not those of the machine that traces it: a program for two platforms has both."""
    hidden, weight = (jax.ShapeDtypeStruct(s, "float32") for s in ((1, 1024, 8), (50_000, 8)))
    tokens = Completions(hidden, jax.ShapeDtypeStruct((1, 1024), "int32"))
    rows = [max(256, memory // (4 * 50_000)) for memory in (_tiles._CPU_BYTES, _tiles._OTHER_BYTES)]
    parts = [-(-1023 // -(-1023 // most)) for most in rows]
    assert parts[0] != parts[1]
    for platform, part, other in (("cpu", *parts), ("cuda", *reversed(parts))):
        program = export.export(jax.jit(linear_logps), platforms=[platform])
        text = program(Head(weight), tokens).mlir_module()
        assert f"tensor<{part}x50000xf32>" in text
        assert f"tensor<{other}x50000xf32>" not in text


def arrays_kept(function: Callable[..., Array], *args: Array) -> list[tuple[int, ...]]:
    """The shapes of what a call keeps for its backward pass."""
    back = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    return [leaf.shape for leaf in jax.tree.leaves(back) if leaf.size > 1]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_the_backward_pass_reads_is_kept(reduction: str) -> None:
    """With a frozen head one array of each side's size, the directions, and no weight."""
    arrays = make_arrays(JAX)
    shapes = [arrays[name].shape for name in STATES]

    def kept(*wanted: str) -> list[tuple[int, ...]]:
        def call(*of: Array) -> Array:
            by = dict(zip(wanted, of, strict=True))
            return loss({**arrays, **by}, reduction=reduction).sum()

        return arrays_kept(call, *(arrays[name] for name in wanted))

    frozen = kept(*STATES)
    assert sorted(s for s in frozen if len(s) == 3) == sorted(shapes)
    assert arrays["weight"].shape not in frozen
    if reduction == "mean":
        trained = kept(*STATES, "weight")
        assert sorted(s for s in trained if len(s) == 3) == sorted(shapes)
        assert trained.count(arrays["weight"].shape) == 1
        assert arrays["bias"].shape not in trained
        assert arrays["weight"].shape not in kept("bias")
        assert not [s for s in kept("weight") if len(s) == 3]
