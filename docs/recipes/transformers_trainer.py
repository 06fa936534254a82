"""SPO in Transformers' Trainer: with the least code, and exact over uneven micro-batches and ranks.

Tested with Transformers 5.23 and PyTorch 2.13. To change an existing run: this class and
`reference=`. A batch has input_ids, attention_mask and labels, with all chosen rows first.

Pitfall: if a model's forward accepts `**kwargs`, Trainer assumes that its loss is already divided.
Without `loss_is_scaled_for_ga = False`, accumulation over K micro-batches then silently makes the
gradient K times too large. (Before Transformers 5.19, set `self.model_accepts_loss_kwargs = False`
in `__init__`.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from spoloss import spo_loss
from spoloss.torch import sequence_logps


class SPOTrainer(Trainer):
    """A step's gradient is the mean over its micro-batches of the mean over their pairs."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, reference: nn.Module, beta: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference, self.beta = reference.to(self.args.device).eval(), beta

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        labels = inputs.pop("labels")  # with labels, the model would compute its own loss
        outputs = model(**inputs)
        chosen, rejected = sequence_logps(outputs.logits, labels).chunk(2)
        with torch.no_grad():
            ref_logps = sequence_logps(self.reference(**inputs).logits, labels)
        loss = spo_loss(chosen, rejected, *ref_logps.chunk(2), beta=self.beta)
        return (loss, outputs) if return_outputs else loss


class ExactSPOTrainer(SPOTrainer):
    """A step's gradient is the mean over its pairs from all micro-batches and ranks."""

    loss_is_scaled_for_ga = True

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Tensor]], Any]:
        batches, items = super().get_batch_samples(*args)
        pairs = torch.tensor(sum(len(batch["labels"]) // 2 for batch in batches))
        self.pairs_in_step = self.accelerator.gather(pairs.to(self.args.device)).sum().item()
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        pairs = len(inputs["labels"]) // 2
        mean = super().compute_loss(model, inputs, *args, **kwargs)
        if not model.training:  # an evaluation is no part of a step, and may come before the first
            return mean
        # DDP and FSDP average over ranks: times their number is the sum.
        return mean * (pairs * self.accelerator.num_processes / self.pairs_in_step)


if __name__ == "__main__":
    import toy
    from transformers import TrainingArguments

    # Trainer would drop keys that forward does not name.
    arguments = TrainingArguments(**toy.TRAINER, remove_unused_columns=False)
    policy, reference = toy.models()
    for trainer_class in (SPOTrainer, ExactSPOTrainer):
        trainer_class(
            policy,
            arguments,
            lambda pairs: toy.named(pairs, "input_ids", "attention_mask", "labels"),
            toy.pairs(6),
            reference=reference,
            beta=0.025,
        ).train()
