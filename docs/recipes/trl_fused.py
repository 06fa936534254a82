"""SPO in TRL's DPOTrainer with the fused head, without the policy's logits.

Tested with TRL 1.16, Transformers 5.23, PEFT 0.21 and DeepSpeed 0.19.8. To change an existing run:
use this class instead of `DPOTrainer`, and keep `DPOConfig(beta=...)`.

Trainers wrap the model in their engine, so the loss must be computed inside the model's forward.
There, ZeRO-3 and FSDP2 have the head's whole weight, and DDP detects that it is used.
`add_head_call` adds an argument to the forward for that, as TRL's own fused head does. A closure
passes the references to the loss. As arguments of the forward, FSDP2 would cast them to bfloat16
under mixed precision, which has steps of 2 near -300.

Pitfalls: as in TRL, a step is the mean of its micro-batches' means and of the ranks' means. The
loss uses only the head's weight, so `head_options` passes on a soft-cap and scales, and raises an
error for a bias. This class does not have what TRL adds to its own losses: f-divergences, WPO's
weights, LD-DPO, auxiliary losses, logs of entropy and logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from trl import DPOTrainer

from spoloss import preference_metrics
from spoloss.torch import LinearPairLoss, linear_spo_loss

NOT_OF_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


def add_head_call(model: Any) -> None:
    """Makes `model(..., head_call=f)` return f(hidden states, head's weight) from its forward."""
    forward = model.forward

    @functools.wraps(forward)  # `generate` reads the signature
    def forward_or_call(
        *args: Any, head_call: Callable[[Tensor, Tensor], Any] | None = None, **kwargs: Any
    ) -> Any:
        if head_call is None:
            return forward(*args, **kwargs)
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        return head_call(hidden, model.get_output_embeddings().weight)

    model.forward = forward_or_call


def head_options(model: Any) -> dict[str, Any]:
    """The soft-cap and scales of the model's configuration, as arguments of the fused loss."""
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError("the head has a bias: pass it to linear_spo_loss as bias=")
    config = model.config.get_text_config()
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Falcon-H1, ...
    scale = next((s for s in (getattr(config, n, None) for n in names) if s is not None), 1.0)
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite, MiniCPM3
    if config.model_type == "hyperclovax":  # multiplies by logits_scaling instead
        divisor = 1.0 / divisor
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return {"logit_scale": scale / divisor, "softcap": softcap}


class SPOTrainer(DPOTrainer):
    """DPOTrainer with SPO as its loss, from the policy's hidden states."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        policy = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        add_head_call(policy)
        self.head_options = head_options(policy)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        if "ref_chosen_logps" in inputs:
            ref_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:  # with TRL's own head: the reference model, the policy's base or its first adapter
            reference = model if self.ref_model is None else self.ref_model
            ref_logps = self.compute_ref_log_probs(reference, inputs)

        def pair_loss(hidden: Tensor, weight: Tensor) -> LinearPairLoss:
            sides = *hidden.chunk(2), weight, *labels.chunk(2), *ref_logps
            return linear_spo_loss(*sides, beta=self.beta, **self.head_options)

        model_inputs = {key: inputs[key] for key in inputs.keys() - NOT_OF_THE_MODEL}
        loss, *policy_logps = model(**model_inputs, use_cache=False, head_call=pair_loss)
        mode = "train" if self.model.training else "eval"
        metrics = preference_metrics(*policy_logps, *ref_logps, beta=self.beta)
        for key, value in metrics.items():
            self._metrics[mode][key].append(self.accelerator.gather(value).mean().item())
        return (loss, model(**model_inputs, use_cache=False)) if return_outputs else loss


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
