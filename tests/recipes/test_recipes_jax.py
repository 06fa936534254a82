"""The recipe of JAX on a mesh makes the gradient of equation 6, and gathers nothing."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest
import torch

from helpers.interpreter import run_python
from helpers.jax_recipe_worker import BETA, PAIRS
from helpers.recipes_oracle import MeanOfEmbeddings, exact_step, load, relative_error, toy

FLOAT64 = 1e-12


def test_jax_on_a_mesh() -> None:
    done = run_python("-m", "helpers.jax_recipe_worker")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    policy, reference = map(MeanOfEmbeddings, load("toy_jax").params(jnp.float64))
    loss, exact = exact_step(policy, reference, toy.pairs(PAIRS), BETA)
    assert found["loss"] == pytest.approx(loss, rel=FLOAT64)
    grads = {n: torch.tensor(g, dtype=torch.float64) for n, g in found["grads"].items()}
    assert relative_error(grads, exact) < FLOAT64
    assert found["gathers"] == 0
    assert "model" in found["layout"]
