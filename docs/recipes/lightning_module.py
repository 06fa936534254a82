"""SPO as a LightningModule: equal weights for all pairs under accumulation, TRL's log keys.

Tested with Lightning 2.6 and PyTorch 2.13. To change an existing LightningModule: the 6 lines of
`pair_loss`, and the 3 that keep the reference.

Pitfall: a reference that is a submodule is saved in every checkpoint. Here it is not a submodule,
so `on_fit_start` must move it to the device.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn

from spoloss import preference_metrics, spo_loss
from spoloss.torch import sequence_logps


class SPOModule(lightning.LightningModule):
    """A policy that trains on pairs. Batches have ids, mask, labels: chosen, then rejected rows.

    Lightning divides a loss by `accumulate_grad_batches` and averages over ranks. With the divisor
    `pairs_per_micro_batch`, the result is the mean over all pairs of a step with full
    micro-batches. A short micro-batch gives a smaller step, but all pairs have equal weights.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        *,
        pairs_per_micro_batch: int,
        beta: float,
        lr: float = 1e-6,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.__dict__["reference"] = reference.requires_grad_(False).eval()  # not a submodule
        self.pairs_per_micro_batch, self.beta, self.lr = pairs_per_micro_batch, beta, lr

    def on_fit_start(self) -> None:
        self.reference.to(self.device)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.pair_loss(batch, "train") / self.pairs_per_micro_batch

    def pair_loss(self, batch: Any, stage: str) -> Tensor:
        """The loss summed over the pairs of a batch."""
        logps = sequence_logps(self.policy(batch.ids, batch.mask).logits, batch.labels).chunk(2)
        with torch.no_grad():
            ref_logits = self.reference(batch.ids, batch.mask).logits
            ref_logps = sequence_logps(ref_logits, batch.labels).chunk(2)
        loss = spo_loss(*logps, *ref_logps, beta=self.beta, reduction="sum")
        pairs = len(logps[0])
        metrics = preference_metrics(*logps, *ref_logps, beta=self.beta) | {"loss": loss / pairs}
        named = {f"{stage}/{key}": value for key, value in metrics.items()}
        self.log_dict(named, batch_size=pairs)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=self.lr)


if __name__ == "__main__":
    import toy

    policy, reference = toy.models()
    module = SPOModule(policy, reference, pairs_per_micro_batch=3, beta=0.025, lr=1e-3)
    loader = torch.utils.data.DataLoader(toy.pairs(6), batch_size=3, collate_fn=toy.collate)
    trainer = lightning.Trainer(
        max_epochs=3, accumulate_grad_batches=2, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, loader)
    print(trainer.callback_metrics)
