"""SPO in trainers with a built-in loss: one line for each, which replaces the loss.

Tested against the call sites of these releases, not with whole runs of the trainers:

| trainer | release | where it calls its loss |
|---|---|---|
| OpenRLHF | 0.11.2 | openrlhf/trainer/dpo_trainer.py, lines 166 and 281 |
| LLaMA-Factory v0 | 0.9.5 | src/llamafactory/train/dpo/trainer.py, line 206 |
| LLaMA-Factory v1 | none (commit ff6d4d1) | src/llamafactory/v1/trainers/dpo_trainer.py, line 325 |
| open-instruct | 0.3.0 | open_instruct/dpo_utils.py, line 657 |

Divide the trainer's beta by 4, because SPO(beta) acts like DPO(4 * beta). Pitfall: options of the
replaced loss are silently ignored, such as label smoothing in all four and the IPO switch in
OpenRLHF. Leave them off. All four accumulate means of micro-batches.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from spoloss import spo_loss
from spoloss.torch import SPOLoss


def openrlhf(trainer: Any) -> None:
    """`trainer` is the DPOTrainer, before `fit`. --dpo.beta is SPO's: give a quarter of DPO's."""
    trainer.loss_fn = SPOLoss(trainer.beta, reduction="mean")


def llama_factory_v0(trainer_class: type) -> None:
    """`trainer_class` is CustomDPOTrainer. Run with `pref_loss: sigmoid`. `pref_beta` is SPO's."""
    trainer_class.dpo_loss = lambda self, *logps: SPOLoss(self.beta)(*logps)


def llama_factory_v1(dpo_trainer: ModuleType) -> None:
    """`dpo_trainer` is llamafactory.v1.trainers.dpo_trainer. Run with `pref_loss: sigmoid`."""
    dpo_trainer.compute_sigmoid_dpo_loss = lambda *logps, beta, **_: spo_loss(
        *logps, beta=beta, reduction="none"
    )


def open_instruct(dpo_utils: ModuleType) -> None:
    """`dpo_utils` is open_instruct.dpo_utils. Run with `loss_type: dpo` (dpo_norm averages)."""
    dpo_utils.dpo_loss = lambda *logps, beta, **_: SPOLoss(beta)(*logps)
