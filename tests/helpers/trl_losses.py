"""TRL's own numbers for a loss: its trainers, built by its constructors, run its own code."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn

from helpers.recipes_oracle import toy
from helpers.trainers import trainer_arguments

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Numbers:
    """Losses of some pairs, [B], and their gradients with respect to the policy's two sides."""

    logps: tuple[Tensor, ...]
    beta: float
    losses: Tensor
    by_chosen: Tensor
    by_rejected: Tensor


def dpo_trainer(
    folder: Path, beta: float, *, loss_type: str = "sigmoid", **options: Any
) -> trl.DPOTrainer:
    """DPOTrainer on the models and pairs of toy.py, in float64."""
    arguments = trainer_arguments(6) | {"output_dir": str(folder), "loss_type": [loss_type]}
    return trl.DPOTrainer(
        *toy.models(dtype=torch.float64),
        trl.DPOConfig(**arguments, **options, beta=beta, bf16=False),
        train_dataset=Dataset.from_list(toy.texts(toy.pairs(6))),
        processing_class=toy.tokenizer(),
    )


def cpo_trainer(folder: Path, beta: float, **options: Any) -> Any:
    """CPOTrainer with SimPO's loss and nothing beside it, on the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TRL may change it
        from trl.experimental.cpo import CPOConfig, CPOTrainer
    arguments = trainer_arguments(6) | {"output_dir": str(folder), "loss_type": "simpo"}
    arguments |= {"cpo_alpha": 0.0, "beta": beta, "bf16": False, "remove_unused_columns": False}
    return CPOTrainer(
        toy.models(dtype=torch.float64)[0],
        CPOConfig(**arguments, **options),
        train_dataset=Dataset.from_list(toy.texts(toy.pairs(6))),
        processing_class=toy.tokenizer(),
    )


def first_batch(trainer: Any) -> Batch:
    """All six pairs as the trainer's own collator pads them."""
    return next(iter(trainer.get_train_dataloader()))


def dpo_numbers(trainer: trl.DPOTrainer, logps: tuple[Tensor, ...]) -> Numbers:
    """DPOTrainer's loss of each pair, alone in its batch, at log-probabilities of our choice."""
    chosen, rejected = (side.clone().requires_grad_() for side in logps[:2])
    batch = {
        "input_ids": torch.tensor([[3, 4]] * 2),
        "attention_mask": torch.ones(2, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * 2),
    }
    losses = []
    # TRL puts EXO's label smoothing into a tensor of the default dtype before it takes the log.
    torch.set_default_dtype(torch.float64)
    try:
        for c, r, ref_c, ref_r in zip(chosen, rejected, *logps[2:], strict=True):
            trainer.ref_model = _Given(ref_c, ref_r)
            losses.append(trainer.compute_loss(_Given(c, r), batch))
    finally:
        torch.set_default_dtype(torch.float32)
    return numbers_of(logps, trainer.beta, torch.stack(losses), (chosen, rejected))


def cpo_numbers(trainer: Any, logps: tuple[Tensor, ...]) -> Numbers:
    """CPOTrainer's loss of each pair at average log-probabilities of our choice."""
    sides = [side.clone().requires_grad_() for side in logps[:2]]
    losses, *_ = trainer.cpo_loss(*sides)
    return numbers_of(logps, trainer.beta, losses, sides)


def orpo_numbers(logps: tuple[Tensor, ...], beta: float) -> Numbers:
    """ORPOTrainer's odds ratio at average log-probabilities of our choice, with its sign mended.

    TRL's function returns log s(.), which its trainer subtracts from the NLL.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TRL may change it
        from trl.experimental.orpo import ORPOTrainer
    sides = [side.clone().requires_grad_() for side in logps[:2]]
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, *sides)
    return numbers_of(logps, beta, -losses, sides)


class _Given(nn.Module):
    """In a model's place: completions of one token with the log-probabilities given."""

    def __init__(self, chosen: Tensor, rejected: Tensor) -> None:
        super().__init__()
        self.logps = torch.stack([chosen, rejected])[:, None]

    def forward(self, **_: Any) -> SimpleNamespace:
        nothing = torch.zeros(2, 1)
        return SimpleNamespace(
            log_probs=self.logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )


def numbers_of(logps: tuple[Tensor, ...], beta: float, losses: Tensor, sides: Any) -> Numbers:
    """The losses of some pairs, and their gradients with respect to the two sides."""
    grads = torch.autograd.grad(losses.sum(), sides)
    return Numbers(tuple(array.detach() for array in logps), beta, losses.detach(), *grads)
