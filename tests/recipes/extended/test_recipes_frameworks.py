"""The recipes for Lightning, Accelerate and PEFT make the gradient that `exact_step` makes."""

from __future__ import annotations

import copy

import accelerate
import lightning
import pytest
import torch
from peft import get_peft_model

from helpers.recipes_oracle import (
    BETA,
    EVEN,
    PAIRS,
    UNEVEN,
    Recorder,
    assert_step,
    exact_step,
    grads_of,
    load,
    models,
    relative_error,
    run_script,
    toy,
)
from helpers.trainers import LIGHTNING, lora

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_accelerate"),
    # PEFT 0.21 asks for gradient checkpointing by a name that Transformers 5.23 will drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    # Lightning 2.6 on PyTorch 2.13 and on itself.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.mark.parametrize(
    ("size", "divisor", "share"),
    [(EVEN, 3, 1.0), (UNEVEN, 3, 1.0), (UNEVEN, 4, 6 / 8)],  # 8: two full micro-batches of 4
)
def test_lightning(tmp_path, size, divisor, share) -> None:
    policy, reference = models()
    recorder = Recorder(policy)
    module = load("lightning_module").SPOModule(
        policy, reference, pairs_per_micro_batch=divisor, beta=BETA
    )
    module.configure_optimizers = lambda: recorder
    trainer = lightning.Trainer(**LIGHTNING)
    trainer.fit(module, torch.utils.data.DataLoader(PAIRS, size, collate_fn=toy.collate))
    (grads,) = recorder.steps
    _, exact = exact_step(*models(), PAIRS)
    assert relative_error(grads, {name: share * grad for name, grad in exact.items()}) < 1e-6
    last, _ = exact_step(*models(), PAIRS[size:])
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(last, rel=1e-6)
    assert "train/rewards/margins" in trainer.callback_metrics
    assert not reference.training
    trainer.save_checkpoint(tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert saved["state_dict"].keys() == {f"policy.{name}" for name in policy.state_dict()}


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
    for loss, grads, part in zip(list(losses), recorder.steps, parts, strict=True):
        assert_step(loss, grads, exact_step(*models(), part))


# ---------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_peft_fused(options) -> None:
    base, _ = models()
    policy = get_peft_model(copy.deepcopy(base), lora(**options))
    if options:
        with torch.no_grad():  # a head that has moved off the reference's
            policy.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.1)
    exact = exact_step(policy, base, PAIRS)
    loss = load("peft_fused").FusedSPO(policy, BETA)(toy.collate(PAIRS))
    loss.backward()
    assert_step(loss.item(), grads_of(policy), exact)
    assert any("lm_head" in name for name in exact[1]) == bool(options)


# ------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    "name", ["accelerate_loop", "lightning_module", "peft_fused", "trl_dpo", "trl_fused"]
)
def test_recipe_runs_as_a_script(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(run_script(name)) >= 3
    assert not list(tmp_path.iterdir())
