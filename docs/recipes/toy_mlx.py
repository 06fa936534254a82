"""Data for the MLX recipe when started as a script: a tiny model, its reference, a batch.

The model predicts each token from the mean of the embeddings of all previous tokens.
"""

from __future__ import annotations

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


def model(dtype: mx.Dtype = mx.float32) -> Model:
    """A model with random weights."""
    random = np.random.default_rng(0)
    embed, head = random.normal(size=(2, toy.VOCABULARY, 16))
    return Model({"embed": mx.array(embed, dtype), "head": mx.array(head.T / 4, dtype)})


def batch(count: int) -> tuple[mx.array, mx.array]:
    """Ids and labels of the batch of toy.py, as MLX arrays."""
    rows = toy.collate(toy.pairs(count))
    return mx.array(rows.ids.numpy()), mx.array(rows.labels.numpy())
