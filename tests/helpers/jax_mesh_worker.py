"""Run as a script with four virtual devices: the JAX wing on meshes against one device, as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=4 --xla_cpu_use_fusion_emitters=false"
    )

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spoloss import SPO
from spoloss.jax import Completions, Head, linear_logps, linear_pair_loss

P, T, D, V = 8, 6, 4, 12
SPLITS: dict[str, dict[str, str]] = {
    "pairs": {"batch_axis": "data"},
    "words": {"vocab_axis": "model"},
    "both": {"batch_axis": "data", "vocab_axis": "model"},
}
COLLECTIVE = re.compile(r"(\S+) (all-gather|all-reduce|all-to-all|collective-permute)[-(s]")


def make_arrays() -> dict[str, Array]:
    """A batch, by argument; ragged."""
    random = np.random.default_rng(0)
    labels = random.integers(0, V, (2, P, T))
    labels[0, 1, :4] = labels[1, 2] = -100
    normal = lambda *shape: jnp.asarray(random.normal(size=shape))  # noqa: E731
    return {
        "chosen_hidden": normal(P, T, D),
        "rejected_hidden": normal(P, T, D),
        "weight": normal(V, D),
        "bias": normal(V),
        "chosen_labels": jnp.asarray(labels[0]),
        "rejected_labels": jnp.asarray(labels[1]),
        "reference_chosen_logps": normal(P) - 12.0,
        "reference_rejected_logps": normal(P) - 12.0,
        "beta": jnp.linspace(0.1, 0.4, P),
        "weights": jnp.linspace(0.0, 2.0, P),
        "token_weights": jnp.asarray(random.random((P, T))),
    }


def head_of(arrays: dict[str, Array], options: dict[str, Any]) -> Head:
    return Head(arrays["weight"], arrays["bias"], softcap=3.0, **options)


def pair_loss(arrays: dict[str, Array], **options: Any) -> Array:
    """The fused loss; two pairs share a tile, or none fits."""
    weights = {"token_weights": arrays["token_weights"]}
    return linear_pair_loss(
        SPO(),
        head_of(arrays, options),
        Completions(arrays["chosen_hidden"], arrays["chosen_labels"], **weights),
        Completions(arrays["rejected_hidden"], arrays["rejected_labels"]),
        arrays["reference_chosen_logps"],
        arrays["reference_rejected_logps"],
        beta=arrays["beta"],
        weights=arrays["weights"],
        nll_weight=0.1,
    ).loss


def logps(arrays: dict[str, Array], **options: Any) -> Array:
    """The chosen side's log-probabilities, squared so that their gradients differ."""
    completions = Completions(arrays["chosen_hidden"], arrays["chosen_labels"])
    return (linear_logps(head_of(arrays, options), completions) ** 2).mean()


def place(
    arrays: dict[str, Array], mesh: Any, batch_axis: Any, vocab_axis: Any
) -> dict[str, Array]:
    """The arrays on the mesh: pairs over one axis, words over the other."""
    words = ("weight", "bias")
    return {
        name: jax.device_put(
            array,
            NamedSharding(mesh, PartitionSpec(vocab_axis if name in words else batch_axis)),
        )
        for name, array in arrays.items()
    }


def collectives(program: str) -> list[tuple[str, str]]:
    """What crosses devices in a compiled program: kind and shape of each."""
    return [(kind, shape) for shape, kind in COLLECTIVE.findall(program)]


def compare(
    function: Callable[..., Array],
    wanted: tuple[str, ...],
    axis_type: AxisType,
    split: str,
    rows: int,
) -> dict[str, Any]:
    """Loss and gradients on the mesh against one device, and what the program sends around."""
    arrays, axes = make_arrays(), SPLITS[split]
    sizes = {"pairs": (4, 1), "words": (1, 4), "both": (2, 2)}[split]
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(axis_type, axis_type))

    def loss(by: dict[str, Array], rest: dict[str, Array], **where: Any) -> Array:
        return function({**rest, **by}, chunk_size=rows, **where)

    by = {name: arrays[name] for name in wanted}
    want = jax.jit(jax.value_and_grad(loss))(by, arrays)
    there = place(arrays, mesh, axes.get("batch_axis"), axes.get("vocab_axis"))
    by = {name: there[name] for name in wanted}
    # JAX 0.7 has renamed it.
    with (jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh)(mesh):
        on_mesh = jax.jit(jax.value_and_grad(lambda by, rest: loss(by, rest, mesh=mesh, **axes)))
        program = on_mesh.lower(by, there).compile()
        got = program(by, there)
    errors = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), got, want
    )
    return {
        "error": max(jax.tree.leaves(errors)),
        "collectives": collectives(program.as_text()),
        "same layout": all(
            grad.sharding.is_equivalent_to(by[name].sharding, grad.ndim)
            for name, grad in got[1].items()
        ),
    }


def main() -> None:
    """All comparisons, one JSON object."""
    jax.config.update("jax_enable_x64", True)
    trained = ("chosen_hidden", "rejected_hidden", "weight", "bias", "beta", "weights")
    auto, explicit = AxisType.Auto, AxisType.Explicit
    head = ("chosen_hidden", "weight", "bias")
    cases = {
        f"{what}, {split}, {axis_type}": compare(function, wanted, axis_type, split, rows)
        for what, function, wanted, rows, split, axis_type in [
            ("pairs in tiles", pair_loss, trained, 20, "pairs", auto),
            ("pairs in tiles", pair_loss, trained, 20, "words", explicit),
            ("pairs in tiles", pair_loss, trained, 20, "both", explicit),
            ("long pairs", pair_loss, trained, 3, "both", auto),
            ("frozen head", pair_loss, trained[:2], 5, "both", auto),
            ("log-probabilities", logps, head, 5, "pairs", explicit),
        ]
    }
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
