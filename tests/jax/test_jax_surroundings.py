"""What surrounds a call: empty batches, strict modes, the user's own shard_map, other platforms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, export, lax
from jax.sharding import AxisType, PartitionSpec

from helpers.jax_fused import D, P, T, make_inputs, make_labels, quick_jit
from spoloss.jax import _plan, linear_logps, linear_spo_loss, sequence_logps

pytestmark = pytest.mark.usefixtures("quick_compiler")

CHOSEN, REJECTED = make_labels()


def spo(arrays: dict[str, Array], **options: Any) -> Array:
    """A loss with every differentiable argument."""
    return linear_spo_loss(
        arrays["chosen_hidden"],
        arrays["rejected_hidden"],
        arrays["weight"],
        arrays.get("chosen_labels", CHOSEN),
        arrays.get("rejected_labels", REJECTED),
        arrays["reference_chosen"],
        0.0,
        bias=arrays["bias"],
        beta=arrays["beta"],
        weights=arrays["weights"],
        reward_gap=arrays["beta"],
        **options,
    ).loss


def logps(arrays: dict[str, Array], **options: Any) -> Array:
    hidden = arrays["chosen_hidden"]
    labels = arrays.get("chosen_labels", CHOSEN)
    return linear_logps(hidden, arrays["weight"], labels, bias=arrays["bias"], **options)


def by_logits(arrays: dict[str, Array], **options: Any) -> Array:
    logits = arrays["chosen_hidden"] @ arrays["weight"].T
    return sequence_logps(logits, arrays.get("chosen_labels", CHOSEN), **options)


def packed(function: Callable[..., Array]) -> Callable[..., Array]:
    """The same with each side as one row of three sequences."""

    def call(arrays: dict[str, Array], **options: Any) -> Array:
        rows = {name: arrays[name].reshape(1, -1, D) for name in arrays if "hidden" in name}
        rows |= {"chosen_labels": CHOSEN.reshape(1, -1), "rejected_labels": REJECTED.reshape(1, -1)}
        few = {name: arrays[name][:3] for name in ("reference_chosen", "beta", "weights")}
        cu = {"cu_seqlens": jnp.array([0, 3, 9, CHOSEN.size])}
        if function is spo:
            ends = jnp.array([0, 3, 9, REJECTED.size], "uint8")
            cu = {"chosen_cu_seqlens": cu["cu_seqlens"], "rejected_cu_seqlens": ends}
        return function({**arrays, **rows, **few}, **cu, **options)

    return call


STRICT: dict[str, Callable[[dict[str, Array]], Array]] = {
    "loss": lambda a: spo(a, average=True, nll_weight=0.5, softcap=2.0, linear_below=-0.5),
    "long pairs": lambda a: spo(a, chunk_size=3),
    "each": lambda a: spo(a, reduction="none", nll_weight=0.5),
    "packed loss": lambda a: packed(spo)(a, average=True, chunk_size=9),
    "logps": lambda a: logps(a, average=True),
    "packed logps": lambda a: packed(logps)(a, average=True),
    "per token": lambda a: logps(a, per_token=True),
    "by logits": lambda a: by_logits(a, average=True),
    "packed by logits": lambda a: packed(by_logits)(a, average=True),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", STRICT)
def test_strict_promotion(name: str, dtype: str) -> None:
    """Traced only, because JAX refuses while it traces. The references are float64."""
    arrays = make_inputs(dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for wanted in (["chosen_hidden"], list(arrays)):
            by = {each: arrays[each] for each in wanted}
            loss = lambda by: STRICT[name]({**arrays, **by}).sum()  # noqa: E731
            jax.eval_shape(jax.value_and_grad(loss), by)


@pytest.mark.parametrize("size", [(0, T), (P, 0), (0, 0)], ids=str)
def test_no_pairs_and_no_tokens(size: tuple[int, int]) -> None:
    """[], 0 or nan, as in PyTorch, and gradients of 0."""
    pairs, tokens = size
    arrays = make_inputs()
    arrays |= {n: a[:pairs] for n, a in arrays.items() if n not in ("weight", "bias")}
    arrays |= {n: arrays[n][:, :tokens] for n in ("chosen_hidden", "rejected_hidden")}
    arrays |= {
        "chosen_labels": CHOSEN[:pairs, :tokens],
        "rejected_labels": REJECTED[:pairs, :tokens],
    }
    floating = {n: a for n, a in arrays.items() if "labels" not in n}
    for function in (logps, by_logits):
        np.testing.assert_array_equal(function(arrays), np.zeros(pairs))
    per_token = logps(arrays, per_token=True)
    assert per_token.shape == size
    each = spo(arrays, reduction="none", nll_weight=0.1)
    assert each.shape == (pairs,)
    for reduction, want in (("sum", each.sum()), ("mean", each.mean() if pairs else np.nan)):
        got, grads = jax.value_and_grad(
            lambda by, reduction=reduction: spo({**arrays, **by}, reduction=reduction)
        )(floating)
        np.testing.assert_allclose(got, want, rtol=1e-12)
        assert not grads["weight"].any()
        assert not grads["bias"].any()


@pytest.mark.parametrize("name", ["loss", "long pairs", "each", "logps", "by logits"])
def test_inside_a_shard_map_of_the_users_own(name: str) -> None:
    """With `check_vma=True`, the default: the gradients by shared arguments are summed by JAX."""
    arrays = {**make_inputs(), "chosen_labels": CHOSEN, "rejected_labels": REJECTED}
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    data, whole = PartitionSpec("data"), PartitionSpec()
    specs = {n: whole if n in ("weight", "bias") else data for n in arrays}

    def local(arrays: dict[str, Array]) -> Array:
        return lax.psum(STRICT[name](arrays).sum(), "data")

    on_mesh = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=whole)
    floating = {n: a for n, a in arrays.items() if "labels" not in n}

    def with_grads(function: Callable[[dict[str, Array]], Array]) -> Any:
        return quick_jit(jax.value_and_grad(lambda by: function({**arrays, **by})))(floating)

    got, want = with_grads(on_mesh), with_grads(lambda a: STRICT[name](a).sum())
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-14), got, want)


def test_tiles_are_those_of_the_platform_that_the_program_is_for() -> None:
    """Not those of the machine that traces it: a program for two platforms has both."""
    hidden, weight = (jax.ShapeDtypeStruct(s, "float32") for s in ((1, 1024, 8), (50_000, 8)))
    labels = jax.ShapeDtypeStruct((1, 1024), "int32")
    rows = [max(256, memory // (4 * 50_000)) for memory in (_plan._CPU_BYTES, _plan._OTHER_BYTES)]
    parts = [-(-1023 // -(-1023 // most)) for most in rows]
    assert parts[0] != parts[1]
    for platform, part, other in (("cpu", *parts), ("cuda", *reversed(parts))):
        program = export.export(jax.jit(linear_logps), platforms=[platform])
        text = program(hidden, weight, labels).mlir_module()
        assert f"tensor<{part}x50000xf32>" in text
        assert f"tensor<{other}x50000xf32>" not in text


def arrays_kept(function: Callable[..., Array], *args: Array) -> list[tuple[int, ...]]:
    """The shapes of what an eager call keeps for its backward pass."""
    _, back = jax.vjp(function, *args)
    return [leaf.shape for leaf in jax.tree.leaves(back) if leaf.size > 1]


def test_only_what_the_backward_pass_reads_is_kept() -> None:
    """Directions instead of the hidden states, and no weight."""
    inputs = make_inputs()
    sides, weight = [inputs["chosen_hidden"], inputs["rejected_hidden"]], inputs["weight"]

    def loss(chosen: Array, rejected: Array, weight: Array) -> Array:
        return linear_spo_loss(chosen, rejected, weight, CHOSEN, REJECTED, 0.0, 0.0, beta=0.1).loss

    frozen = arrays_kept(lambda *sides: loss(*sides, weight), *sides)
    assert sorted(s for s in frozen if len(s) == 3) == sorted(side.shape for side in sides)
    assert weight.shape not in frozen
    trained = arrays_kept(loss, *sides, weight)
    assert sorted(s for s in trained if len(s) == 3) == sorted(side.shape for side in sides)
    assert trained.count(weight.shape) == 1
    of_head = arrays_kept(lambda weight: loss(*sides, weight), weight)
    assert not [s for s in of_head if len(s) == 3]
    one = arrays_kept(lambda hidden: linear_logps(hidden, weight, CHOSEN), sides[0])
    assert [s for s in one if s == sides[0].shape] == [sides[0].shape]
    assert weight.shape not in one


@pytest.mark.parametrize("references", ["float32", "float64"])
def test_weights_do_not_change_the_dtype(references: str) -> None:
    arrays = make_inputs("float32")
    arrays["reference_chosen"] = arrays["reference_chosen"].astype(references)
    assert arrays["weights"].dtype == jnp.float64
    for options in ({}, {"nll_weight": 0.5}, {"nll_weight": 0.5, "reduction": "none"}):
        assert jax.eval_shape(functools.partial(spo, **options), arrays).dtype == references
