"""SPO as the `compute_loss_func` of Transformers' Trainer, exact for any distribution of pairs.

Tested with Transformers 5.23 and PyTorch 2.13, without a subclass. To change an existing run: the
module with policy and reference, the collator's names and labels, and two arguments of Trainer.

Pitfalls: Trainer counts the labels that are not -100 and passes their number. So a batch needs one
dummy label per pair, and the tokens to predict need another name. The reference is part of the
model here, so it is saved with each checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spoloss import spo_loss
from spoloss.torch import sequence_logps


class PolicyAndReference(nn.Module):
    """Returns the four log-probabilities. Rows are all chosen, then all rejected."""

    def __init__(self, policy: nn.Module, reference: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference.requires_grad_(False)

    def train(self, mode: bool = True) -> PolicyAndReference:
        super().train(mode)
        self.reference.eval()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> dict[str, Any]:
        policy = sequence_logps(self.policy(input_ids, attention_mask).logits, targets)
        with torch.no_grad():
            reference = sequence_logps(self.reference(input_ids, attention_mask).logits, targets)
        return {"logps": (*policy.chunk(2), *reference.chunk(2))}


def with_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with one dummy label per pair."""
    return {**batch, "labels": torch.zeros(len(batch["targets"]) // 2)}


def mean_over_step(
    outputs: dict[str, Any], labels: Tensor, num_items_in_batch: Tensor | None = None
) -> Tensor:
    """The batch's part of the mean over all pairs of the step; in evaluation, the batch's mean."""
    pairs = len(labels) if num_items_in_batch is None else num_items_in_batch
    return spo_loss(*outputs["logps"], beta=0.1, reduction="sum") / pairs


if __name__ == "__main__":
    import toy
    from transformers import Trainer, TrainingArguments

    def collate(pairs: list[toy.Pair]) -> dict[str, Tensor]:
        """The arguments of the model, and the labels."""
        return with_labels(toy.named(pairs, "input_ids", "attention_mask", "targets"))

    # Trainer would drop keys that forward does not name.
    names = {"label_names": ["labels"], "remove_unused_columns": False}
    arguments = TrainingArguments(**toy.TRAINER, **names)
    model = PolicyAndReference(*toy.models())
    Trainer(model, arguments, collate, toy.pairs(6), compute_loss_func=mean_over_step).train()
