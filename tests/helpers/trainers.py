"""What the tests of Trainer and TRL share: arguments of one step, batches, TRL's end of text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

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


def named(pairs: list[Any], *names: str) -> dict[str, Tensor]:
    """A batch under the names that Trainer passes to the model."""
    return dict(zip(names, toy.collate(pairs), strict=True))


def with_end(pairs: Iterable[Any]) -> list[Any]:
    """The pairs as TRL sees them: it ends each completion."""
    return [toy.Pair(prompt, [*chosen, 1], [*rejected, 1]) for prompt, chosen, rejected in pairs]
