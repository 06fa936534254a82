"""The recipes for Lightning, Accelerate and PEFT make the gradient that `exact_step` makes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

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

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_accelerate"),
    # PEFT 0.21 asks for gradient checkpointing by a name that Transformers 5.23 will drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    # Lightning 2.6 on PyTorch 2.13 and on itself.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

EXACT = 1e-6
PAIRS = toy.pairs(6)
EVEN, UNEVEN = 3, 4  # pairs of a micro-batch: 3 + 3, or 4 + 2


# ----------------------------------------------------------------------------------- Lightning


def lightning_step(folder: Path, size: int, nominal: int) -> tuple[Any, Grads]:
    policy, reference = models()
    recorder = Recorder(policy)
    module = load("lightning_module").SPOModule(
        policy, reference, pairs_per_micro_batch=nominal, beta=BETA
    )
    module.configure_optimizers = lambda: recorder
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, torch.utils.data.DataLoader(PAIRS, size, collate_fn=toy.collate))
    (grads,) = recorder.steps
    return trainer, grads


@pytest.mark.parametrize(
    ("size", "nominal", "share"),
    [(EVEN, 3, 1.0), (UNEVEN, 3, 1.0), (UNEVEN, 4, 6 / 8)],  # 8: two full micro-batches of 4
)
def test_lightning(tmp_path, size, nominal, share) -> None:
    _, grads = lightning_step(tmp_path, size, nominal)
    _, exact = exact_step(*models(), PAIRS)
    assert relative_error(grads, {name: share * grad for name, grad in exact.items()}) < EXACT


def test_lightning_logs_and_leaves_the_reference_out_of_checkpoints(tmp_path) -> None:
    trainer, _ = lightning_step(tmp_path, 6, 6)
    loss, _ = exact_step(*models(), PAIRS)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss, rel=EXACT)
    assert "train/rewards/margins" in trainer.callback_metrics
    assert not trainer.lightning_module.reference.training
    trainer.save_checkpoint(tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert saved["state_dict"].keys() == {f"policy.{name}" for name in models()[0].state_dict()}


# ---------------------------------------------------------------------------------- Accelerate


@pytest.mark.parametrize("size", [EVEN, UNEVEN])
def test_accelerate(size) -> None:
    # Two steps, and with 4 pairs to a micro-batch the second is 4 + 2.
    pairs = toy.pairs(4 * size if size == EVEN else 14)
    policy, reference = models()
    recorder = Recorder(policy)
    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(pairs, batch_size=size, collate_fn=toy.collate)
    policy, optimizer, loader = accelerator.prepare(policy, recorder, loader)
    train = load("accelerate_loop").train
    losses = train(policy, reference, loader, optimizer, accelerator, micro_batches=2, beta=BETA)
    parts = (pairs[: 2 * size], pairs[2 * size :])
    for mean, grads, part in zip(list(losses), recorder.steps, parts, strict=True):
        loss, exact = exact_step(*models(), part)
        assert mean == pytest.approx(loss, rel=EXACT)
        assert relative_error(grads, exact) < EXACT


# ---------------------------------------------------------------------------------------- PEFT


def lora(**options: Any) -> LoraConfig:
    # Not the initial B = 0: base and adapter must differ, for the reference to matter.
    targets = {"target_modules": ["q_proj", "v_proj"], **options}
    return LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **targets)


def pair_loss(policy: PeftModel) -> torch.Tensor:
    return load("peft_fused").FusedSPO(policy, BETA)(toy.collate(PAIRS))


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_peft_fused(options) -> None:
    base, _ = models()
    policy = get_peft_model(copy.deepcopy(base), lora(**options))
    if options:
        with torch.no_grad():  # a head that has moved off the reference's
            policy.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.1)
    expected, exact = exact_step(policy, base, PAIRS)
    loss = pair_loss(policy)
    loss.backward()
    grads = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    assert loss.item() == pytest.approx(expected, rel=EXACT)
    assert relative_error(grads, exact) < EXACT
    assert any("lm_head" in name for name in exact) == bool(options)


@pytest.mark.parametrize("fresh", [True, False])
def test_peft_refuses_an_adapter_on_the_head(fresh) -> None:
    config = lora(target_modules=["q_proj", "lm_head"])
    config.init_lora_weights = fresh  # then it changes no logit yet
    with pytest.raises(TypeError, match="the head must be exactly"):
        pair_loss(get_peft_model(models()[0], config))


@pytest.mark.parametrize(
    "kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig], ids=lambda k: k.__name__
)
def test_peft_refuses_a_prompt(kind) -> None:
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
    if kind is PromptEncoderConfig:
        config.encoder_hidden_size = 8
    with pytest.raises(ValueError, match="virtual tokens"):
        pair_loss(get_peft_model(models()[0], config))


# ------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("name", ["accelerate_loop", "lightning_module", "peft_fused"])
def test_recipe_runs_as_a_script(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(run_script(name)) >= 3
    assert not list(tmp_path.iterdir())
