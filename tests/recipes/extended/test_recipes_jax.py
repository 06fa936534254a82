"""The recipes for JAX make the gradient of equation 6; on a mesh they gather nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from helpers import processes
from helpers.recipes_oracle import (
    BETA,
    MeanOfEmbeddings,
    assert_step,
    exact_step,
    load,
    moved,
    run_script,
    toy,
)

PAIRS = toy.pairs(4)


def optax_step(weights: Any, reference: Any, batch: Any) -> tuple[Any, Any]:
    recipe, toy_jax, optimizer = load("jax_flax"), load("toy_jax"), optax.sgd(1.0)
    train_step = recipe.make_train_step(toy_jax.apply, optimizer, BETA)
    new, _, loss = train_step(weights, reference, optimizer.init(weights), batch)
    return loss, new


def nnx_step(weights: Any, reference: Any, batch: Any) -> tuple[Any, Any]:
    policy, reference, optimizer = modules(weights, reference)
    loss = load("jax_flax").nnx_train_step(policy, reference, optimizer, batch, BETA)
    return loss, {name: getattr(policy, name)[...] for name in weights}


def modules(weights: Any, reference: Any) -> tuple[Any, Any, nnx.Optimizer]:
    policy, reference = map(load("toy_jax").Model, (weights, reference))
    return policy, reference, nnx.Optimizer(policy, optax.sgd(1.0), wrt=nnx.Param)


def mesh_step(weights: Any, reference: Any, batch: Any) -> tuple[Any, Any]:
    """On four virtual devices."""
    recipe = load("jax_mesh")
    mesh = recipe.make_mesh(2, 2)
    policy, reference, optimizer = modules(weights, reference)
    for model in (policy, reference):
        recipe.place(model, mesh)
    sides = [recipe.place_batch(side, mesh) for side in load("toy_jax").sides(batch)]
    inputs, where = (policy, reference, optimizer, *sides), {"beta": BETA, "mesh": mesh}
    program = recipe.train_step.lower(*inputs, **where).compile().as_text()
    loss = recipe.train_step(*inputs, **where)
    assert not any(name in program for name in (" all-gather", " all-to-all"))
    assert "model" in str(policy.head[...].sharding.spec)
    return loss, {name: getattr(policy, name)[...] for name in weights}


def check(_rank: int, step: Any) -> None:
    """A step of descent at rate 1 moves the weights by the gradient."""
    weights = load("toy_jax").params(jnp.float64)
    reference = jax.tree.map(jnp.asarray, moved(weights))
    exact = exact_step(MeanOfEmbeddings(weights), MeanOfEmbeddings(reference), PAIRS)
    loss, new = step(weights, reference, load("toy_jax").batch(len(PAIRS)))
    grads = {name: torch.tensor(np.asarray(w - new[name])) for name, w in weights.items()}
    assert_step(loss, grads, exact, 1e-12)


@pytest.mark.parametrize("step", [optax_step, nnx_step])
def test_a_step_of_descent_is_the_gradient(step) -> None:
    check(0, step)


def test_on_a_mesh(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    processes.run(check, 1, tmp_path, mesh_step)


@pytest.mark.parametrize("name", ["jax_flax", "jax_mesh"])
def test_recipe_runs_as_a_script(name) -> None:
    losses = run_script(name)
    assert losses[0] == pytest.approx(0.0, abs=1e-6)  # the reference is a copy of the policy
    assert losses[-1] < -0.001
