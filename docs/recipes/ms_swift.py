"""SPO as `--loss_type spo` of ms-swift: a plugin, which `--external_plugins` imports.

Tested with ms-swift 4.6, TRL 0.29 and Transformers 5.16. To change an existing DPO run:

    swift rlhf --rlhf_type dpo ... --external_plugins ms_swift.py --loss_type spo --beta 0.025

Divide `--beta` by 4, because SPO(beta) acts like DPO(4 * beta). SPO may also be one of several
losses, as in `--loss_type spo sft --loss_weights 1 0.1`. The log keys are ms-swift's own.

Pitfall: ms-swift accepts every `--loss_type`, and fails at the first step if it does not know it.
SPO raises a ValueError for label smoothing, `reference_free` and an f-divergence, which it does
not compute. As in ms-swift, a step is the mean over its micro-batches. `megatron rlhf` has a
trainer of its own, which this plugin does not change.
"""

from __future__ import annotations

from typing import Any

from swift.rlhf_trainers import DPOTrainer
from swift.trainers import TrainerFactory

from spoloss.torch import SPOLoss


class SPOTrainer(DPOTrainer):
    """ms-swift's DPOTrainer, which also knows the loss type "spo"."""

    def dpo_loss(self, *arguments: Any) -> tuple[Any, ...]:
        *logps, loss_type, _model_output = arguments
        if loss_type != "spo":
            return super().dpo_loss(*arguments)
        if self.label_smoothing or self.reference_free or self.f_divergence_type != "reverse_kl":
            raise ValueError("SPO takes no label_smoothing, reference_free or f_divergence_type")
        return SPOLoss(self.beta)(*logps)


TrainerFactory.TRAINER_MAPPING["dpo"] = f"{__name__}.SPOTrainer"
