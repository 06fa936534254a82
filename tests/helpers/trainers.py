"""What the tests of trainers share: arguments of one step, adapters, batches, TRL's end of text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.recipes_oracle import toy


def trainer_arguments(folder: Path, size: int) -> dict[str, Any]:
    """One optimizer step of two micro-batches, for `TrainingArguments` and `DPOConfig`."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def lightning_arguments(folder: Path) -> dict[str, Any]:
    """The same on CPUs for `lightning.Trainer`, with no files."""
    return {
        "accelerator": "cpu",
        "accumulate_grad_batches": 2,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def lora(**options: Any) -> Any:
    """Not the initial B = 0: base and adapter must differ, for the reference to matter."""
    from peft import LoraConfig

    targets = {"target_modules": ["q_proj", "v_proj"], **options}
    return LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **targets)


def with_end(pairs: Iterable[Any]) -> list[Any]:
    """The pairs as TRL sees them: it ends each completion."""
    return [toy.Pair(prompt, [*chosen, 1], [*rejected, 1]) for prompt, chosen, rejected in pairs]
