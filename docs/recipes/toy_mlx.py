"""Data for the MLX recipe when started as a script: a tiny model, its reference, a batch.

The model predicts each token from the mean of the embeddings of all previous tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import toy
from mlx import nn


class Model(nn.Module):
    """A causal model, so padding on the right has no effect."""

    def __init__(self, weights: dict[str, mx.array]) -> None:
        super().__init__()
        self.embed = weights["embed"]
        self.head = weights["head"]

    def __call__(self, ids: mx.array) -> mx.array:
        """Logits [B, T, V] of token ids [B, T]."""
        counts = mx.arange(1, ids.shape[1] + 1)[:, None].astype(self.embed.dtype)
        return mx.tanh(mx.cumsum(self.embed[ids], axis=1) / counts) @ self.head


class Batch(NamedTuple):
    """Rows [2B, T]: all chosen, then all rejected. Labels are -100 on prompt and padding."""

    ids: mx.array
    labels: mx.array


def models(dtype: mx.Dtype = mx.float32) -> tuple[Model, Model]:
    """A policy with random weights, and a frozen reference with slightly different weights."""
    random = np.random.default_rng(0)
    policy = {
        "embed": random.normal(size=(toy.VOCABULARY, 16)),
        "head": random.normal(size=(16, toy.VOCABULARY)) / 4,
    }
    reference = {name: w + 0.05 * random.normal(size=w.shape) for name, w in policy.items()}

    def model(weights: dict[str, np.ndarray]) -> Model:
        return Model({name: mx.array(w, dtype) for name, w in weights.items()})

    return model(policy), model(reference).freeze()


def batch(count: int) -> Batch:
    """The batch of toy.py, as MLX arrays."""
    rows = toy.collate(toy.pairs(count))
    return Batch(mx.array(rows.ids.numpy()), mx.array(rows.labels.numpy()))
