"""The recipes for TRL make the gradient that `exact_step` makes, and refuse other losses."""

from __future__ import annotations

import copy
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from helpers.recipes_oracle import (
    BETA,
    RECIPES,
    Grads,
    Recorder,
    exact_step,
    load,
    models,
    relative_error,
    toy,
)
from helpers.trainers import trainer_arguments, with_end

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_accelerate"),
    # TRL 1.16 asks for gradient checkpointing by names that Transformers 5.23 will drop.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_.*)?` is:FutureWarning"),
]

EXACT = 1e-6
# TRL holds the reference's log-probabilities, here two of about -33, in float32 (steps of 4e-6).
FLOAT32_REFERENCE = {"rel": EXACT, "abs": BETA * 4e-6}
PAIRS = toy.pairs(6)
EVEN, UNEVEN = 3, 4  # pairs of a micro-batch: 3 + 3, or 4 + 2
FORMS = ("trl_dpo", "trl_fused")


@pytest.fixture(params=FORMS)
def recipe(request) -> type:
    """SPOTrainer of either recipe."""
    return load(request.param).SPOTrainer


def lora(**options: Any) -> LoraConfig:
    # Not the initial B = 0: base and adapter must differ, for the reference to matter.
    targets = {"target_modules": ["q_proj", "v_proj"], **options}
    return LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **targets)


def dataset(**columns: list[float]) -> Dataset:
    rows = toy.texts(PAIRS)
    for name, values in columns.items():
        rows = [{**row, name: value} for row, value in zip(rows, values, strict=True)]
    return Dataset.from_list(rows)


def make_trainer(
    trainer_class: type,
    folder: Path,
    policy: nn.Module,
    *,
    size: int = EVEN,
    data: Dataset | None = None,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    data = data or dataset()
    settings = {**trainer_arguments(folder, size), "beta": BETA, "bf16": False, **(config or {})}
    return trainer_class(
        policy,
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


@pytest.mark.parametrize("precompute", [False, True])
def test_a_reference_model(tmp_path, recipe, precompute) -> None:
    policy, reference = models()
    loss, exact = exact_step(policy, reference, with_end(PAIRS))
    config = {"precompute_ref_log_probs": precompute}
    trainer = make_trainer(recipe, tmp_path, policy, ref_model=reference, config=config)
    assert relative_error(train(trainer), exact) < EXACT
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, **FLOAT32_REFERENCE)
    trainer.args.per_device_eval_batch_size = len(PAIRS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, **FLOAT32_REFERENCE)


def test_log_keys_and_values_are_those_of_dpo(tmp_path, recipe) -> None:
    logs = []
    for trainer_class in (recipe, trl.DPOTrainer):
        policy, reference = models()
        trainer = make_trainer(trainer_class, tmp_path, policy, ref_model=reference)
        train(trainer)
        logs.append(trainer.state.log_history[0])
    ours, theirs = logs
    lost = {"entropy", "num_tokens", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
    assert theirs.keys() - ours.keys() == lost
    assert ours.keys() - theirs.keys() == {"rewards/margins_below_0", "rewards/margins_above_1"}
    for key in (key for key in ours.keys() & theirs.keys() if re.match("rewards/|logps/", key)):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


def test_weights_gaps_and_a_tangent(tmp_path, recipe) -> None:
    policy, reference = models()
    weights, gaps = [0.0, 1.0, 2.0, 0.5, 1.0, 3.0], [1.0, 0.5, 2.0, 1.0, 0.25, 1.0]
    loss, exact = exact_step(
        policy,
        reference,
        with_end(PAIRS),
        [BETA / gap for gap in gaps],
        weights=weights,
        linear_below=0.05,
    )
    trainer = make_trainer(
        recipe,
        tmp_path,
        policy,
        ref_model=reference,
        data=dataset(weights=weights, reward_gap=gaps),
        linear_below=0.05,
    )
    assert relative_error(train(trainer), exact) < EXACT
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, **FLOAT32_REFERENCE)
    assert "rewards/margins" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_type", "ipo"),
        ("loss_type", ["sigmoid", "sft"]),
        ("loss_weights", [0.5]),
        ("label_smoothing", 0.2),
        ("use_weighting", True),
        ("ld_alpha", 0.5),
        ("discopop_tau", 0.1),
        ("f_divergence_type", "js_divergence"),
        ("f_alpha_divergence_coef", 0.25),
    ],
)
def test_options_of_other_losses_are_refused(tmp_path, recipe, name, value) -> None:
    policy, reference = models()
    with pytest.raises(ValueError, match=f"only SPO: {name} must be .*, got "):
        make_trainer(recipe, tmp_path, policy, ref_model=reference, config={name: value})


@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_the_auxiliary_loss_of_experts_is_refused(tmp_path, recipe, coefficient) -> None:
    config = Qwen2MoeConfig(
        **toy.models()[0].config.to_diff_dict() | {"architectures": None},
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        router_aux_loss_coef=0.1,
    )
    policy, reference = Qwen2MoeForCausalLM(config), Qwen2MoeForCausalLM(config)
    options = {"ref_model": reference, "config": {"router_aux_loss_coef": coefficient}}
    if coefficient is None:
        with pytest.raises(ValueError, match=r"set router_aux_loss_coef=0\.0"):
            make_trainer(recipe, tmp_path, policy, **options)
    else:
        make_trainer(recipe, tmp_path, policy, **options)


def test_accumulation_is_a_mean_of_means(tmp_path, recipe) -> None:
    policy, reference = models()
    _, exact = exact_step(policy, reference, with_end(PAIRS))
    trainer = make_trainer(recipe, tmp_path, policy, size=UNEVEN, ref_model=reference)
    assert relative_error(train(trainer), exact) == pytest.approx(0.4, abs=0.05)


def test_lora_takes_the_base_as_reference(tmp_path, recipe) -> None:
    policy, _ = models()
    base, expected = copy.deepcopy(policy), get_peft_model(copy.deepcopy(policy), lora())
    trainer = make_trainer(recipe, tmp_path, policy, peft_config=lora())
    grads = train(trainer)
    expected.load_state_dict(trainer.model.state_dict())
    assert relative_error(grads, exact_step(expected, base, with_end(PAIRS))[1]) < EXACT


def test_an_adapter_of_your_own_is_the_reference(tmp_path, recipe) -> None:
    policy = get_peft_model(models()[0], lora())
    expected, reference = copy.deepcopy(policy), copy.deepcopy(policy)
    move_adapter(expected)
    grads = train(make_trainer(recipe, tmp_path, policy))
    assert relative_error(grads, exact_step(expected, reference, with_end(PAIRS))[1]) < EXACT
    # What adapters off would have made of it.
    assert relative_error(grads, exact_step(expected, models()[0], with_end(PAIRS))[1]) > 0.05


# ---------------------------------------------------------------------------------- without logits


def test_fused_never_calls_the_head(tmp_path) -> None:
    policy, reference = models()
    trainer = make_trainer(load("trl_fused").SPOTrainer, tmp_path, policy, ref_model=reference)
    for model in (policy, reference):
        model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits were made"))
    train(trainer)


def test_fused_still_gives_logits_to_those_who_ask(tmp_path) -> None:
    policy, reference = models()
    before = copy.deepcopy(policy).eval()
    trainer = make_trainer(load("trl_fused").SPOTrainer, tmp_path, policy, ref_model=reference)
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        _, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
        expected = before(inputs["input_ids"], inputs["attention_mask"]).logits
    torch.testing.assert_close(outputs.logits, expected)


def test_fused_takes_what_a_model_does_to_its_logits(tmp_path) -> None:
    config = toy.models()[0].config.to_diff_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    shape = {name: config[name] for name in (*names, "num_attention_heads", "num_key_value_heads")}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**shape, **ends, logits_scaling=8.0)).double()
    _, exact = exact_step(model, copy.deepcopy(model), with_end(PAIRS))
    trainer = make_trainer(
        load("trl_fused").SPOTrainer, tmp_path, model, ref_model=copy.deepcopy(model)
    )
    assert relative_error(train(trainer), exact) < EXACT


def test_fused_refuses_a_prompt(tmp_path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="virtual tokens"):
        make_trainer(load("trl_fused").SPOTrainer, tmp_path, models()[0], peft_config=config)


# ------------------------------------------------------------------------------------- the script


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMS)
def test_recipe_runs_as_a_script(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    first, *_, last = (log["loss"] for log in run["trainer"].state.log_history if "loss" in log)
    assert first == pytest.approx(0.0, abs=1e-6)  # the reference is a copy of the policy
    assert last < first
    assert not list(tmp_path.iterdir())
