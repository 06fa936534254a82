"""What test_recipes.py runs in each of two processes: the trainers' recipes on uneven ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from helpers.recipes_oracle import Grads, Recorder, load, toy

BETA = 0.1
PAIRS = toy.pairs(10)
MICRO_BATCHES = {0: [PAIRS[:4], PAIRS[4:6]], 1: [PAIRS[6:9], PAIRS[9:]]}

Step = tuple[float, Grads]


def work(rank: int, folder: Path) -> tuple[list[float], list[Grads]]:
    """The losses and gradients of one optimiser step by each recipe, on this rank."""
    # What torchrun sets tells Accelerate its place; it takes the group that is there, whose address
    # it asks for nevertheless.
    world = str(dist.get_world_size())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    steps = [by_accelerate(), by_trainer(folder), by_loss_func(folder)]
    losses, grads = zip(*steps, strict=True)
    return list(losses), list(grads)


def by_accelerate() -> Step:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == dist.get_world_size()
    policy, reference = toy.models(dtype=torch.float64)
    recorder = Recorder(policy)
    policy, optimizer = accelerator.prepare(policy, recorder)
    loader = [toy.collate(pairs) for pairs in MICRO_BATCHES[accelerator.process_index]]
    train = load("accelerate_loop").train
    (loss,) = train(policy, reference, loader, optimizer, accelerator, micro_batches=2, beta=BETA)
    return loss, recorder.steps[0]


def by_trainer(folder: Path) -> Step:
    policy, reference = toy.models(dtype=torch.float64)
    recorder = Recorder(policy)
    trainer = load("transformers_trainer").ExactSPOTrainer(
        policy,
        arguments(folder),
        lambda pairs: named(pairs, "input_ids", "attention_mask", "labels"),
        PAIRS,
        optimizers=(recorder, None),
        reference=reference,
        beta=BETA,
    )
    return step_of(trainer, recorder)


def by_loss_func(folder: Path) -> Step:
    recipe = load("transformers_loss_func")
    model = recipe.PolicyAndReference(*toy.models(dtype=torch.float64))
    recorder = Recorder(model.policy)
    trainer = Trainer(
        model,
        arguments(folder, label_names=["labels"]),
        lambda pairs: {
            **named(pairs, "input_ids", "attention_mask", "targets"),
            "labels": torch.zeros(len(pairs)),
        },
        PAIRS,
        optimizers=(recorder, None),
        compute_loss_func=recipe.mean_over_step,
    )
    return step_of(trainer, recorder)


def trainer_arguments(directory: Path, size: int) -> dict[str, Any]:
    """One optimiser step of two micro-batches, for `TrainingArguments` and `DPOConfig`."""
    return {
        "output_dir": str(directory),
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


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Three pairs to a micro-batch: the ten are uneven over two ranks."""
    return TrainingArguments(
        **trainer_arguments(folder, size=3),
        remove_unused_columns=False,
        accelerator_config={"even_batches": False},
        **options,
    )


def named(pairs: list[Any], *names: str) -> dict[str, torch.Tensor]:
    return dict(zip(names, toy.collate(pairs), strict=True))


def step_of(trainer: Trainer, recorder: Recorder) -> Step:
    trainer.train()
    return trainer.state.log_history[0]["loss"], recorder.steps[0]
