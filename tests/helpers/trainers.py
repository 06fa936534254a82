"""What the tests of trainers share: arguments of one step, adapters, batches, TRL's end of text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from helpers.recipes_oracle import toy


def trainer_arguments(size: int) -> dict[str, Any]:
    """One optimizer step of two micro-batches, for `TrainingArguments` and `DPOConfig`."""
    step = {"per_device_train_batch_size": size, "max_steps": 1, "max_grad_norm": 0.0}
    return {**toy.TRAINER, **step, "disable_tqdm": True, "use_cpu": True}


LIGHTNING: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "accumulate_grad_batches": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""The same for `lightning.Trainer`."""


def lora(**options: Any) -> Any:
    """Not the initial B = 0: base and adapter must differ, for the reference to matter."""
    from peft import LoraConfig

    targets = {"target_modules": ["q_proj", "v_proj"], **options}
    return LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **targets)


def with_end(pairs: Iterable[Any]) -> list[Any]:
    """The pairs as TRL sees them: it ends each completion."""
    return [toy.Pair(prompt, [*chosen, 1], [*rejected, 1]) for prompt, chosen, rejected in pairs]
