"""What the training loops in the documentation use: two tiny models, an optimizer and a loader."""

from __future__ import annotations

import torch

from helpers.recipes_oracle import models, toy


def training_setup() -> dict[str, object]:
    """`policy`, `reference`, `optimizer`, and `loader` of (ids, mask, labels)."""
    policy, reference = models(dtype=torch.float32)
    return {
        "policy": policy,
        "reference": reference,
        "optimizer": torch.optim.SGD(policy.parameters(), lr=1.0),
        "loader": [toy.collate(toy.pairs(2))] * 3,
    }
