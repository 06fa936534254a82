"""SPO in TRL's DPOTrainer: reference model, precomputed references, LoRA, and TRL's log keys.

Tested with TRL 1.16, Transformers 5.23 and PEFT 0.21. It runs unchanged on TRL 1.0 and 1.8. To
change an existing run: use this class instead of `DPOTrainer`, and keep `DPOConfig(beta=...)`.

Pitfall: `DPOConfig(loss_type="spo")` is accepted but fails at the first step. TRL has no registry
of losses, so this class overrides `compute_loss`. It does not have what TRL adds to its own losses
there: f-divergences, WPO's weights, LD-DPO, auxiliary losses, logs of entropy and of logits. As in
TRL, a step is the mean over its micro-batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from spoloss import preference_metrics, spo_loss
from spoloss.torch import sequence_logps

NOT_OF_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


class SPOTrainer(DPOTrainer):
    """DPOTrainer with SPO as its loss."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        model_inputs = {key: inputs[key] for key in inputs.keys() - NOT_OF_THE_MODEL}
        outputs = model(**model_inputs, use_cache=False)
        policy_logps = sequence_logps(outputs.logits, labels).chunk(2)
        if "ref_chosen_logps" in inputs:
            ref_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_logps = self.reference_logps(model, model_inputs, labels)
        mode = "train" if self.model.training else "eval"
        metrics = preference_metrics(*policy_logps, *ref_logps, beta=self.beta)
        for key, value in metrics.items():
            self._metrics[mode][key].append(self.accelerator.gather(value).mean().item())
        loss = spo_loss(*policy_logps, *ref_logps, beta=self.beta)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def reference_logps(
        self, model: nn.Module, model_inputs: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, ...]:
        """From the reference model, else from the policy's base model or its initial adapter."""
        if self.ref_model is not None:
            logits = self.ref_model(**model_inputs, use_cache=False).logits
        else:
            policy = self.accelerator.unwrap_model(model)
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                logits = model(**model_inputs, use_cache=False).logits
        return sequence_logps(logits, labels).chunk(2)


if __name__ == "__main__":
    import tempfile

    import toy
    from datasets import Dataset
    from trl import DPOConfig

    policy, reference = toy.models()
    with tempfile.TemporaryDirectory() as directory:
        trainer = SPOTrainer(
            policy,
            reference,
            DPOConfig(
                directory, beta=0.1, max_steps=3, logging_steps=1, save_strategy="no", bf16=False
            ),
            train_dataset=Dataset.from_list(toy.texts(toy.pairs(6))),
            processing_class=toy.tokenizer(),
        )
        trainer.train()
