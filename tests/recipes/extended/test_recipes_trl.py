"""The recipes for TRL make the gradient that `exact_step` makes, and refuse other losses."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from helpers.recipes_oracle import (
    BETA,
    EVEN,
    PAIRS,
    UNEVEN,
    Grads,
    Recorder,
    exact_step,
    load,
    models,
    relative_error,
    toy,
)
from helpers.trainers import lora, trainer_arguments, with_end

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_accelerate"),
    # TRL 1.16 asks for gradient checkpointing by names that Transformers 5.23 will drop.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_.*)?` is:FutureWarning"),
]

EXACT = 1e-6
# TRL holds the reference's log-probabilities, here two of about -33, in float32 (steps of 4e-6).
FLOAT32_REFERENCE = {"rel": EXACT, "abs": BETA * 4e-6}
ENDED = with_end(PAIRS)
FORMS = ("trl_dpo", "trl_fused")


@pytest.fixture(params=FORMS)
def recipe(request) -> type:
    """SPOTrainer of either recipe."""
    return load(request.param).SPOTrainer


def make_trainer(
    trainer_class: type,
    *models: nn.Module,
    size: int = EVEN,
    config: dict[str, Any] | None = None,
    columns: dict[str, list[float]] | None = None,
    **options: Any,
) -> Any:
    data = Dataset.from_list(toy.texts(PAIRS))
    for name, values in (columns or {}).items():
        data = data.add_column(name, values)
    settings = {**trainer_arguments(size), "beta": BETA, "bf16": False, **(config or {})}
    return trainer_class(
        *models,
        args=trl.DPOConfig(**settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=toy.tokenizer(),
        **options,
    )


def train(trainer: Any) -> Grads:
    """One step of TRL; the adapter of a LoRA run is moved off its start first."""
    move_adapter(trainer.model)
    recorder = trainer.optimizer = Recorder(trainer.model)
    trainer.train()
    (grads,) = recorder.steps
    return grads


def move_adapter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


WEIGHTS, GAPS = [0.0, 1.0, 2.0, 0.5, 1.0, 3.0], [1.0, 0.5, 2.0, 1.0, 0.25, 1.0]
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of a trainer, of the oracle
    "reference": ({}, {}),
    "precomputed reference": ({"config": {"precompute_ref_log_probs": True}}, {}),
    "weights, gaps and a tangent": (
        {"columns": {"weights": WEIGHTS, "reward_gap": GAPS}, "linear_below": 0.05},
        {"beta": [BETA / gap for gap in GAPS], "weights": WEIGHTS, "linear_below": 0.05},
    ),
}


@pytest.mark.parametrize(("options", "exact_options"), STEPS.values(), ids=STEPS)
def test_a_reference_model(recipe, options, exact_options) -> None:
    loss, exact = exact_step(*models(), ENDED, **exact_options)
    trainer = make_trainer(recipe, *models(), **options)
    assert relative_error(train(trainer), exact) < EXACT
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, **FLOAT32_REFERENCE)
    trainer.args.per_device_eval_batch_size = len(PAIRS)
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(loss, **FLOAT32_REFERENCE)
    assert "eval_rewards/margins" in evaluated


def test_log_keys_and_values_are_those_of_dpo(recipe) -> None:
    logs = []
    for trainer_class in (recipe, trl.DPOTrainer):
        trainer = make_trainer(trainer_class, *models())
        train(trainer)
        logs.append(trainer.state.log_history[0])
    ours, theirs = logs
    lost = {"entropy", "num_tokens", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
    assert theirs.keys() - ours.keys() == lost
    assert ours.keys() - theirs.keys() == {"rewards/margins_below_0", "rewards/margins_above_1"}
    for key in (key for key in ours.keys() & theirs.keys() if re.match("rewards/|logps/", key)):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


@pytest.mark.parametrize(
    "option",
    [
        {"loss_type": "ipo"},
        {"loss_type": ["sigmoid", "sft"]},
        {"loss_weights": [0.5]},
        {"label_smoothing": 0.2},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"discopop_tau": 0.1},
        {"f_divergence_type": "js_divergence"},
        {"f_alpha_divergence_coef": 0.25},
    ],
    ids=str,
)
def test_options_of_other_losses_are_refused(recipe, option) -> None:
    with pytest.raises(ValueError, match=f"only SPO: {next(iter(option))} must be .*, got "):
        make_trainer(recipe, *models(), config=option)


def like_toy(config: type, **options: Any) -> Any:
    """A configuration of another model with the sizes of toy.py."""
    return config(**toy.models()[0].config.to_diff_dict() | {"architectures": None}, **options)


def test_the_auxiliary_loss_of_experts_is_refused(recipe) -> None:
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    config = like_toy(Qwen2MoeConfig, num_experts=2, num_experts_per_tok=1, **sizes)
    config.router_aux_loss_coef = 0.1
    both = [Qwen2MoeForCausalLM(config) for _ in range(2)]
    make_trainer(recipe, *both, config={"router_aux_loss_coef": 0.0})
    with pytest.raises(ValueError, match=r"set router_aux_loss_coef=0\.0"):
        make_trainer(recipe, *both)


def test_accumulation_is_a_mean_of_means(recipe) -> None:
    _, exact = exact_step(*models(), ENDED)
    trainer = make_trainer(recipe, *models(), size=UNEVEN)
    assert relative_error(train(trainer), exact) == pytest.approx(0.4, abs=0.05)


def test_lora_takes_the_base_as_reference(recipe) -> None:
    policy, _ = models()
    base, expected = copy.deepcopy(policy), get_peft_model(copy.deepcopy(policy), lora())
    trainer = make_trainer(recipe, policy, peft_config=lora())
    grads = train(trainer)
    expected.load_state_dict(trainer.model.state_dict())
    assert relative_error(grads, exact_step(expected, base, ENDED)[1]) < EXACT


def test_an_adapter_of_your_own_is_the_reference(recipe) -> None:
    policy = get_peft_model(models()[0], lora())
    expected, reference = copy.deepcopy(policy), copy.deepcopy(policy)
    move_adapter(expected)
    grads = train(make_trainer(recipe, policy))
    assert relative_error(grads, exact_step(expected, reference, ENDED)[1]) < EXACT


# ---------------------------------------------------------------------------------- without logits


def test_fused_never_calls_the_head() -> None:
    both = models()
    trainer = make_trainer(load("trl_fused").SPOTrainer, *both)
    for model in both:
        model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits were made"))
    train(trainer)


def test_fused_still_gives_logits_to_those_who_ask() -> None:
    policy, reference = models()
    before = copy.deepcopy(policy).eval()
    trainer = make_trainer(load("trl_fused").SPOTrainer, policy, reference)
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        _, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
        expected = before(inputs["input_ids"], inputs["attention_mask"]).logits
    torch.testing.assert_close(outputs.logits, expected)


def test_fused_takes_what_a_model_does_to_its_logits() -> None:
    torch.manual_seed(0)
    model = GraniteForCausalLM(like_toy(GraniteConfig, logits_scaling=8.0)).double()
    both = model, copy.deepcopy(model)
    _, exact = exact_step(*both, ENDED)
    trainer = make_trainer(load("trl_fused").SPOTrainer, *both)
    assert relative_error(train(trainer), exact) < EXACT
