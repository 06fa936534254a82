"""What the training loops in the documentation use: two tiny models, an optimiser and a loader."""

from __future__ import annotations

from types import SimpleNamespace

import torch


class TinyModel(torch.nn.Module):
    """Calls and attributes of a Transformers causal LM, as far as the documentation uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = self.backbone
        self.embedding = torch.nn.Embedding(20, 8)
        self.lm_head = torch.nn.Linear(8, 20, bias=False)

    def backbone(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        states = self.embedding(ids) * attention_mask[..., None]
        return SimpleNamespace(last_hidden_state=states)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        states = self.backbone(ids, attention_mask).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(states))


def training_setup() -> dict[str, object]:
    """`policy`, `reference`, `optimizer`, and `loader` of (ids, mask, labels)."""
    torch.manual_seed(0)
    policy = TinyModel()
    ids = torch.randint(0, 20, (4, 6))
    return {
        "policy": policy,
        "reference": TinyModel(),
        "optimizer": torch.optim.SGD(policy.parameters(), lr=0.1),
        "loader": [(ids, torch.ones_like(ids), ids)] * 3,
    }
