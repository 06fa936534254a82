"""The recipes for Transformers' Trainer make the gradient that `exact_step` makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from helpers.recipes_oracle import (
    BETA,
    Grads,
    Recorder,
    exact_step,
    load,
    models,
    relative_error,
    run_script,
    toy,
)
from helpers.trainers import named, trainer_arguments

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")

EXACT = 1e-6
PAIRS = toy.pairs(6)
EVEN, UNEVEN = 3, 4  # pairs of a micro-batch: 3 + 3, or 4 + 2
# What a mean of means is off by on 4 + 2 of PAIRS, whose order is the framework's to choose.
MEAN_OF_MEANS = pytest.approx(0.4, abs=0.05)
NAMES = ("input_ids", "attention_mask", "labels")


def arguments(folder: Path, size: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **trainer_arguments(folder, size), remove_unused_columns=False, **options
    )


def make_trainer(trainer_class: type, folder: Path, size: int, **options: Any) -> Any:
    policy, reference = models()
    return trainer_class(
        policy,
        arguments(folder, size, **options),
        lambda pairs: named(pairs, *NAMES),
        PAIRS,
        PAIRS,
        optimizers=(Recorder(policy), None),
        reference=reference,
        beta=BETA,
    )


def train(trainer: Any) -> Grads:
    recorder = trainer.optimizer
    trainer.train()
    (grads,) = recorder.steps
    return grads


def assert_exact(trainer: Trainer) -> None:
    """Gradient, logged loss and evaluation are those of the mean over all pairs."""
    loss, exact = exact_step(*models(), PAIRS)
    assert relative_error(train(trainer), exact) < EXACT
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged[0] == pytest.approx(loss, rel=EXACT)
    trainer.args.per_device_eval_batch_size = len(PAIRS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=EXACT)


@pytest.mark.parametrize("size", [EVEN, UNEVEN])
def test_exact_over_uneven_micro_batches(tmp_path, size) -> None:
    assert_exact(make_trainer(load("transformers_trainer").ExactSPOTrainer, tmp_path, size))


def test_an_evaluation_may_come_before_the_first_step(tmp_path) -> None:
    trainer = make_trainer(
        load("transformers_trainer").ExactSPOTrainer,
        tmp_path,
        UNEVEN,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=6,
    )
    loss, _ = exact_step(*models(), PAIRS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=EXACT)
    assert_exact(trainer)


def test_least_code_is_a_mean_of_means(tmp_path) -> None:
    recipe = load("transformers_trainer")
    _, exact = exact_step(*models(), PAIRS)
    even = train(make_trainer(recipe.SPOTrainer, tmp_path, EVEN))
    assert relative_error(even, exact) < EXACT
    uneven = train(make_trainer(recipe.SPOTrainer, tmp_path, UNEVEN))
    assert relative_error(uneven, exact) == MEAN_OF_MEANS


def test_without_the_attribute_a_step_is_twice_too_large(tmp_path) -> None:
    class Forgotten(load("transformers_trainer").SPOTrainer):
        loss_is_scaled_for_ga = None

    _, exact = exact_step(*models(), PAIRS)
    grads = train(make_trainer(Forgotten, tmp_path, EVEN))
    assert relative_error(grads, {name: 2.0 * grad for name, grad in exact.items()}) < EXACT


def loss_func_trainer(
    folder: Path, size: int, labels_of: Callable[[dict[str, Tensor]], Tensor]
) -> Trainer:
    recipe = load("transformers_loss_func")
    model = recipe.PolicyAndReference(*models())

    def collate(pairs: list[Any]) -> dict[str, Tensor]:
        batch = named(pairs, "input_ids", "attention_mask", "targets")
        return {**batch, "labels": labels_of(batch)}

    return Trainer(
        model,
        arguments(folder, size, label_names=["labels"]),
        collate,
        PAIRS,
        PAIRS,
        optimizers=(Recorder(model.policy), None),
        compute_loss_func=recipe.mean_over_step,
    )


@pytest.mark.parametrize("size", [EVEN, UNEVEN])
def test_loss_func(tmp_path, size) -> None:
    trainer = loss_func_trainer(tmp_path, size, lambda b: torch.zeros(len(b["targets"]) // 2))
    assert_exact(trainer)
    assert not trainer.model.reference.training


def test_loss_func_counts_tokens_if_given_their_labels(tmp_path) -> None:
    _, exact = exact_step(*models(), PAIRS)
    grads = train(loss_func_trainer(tmp_path, EVEN, lambda batch: batch["targets"]))
    assert relative_error(grads, exact) > 0.5


@pytest.mark.parametrize("name", ["transformers_trainer", "transformers_loss_func"])
def test_recipe_runs_as_a_script(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(run_script(name)) >= 3
    assert not list(tmp_path.iterdir())
