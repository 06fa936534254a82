"""Run as a script with four virtual devices: one step of docs/recipes/jax_mesh.py, as JSON."""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from helpers.recipes_oracle import load

BETA, PAIRS = 0.1, 4


def main() -> None:
    """Loss and gradients of the first step on a mesh of 2 x 2, and what it gathers."""
    jax.config.update("jax_enable_x64", True)
    load("toy")
    toy_jax, recipe = load("toy_jax"), load("jax_mesh")
    mesh = recipe.make_mesh(2, 2)
    policy, reference = toy_jax.models(jnp.float64)
    for model in (policy, reference):
        recipe.place(model, mesh)
    both = toy_jax.batch(PAIRS)
    chosen, rejected = (
        recipe.place_batch(jax.tree.map(lambda rows, i=i: jnp.split(rows, 2)[i], both), mesh)
        for i in range(2)
    )
    optimizer = nnx.Optimizer(policy, optax.sgd(1.0), wrt=nnx.Param)
    before = {name: np.asarray(getattr(policy, name)[...]) for name in ("embed", "head")}
    arguments = (policy, reference, optimizer, chosen, rejected)
    program = recipe.train_step.lower(*arguments, beta=BETA, mesh=mesh).compile().as_text()
    loss = recipe.train_step(*arguments, beta=BETA, mesh=mesh)
    grads = {name: w - np.asarray(getattr(policy, name)[...]) for name, w in before.items()}
    json.dump(
        {
            "loss": float(loss),
            "grads": {name: grad.tolist() for name, grad in grads.items()},
            "gathers": program.count(" all-gather") + program.count(" all-to-all"),
            "layout": str(policy.head[...].sharding.spec),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
