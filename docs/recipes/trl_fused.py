"""SPO in TRL's DPOTrainer with the fused head, without the policy's logits.

Tested with TRL 1.16, Transformers 5.23, PEFT 0.21 and DeepSpeed 0.19.8. To change an existing run:
use this class instead of `DPOTrainer`, and divide `DPOConfig(beta=...)` by 4, because SPO(beta)
acts like DPO(4 * beta). The columns `weights` and `reward_gap` of a dataset, if there are any, hold
a number for each pair. `linear_below` is an argument of the class.

Trainers wrap the model in their engine, so the loss must be computed inside the model's forward.
There, ZeRO-3 and FSDP2 have the head's whole weight, and DDP detects that it is used.
`add_head_call` adds an argument to the forward for that, as TRL's own fused head does. A closure
passes the references to the loss. As arguments of the forward, FSDP2 would cast them to bfloat16
under mixed precision, which has steps of 2 near -300.

Pitfalls: as in TRL, a step is the mean of its micro-batches' means and of the ranks' means. The
weights must be whole when the trainer is made, because `head_of` compares them with the model's
logits: load the model before you make a DPOConfig with ZeRO-3. This class does not compute what TRL
adds to its own losses, and raises a ValueError for options such as label smoothing, WPO's weights
or LD-DPO. It does not log entropy and logits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

from spoloss import preference_metrics
from spoloss.torch import Completions, LinearPairLoss, head_of, linear_spo_loss

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


def add_head_call(model: Any) -> None:
    """Makes `model(..., head_call=f)` return f(hidden states, lm_head) from its forward."""
    forward = model.forward

    @functools.wraps(forward)  # `generate` reads the signature
    def forward_or_call(
        *args: Any, head_call: Callable[[Tensor, nn.Module], Any] | None = None, **kwargs: Any
    ) -> Any:
        if head_call is None:
            return forward(*args, **kwargs)
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        return head_call(hidden, model.get_output_embeddings())

    model.forward = forward_or_call


class SPOTrainer(DPOTrainer):
    """DPOTrainer with SPO as its loss, from the policy's hidden states."""

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
        self.head = replace(head_of(self.model), weight=None, bias=None)  # read in each forward
        is_peft = hasattr(self.model, "peft_config")
        add_head_call(self.model.get_base_model() if is_peft else self.model)
        self.data_collator = functools.partial(collate_with_columns, self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:  # the columns that Trainer does not drop
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys((*self._signature_columns, *PER_PAIR))]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        if "ref_chosen_logps" in inputs:
            ref_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:  # with TRL's own head: the reference model, the policy's base or its first adapter
            reference = model if self.ref_model is None else self.ref_model
            of_trl = {key: inputs[key] for key in inputs.keys() - set(PER_PAIR)}
            ref_logps = self.compute_ref_log_probs(reference, of_trl)
        options = {"beta": self.beta, **{key: inputs[key] for key in PER_PAIR if key in inputs}}

        def pair_loss(hidden: Tensor, lm_head: nn.Module) -> LinearPairLoss:
            head = replace(self.head, weight=lm_head.weight, bias=lm_head.bias)
            sides = *map(Completions, hidden.chunk(2), labels.chunk(2)), *ref_logps
            return linear_spo_loss(head, *sides, linear_below=self.linear_below, **options)

        model_inputs = {key: inputs[key] for key in inputs.keys() - NOT_OF_THE_MODEL}
        loss, *policy_logps = model(**model_inputs, use_cache=False, head_call=pair_loss)
        mode = "train" if self.model.training else "eval"
        for key, value in preference_metrics(*policy_logps, *ref_logps, **options).items():
            self._metrics[mode][key].append(self.accelerator.gather(value).mean().item())
        return (loss, model(**model_inputs, use_cache=False)) if return_outputs else loss


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
