"""SPO in TRL's DPOTrainer: reference model, precomputed references, LoRA, and TRL's log keys.

Tested with TRL 1.16, Transformers 5.23 and PEFT 0.21. To change an existing run: use this class
instead of `DPOTrainer`, and divide `DPOConfig(beta=...)` by 4, because SPO(beta) acts like
DPO(4 * beta). The columns `weights` and `reward_gap` of a dataset, if there are any, hold a number
for each pair. `linear_below` is an argument of the class.

Pitfall: `DPOConfig(loss_type="spo")` is accepted but fails at the first step. TRL has no registry
of losses, so this class overrides `compute_loss`. It does not compute what TRL adds to its own
losses there, and raises a ValueError for options such as label smoothing, WPO's weights or LD-DPO.
It does not log entropy and logits. As in TRL, a step is the mean over its micro-batches, and the
reference of a model that already has an adapter is that adapter's start, not the bare model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from spoloss import preference_metrics, spo_loss
from spoloss.torch import sequence_logps

PER_PAIR = ("weights", "reward_gap")
NOT_OF_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", *PER_PAIR}
OF_TRLS_LOSSES = (
    *("loss_type", "loss_weights", "label_smoothing", "use_weighting", "ld_alpha", "discopop_tau"),
    *("f_divergence_type", "f_alpha_divergence_coef"),
)


def refuse_other_losses(config: DPOConfig) -> None:
    """Raises a ValueError for options that change TRL's own losses, which are not computed here."""
    for field in dataclasses.fields(config):
        if field.name in OF_TRLS_LOSSES:
            made = field.default is dataclasses.MISSING
            default = field.default_factory() if made else field.default
            value = getattr(config, field.name)
            if value != default:
                raise ValueError(
                    f"SPOTrainer computes only SPO: {field.name} must be {default!r}, got {value!r}"
                )


def collate_with_columns(collate: Callable[..., Any], examples: list[Any]) -> dict[str, Tensor]:
    """Adds the dataset's columns of a number per pair to the batch of TRL's collator."""
    columns = [name for name in PER_PAIR if name in examples[0]]
    numbers = {name: torch.tensor([float(row[name]) for row in examples]) for name in columns}
    return {**collate(examples), **numbers}


class SPOTrainer(DPOTrainer):
    """DPOTrainer with SPO as its loss."""

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *more: Any,
        linear_below: float | None = None,
        **options: Any,
    ) -> None:
        if args is not None:
            refuse_other_losses(args)
        super().__init__(model, ref_model, args, *more, **options)
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError("SPOTrainer has no auxiliary loss: set router_aux_loss_coef=0.0")
        self.linear_below = linear_below
        self.data_collator = functools.partial(collate_with_columns, self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:  # the columns that Trainer does not drop
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys((*self._signature_columns, *PER_PAIR))]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        model_inputs = {key: inputs[key] for key in inputs.keys() - NOT_OF_THE_MODEL}
        outputs = model(**model_inputs, use_cache=False)
        logps = sequence_logps(outputs.logits, labels).chunk(2)
        if "ref_chosen_logps" in inputs:
            logps += inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            logps += self.reference_logps(model, model_inputs, labels)
        options = {"beta": self.beta, **{key: inputs[key] for key in PER_PAIR if key in inputs}}
        mode = "train" if self.model.training else "eval"
        for key, value in preference_metrics(*logps, **options).items():
            self._metrics[mode][key].append(self.accelerator.gather(value).mean().item())
        loss = spo_loss(*logps, linear_below=self.linear_below, **options)
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
    import toy
    from datasets import Dataset

    trainer = SPOTrainer(
        *toy.models(),
        DPOConfig(**toy.TRAINER, beta=0.1 / 4, bf16=False),  # SPO(0.025), from DPO(0.1)
        train_dataset=Dataset.from_list(toy.texts(toy.pairs(6))),
        processing_class=toy.tokenizer(),
    )
    trainer.train()
