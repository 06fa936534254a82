"""SPO on a mesh with Flax NNX and Optax: pairs over "data", the head's rows over "model".

Tested with JAX 0.10, Optax 0.2.8 and Flax 0.12. To change an existing train step: the two calls
with `mesh`, and the pairs as two arrays. On four virtual devices of a CPU:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python docs/recipes/jax_mesh.py

Pitfall: do not put chosen and rejected rows in one array [2B, T]. Split over "data", the first
devices would get all chosen rows and the last ones all rejected rows, and every step would move
hidden states between devices. With two arrays [B, T], both sides of a pair are on one device.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spoloss.jax import Completions, Head, linear_logps, linear_spo_loss


def make_mesh(data: int, model: int) -> Mesh:
    """A mesh with rows "data" and columns "model". XLA chooses the layouts of other arrays."""
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def place(model: nnx.Module, mesh: Mesh) -> None:
    """Put a model on the mesh: the head's kernel [D, V] by V, the rest on all devices."""
    for path, param in nnx.iter_graph(model):
        if isinstance(param, nnx.Param):
            split = PartitionSpec(None, "model") if path[-1] == "head" else PartitionSpec()
            param[...] = jax.device_put(param[...], NamedSharding(mesh, split))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Put a batch of arrays [B, ...] on the mesh, by its pairs."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def mean_loss(
    policy: nnx.Module, reference: nnx.Module, chosen: Any, rejected: Any, beta: float, mesh: Mesh
) -> jax.Array:
    """The loss of all pairs on the mesh. A side has ids, mask and labels, [B, T] each."""
    where = {"mesh": mesh, "batch_axis": "data", "vocab_axis": "model"}
    ref_logps, completions = [], []
    for side in (chosen, rejected):
        hidden, kernel = reference(side.ids, side.mask)
        head = Head(kernel.T, **where)
        ref_logps.append(linear_logps(head, Completions(hidden, side.labels)))
        hidden, kernel = policy(side.ids, side.mask)
        completions.append(Completions(hidden, side.labels))
    return linear_spo_loss(Head(kernel.T, **where), *completions, *ref_logps, beta=beta).loss


@nnx.jit(static_argnames=("beta", "mesh"))
def train_step(
    policy: nnx.Module,
    reference: nnx.Module,
    optimizer: nnx.Optimizer,
    chosen: Any,
    rejected: Any,
    *,
    beta: float,
    mesh: Mesh,
) -> jax.Array:
    """One step, which changes policy and optimizer in place. Returns the mean loss."""
    loss, grads = nnx.value_and_grad(mean_loss)(policy, reference, chosen, rejected, beta, mesh)
    optimizer.update(policy, grads)
    return loss


if __name__ == "__main__":
    import toy_jax

    count = len(jax.devices())
    mesh = make_mesh(max(1, count // 2), min(2, count))
    policy, reference = (toy_jax.Model(toy_jax.params()) for _ in range(2))
    for model in (policy, reference):
        place(model, mesh)
    chosen, rejected = (place_batch(side, mesh) for side in toy_jax.sides(toy_jax.batch(8)))
    optimizer = nnx.Optimizer(policy, optax.adamw(1e-2), wrt=nnx.Param)
    for _ in range(3):
        loss = train_step(policy, reference, optimizer, chosen, rejected, beta=0.025, mesh=mesh)
        print("loss", loss)
