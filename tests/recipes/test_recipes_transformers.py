"""The recipes for Transformers' Trainer make the gradient that `exact_step` makes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from helpers.recipes_oracle import (
    BETA,
    EVEN,
    PAIRS,
    UNEVEN,
    Recorder,
    assert_step,
    exact_step,
    load,
    models,
    relative_error,
    run_script,
    toy,
)
from helpers.trainers import trainer_arguments

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


def arguments(size: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(**trainer_arguments(size), remove_unused_columns=False, **options)


def subclass(size: int, *, exact: bool = True, **options: Any) -> Trainer:
    policy, reference = models()
    recipe = load("transformers_trainer")
    return (recipe.ExactSPOTrainer if exact else recipe.SPOTrainer)(
        policy,
        arguments(size, **options),
        lambda pairs: toy.named(pairs, "input_ids", "attention_mask", "labels"),
        PAIRS,
        PAIRS,
        optimizers=(Recorder(policy), None),
        reference=reference,
        beta=BETA,
    )


def loss_func(size: int, **options: Any) -> Trainer:
    recipe = load("transformers_loss_func")
    model = recipe.PolicyAndReference(*models())
    names = ("input_ids", "attention_mask", "targets")
    return Trainer(
        model,
        arguments(size, label_names=["labels"], **options),
        lambda pairs: recipe.with_labels(toy.named(pairs, *names)),
        PAIRS,
        PAIRS,
        optimizers=(Recorder(model.policy), None),
        compute_loss_func=recipe.mean_over_step,
    )


@pytest.mark.parametrize(
    "evaluated_first", [{}, {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}]
)
@pytest.mark.parametrize("size", [EVEN, UNEVEN])
@pytest.mark.parametrize("make", [subclass, loss_func])
def test_trainer(make, size, evaluated_first) -> None:
    """Gradient, logged loss and evaluation are those of the mean over all pairs."""
    trainer = make(size, per_device_eval_batch_size=6, **evaluated_first)
    recorder, exact = trainer.optimizer, exact_step(*models(), PAIRS)
    trainer.train()
    (grads,) = recorder.steps
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert_step(logged[0], grads, exact)
    reference = trainer.reference if make is subclass else trainer.model.reference
    assert not reference.training
    assert trainer.evaluate()["eval_loss"] == pytest.approx(exact[0], rel=1e-6)


@pytest.mark.parametrize(("size", "error"), [(EVEN, 0.0), (UNEVEN, 0.4)])
def test_least_code_is_a_mean_of_means(size, error) -> None:
    trainer = subclass(size, exact=False)
    recorder = trainer.optimizer
    trainer.train()
    (grads,) = recorder.steps
    # The order of the pairs is the framework's to choose.
    expected = pytest.approx(error, abs=0.05 if error else 1e-6)
    assert relative_error(grads, exact_step(*models(), PAIRS)[1]) == expected


@pytest.mark.parametrize("name", ["transformers_trainer", "transformers_loss_func"])
def test_recipe_runs_as_a_script(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(run_script(name)) >= 3
    assert not list(tmp_path.iterdir())
