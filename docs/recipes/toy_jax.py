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


def params(dtype: jnp.dtype = jnp.float32) -> Params:
    """Random weights."""
    random = np.random.default_rng(0)
    embed, head = random.normal(size=(2, toy.VOCABULARY, 16))
    return {"embed": jnp.asarray(embed, dtype), "head": jnp.asarray(head.T / 4, dtype)}


class Model(nnx.Module):
    """The same model as a module."""

    def __init__(self, weights: Params) -> None:
        self.embed = nnx.Param(weights["embed"])
        self.head = nnx.Param(weights["head"])

    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Hidden states [B, T, D] of token ids [B, T], and the head's kernel [D, V]."""
        return apply({"embed": self.embed[...], "head": self.head[...]}, ids, mask)


def batch(count: int) -> toy.Batch:
    """The batch of toy.py, as JAX arrays."""
    return jax.tree.map(lambda rows: jnp.asarray(rows.numpy()), toy.collate(toy.pairs(count)))


def sides(batch: toy.Batch) -> list[toy.Batch]:
    """The chosen rows of a batch, and its rejected rows."""
    return [toy.Batch(*(jnp.split(rows, 2)[i] for rows in batch)) for i in range(2)]
