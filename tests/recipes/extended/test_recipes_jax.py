"""The recipes for JAX make the gradient of equation 6; on a mesh they gather nothing."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from helpers.interpreter import run_python
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


def optax_step(weights: Any, reference: Any) -> tuple[float, Any]:
    recipe, toy_jax, optimizer = load("jax_flax"), load("toy_jax"), optax.sgd(1.0)
    train_step = recipe.make_train_step(toy_jax.apply, optimizer, BETA)
    batch = toy_jax.batch(len(PAIRS))
    new, _, loss = train_step(weights, reference, optimizer.init(weights), batch)
    return loss, new


def nnx_step(weights: Any, reference: Any) -> tuple[float, Any]:
    recipe, toy_jax = load("jax_flax"), load("toy_jax")
    policy, reference = toy_jax.Model(weights), toy_jax.Model(reference)
    optimizer = nnx.Optimizer(policy, optax.sgd(1.0), wrt=nnx.Param)
    loss = recipe.nnx_train_step(policy, reference, optimizer, toy_jax.batch(len(PAIRS)), BETA)
    return loss, {name: getattr(policy, name)[...] for name in weights}


def mesh_step(*_: Any) -> tuple[float, Any]:
    done = run_python("-m", "helpers.jax_recipe_worker")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["gathers"] == 0
    assert "model" in found["layout"]
    return found["loss"], {name: np.array(weight) for name, weight in found["weights"].items()}


@pytest.mark.parametrize("step", [optax_step, nnx_step, mesh_step])
def test_a_step_of_descent_is_the_gradient(step) -> None:
    weights = load("toy_jax").params(jnp.float64)
    reference = jax.tree.map(jnp.asarray, moved(weights))
    exact = exact_step(MeanOfEmbeddings(weights), MeanOfEmbeddings(reference), PAIRS)
    loss, new = step(weights, reference)
    grads = {name: torch.tensor(np.asarray(w - new[name])) for name, w in weights.items()}
    assert_step(loss, grads, exact, 1e-12)


@pytest.mark.parametrize("name", ["jax_flax", "jax_mesh"])
def test_recipe_runs_as_a_script(name) -> None:
    losses = run_script(name)
    assert losses[0] == pytest.approx(0.0, abs=1e-6)  # the reference is a copy of the policy
    assert losses[-1] < -0.001
