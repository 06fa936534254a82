"""Run as a script with four virtual devices: one step of docs/recipes/jax_mesh.py, as JSON."""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from helpers.recipes_oracle import BETA, load, moved

PAIRS = 4


def main() -> None:
    """Loss and weights after the first step on a mesh of 2 x 2, and what it gathers."""
    jax.config.update("jax_enable_x64", True)
    toy_jax, recipe = load("toy_jax"), load("jax_mesh")
    mesh = recipe.make_mesh(2, 2)
    weights = toy_jax.params(jnp.float64)
    policy, reference = (
        toy_jax.Model(weights),
        toy_jax.Model(jax.tree.map(jnp.asarray, moved(weights))),
    )
    for model in (policy, reference):
        recipe.place(model, mesh)
    both = toy_jax.batch(PAIRS)
    chosen, rejected = (
        recipe.place_batch(jax.tree.map(lambda rows, i=i: jnp.split(rows, 2)[i], both), mesh)
        for i in range(2)
    )
    optimizer = nnx.Optimizer(policy, optax.sgd(1.0), wrt=nnx.Param)
    arguments = (policy, reference, optimizer, chosen, rejected)
    program = recipe.train_step.lower(*arguments, beta=BETA, mesh=mesh).compile().as_text()
    loss = recipe.train_step(*arguments, beta=BETA, mesh=mesh)
    found = {
        "loss": float(loss),
        "weights": {name: getattr(policy, name)[...].tolist() for name in weights},
        "gathers": program.count(" all-gather") + program.count(" all-to-all"),
        "layout": str(policy.head[...].sharding.spec),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
