"""Data for the JAX recipes when started as scripts: a tiny model, its reference, a batch.

The model predicts each token from the mean of the embeddings of all previous tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import toy
from flax import nnx

Params = dict[str, jax.Array]


def apply(params: Params, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states [B, T, D] of token ids [B, T], and the head. Padding is on the right."""
    states = params["embed"][ids] * mask[..., None]
    states = jnp.cumsum(states, axis=1) / jnp.maximum(jnp.cumsum(mask, axis=1), 1)[..., None]
    return jnp.tanh(states), params["head"]


def params(dtype: jnp.dtype = jnp.float32) -> tuple[Params, Params]:
    """The weights of a policy, and slightly different weights of a reference."""
    random = np.random.default_rng(0)
    policy = {
        "embed": random.normal(size=(toy.VOCABULARY, 16)),
        "head": random.normal(size=(16, toy.VOCABULARY)) / 4,
    }
    reference = {name: w + 0.05 * random.normal(size=w.shape) for name, w in policy.items()}
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), (policy, reference))


class Model(nnx.Module):
    """The same model as a module."""

    def __init__(self, weights: Params) -> None:
        self.embed = nnx.Param(weights["embed"])
        self.head = nnx.Param(weights["head"])

    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Hidden states [B, T, D] of token ids [B, T], and the head's kernel [D, V]."""
        return apply({"embed": self.embed[...], "head": self.head[...]}, ids, mask)


def models(dtype: jnp.dtype = jnp.float32) -> tuple[Model, Model]:
    """Policy and reference as modules."""
    policy, reference = params(dtype)
    return Model(policy), Model(reference)


def batch(count: int) -> toy.Batch:
    """The batch of toy.py, as JAX arrays."""
    return jax.tree.map(lambda rows: jnp.asarray(rows.numpy()), toy.collate(toy.pairs(count)))
