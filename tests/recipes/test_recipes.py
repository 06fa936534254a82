"""Every recipe runs on its real framework, and makes the gradient that `exact_step` makes.

Models are float64, though Qwen2 normalises in float32: a gradient is right to 1e-6 or wrong. The
gradient of a step is what reaches the optimiser. The recipes for several processes are tested in
test_recipes_torch.py.
"""

from __future__ import annotations

import copy
import itertools
import re
import runpy
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import jax
import jax.numpy as jnp
import lightning
import numpy as np
import optax
import pytest
import torch
import trl
from datasets import Dataset
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from helpers import processes, trainers_worker
from helpers.interpreter import run_python
from helpers.recipes_oracle import (
    RECIPES,
    Grads,
    MeanOfEmbeddings,
    Recorder,
    exact_step,
    load,
    relative_error,
    toy,
)
from helpers.trainers_worker import trainer_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

BETA = 0.1
EXACT = 1e-6
FLOAT64 = 1e-10
# TRL holds the reference's log-probabilities, here two of about -33, in float32 (steps of 4e-6).
FLOAT32_REFERENCE = {"rel": EXACT, "abs": BETA * 4e-6}
PAIRS = toy.pairs(6)
EVEN, UNEVEN = 3, 4  # pairs of a micro-batch: 3 + 3, or 4 + 2
# What a mean of means is off by on 4 + 2 of PAIRS, whose order is the framework's to choose;
# docs/recipes/README.md gives the figure.
MEAN_OF_MEANS = pytest.approx(0.4, abs=0.05)

# TRL 1.16 and PEFT 0.21 ask for gradient checkpointing by names that Transformers 5.23 will drop.
of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
of_trl = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_.*)?` is:FutureWarning")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    # Its settings are the process's: a Trainer's accumulation would go on in the next test.
    accelerate.state.GradientState._reset_state()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def models(**options: Any) -> tuple[nn.Module, nn.Module]:
    return toy.models(dtype=torch.float64, **options)


def micro_batches(pairs: Sequence[Any], size: int) -> list[Any]:
    return [toy.collate(pairs[i : i + size]) for i in range(0, len(pairs), size)]


def swapped(pairs: Iterable[Any]) -> list[Any]:
    return [toy.Pair(prompt, rejected, chosen) for prompt, chosen, rejected in pairs]


def lora(**options: Any) -> LoraConfig:
    # Not the initial B = 0: base and adapter must differ, for the reference to matter.
    targets = {"target_modules": ["q_proj", "v_proj"], **options}
    return LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **targets)


# ------------------------------------------------------------------------------ plain PyTorch


def plain_grads(loss_of: Callable[..., Tensor], batches: list[Any], **options: Any) -> Grads:
    policy, reference = models(**options)
    load("plain_pytorch").accumulate(loss_of, policy, reference, batches, BETA)
    return {name: parameter.grad for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("size", [6, EVEN, UNEVEN, 1])
@pytest.mark.parametrize("loss_of", ["loss_by_logits", "loss_by_tiles"])
@pytest.mark.parametrize("tied", [False, True])
def test_plain_pytorch(loss_of, size, tied) -> None:
    recipe = load("plain_pytorch")
    batches = micro_batches(PAIRS, size)
    loss, exact = exact_step(*models(tied=tied), PAIRS, BETA)
    grads = plain_grads(getattr(recipe, loss_of), batches, tied=tied)
    assert relative_error(grads, exact) < EXACT
    mean = recipe.accumulate(getattr(recipe, loss_of), *models(tied=tied), batches, BETA)
    assert mean == pytest.approx(loss, rel=EXACT)


def test_the_comparison_sees_a_mean_of_means_and_swapped_pairs() -> None:
    recipe = load("plain_pytorch")
    _, exact = exact_step(*models(), PAIRS, BETA)

    def mean(*arguments: Any) -> Tensor:
        # `accumulate` divides by all 6 pairs: the mean of 2 micro-batches' means, times 6 / 2.
        pairs = len(arguments[2].labels) // 2
        return recipe.loss_by_logits(*arguments) / pairs * len(PAIRS) / 2

    assert relative_error(plain_grads(mean, micro_batches(PAIRS, EVEN)), exact) < EXACT
    assert relative_error(plain_grads(mean, micro_batches(PAIRS, UNEVEN)), exact) == MEAN_OF_MEANS
    batches = micro_batches(swapped(PAIRS), EVEN)
    assert relative_error(plain_grads(recipe.loss_by_logits, batches), exact) > 1.0


# --------------------------------------------------------------------- Transformers and TRL


def transformers_step(trainer_class: type, directory: Path, size: int) -> tuple[Any, Grads]:
    policy, reference = models()
    recorder = Recorder(policy)

    def collate(pairs: list[Any]) -> dict[str, Tensor]:
        batch = toy.collate(pairs)
        return {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": batch.labels}

    arguments = TrainingArguments(**trainer_arguments(directory, size), remove_unused_columns=False)
    trainer = trainer_class(
        policy,
        arguments,
        collate,
        PAIRS,
        PAIRS,
        optimizers=(recorder, None),
        reference=reference,
        beta=BETA,
    )
    trainer.train()
    (grads,) = recorder.steps
    return trainer, grads


def assert_exact(trainer: Trainer, grads: Grads) -> None:
    """Gradient, logged loss and evaluation are those of the mean over all pairs."""
    loss, exact = exact_step(*models(), PAIRS, BETA)
    assert relative_error(grads, exact) < EXACT
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=EXACT)
    trainer.args.per_device_eval_batch_size = len(PAIRS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=EXACT)


@pytest.mark.parametrize("size", [EVEN, UNEVEN])
def test_transformers_exact(tmp_path, size) -> None:
    recipe = load("transformers_trainer")
    assert_exact(*transformers_step(recipe.ExactSPOTrainer, tmp_path, size))


def test_transformers_least_code_is_a_mean_of_means(tmp_path) -> None:
    recipe = load("transformers_trainer")
    _, exact = exact_step(*models(), PAIRS, BETA)
    _, even = transformers_step(recipe.SPOTrainer, tmp_path, EVEN)
    assert relative_error(even, exact) < EXACT
    _, uneven = transformers_step(recipe.SPOTrainer, tmp_path, UNEVEN)
    assert relative_error(uneven, exact) == MEAN_OF_MEANS


def loss_func_step(directory: Path, size: int, loss_func: Any, labels_of: Any) -> tuple[Any, Grads]:
    model = load("transformers_loss_func").PolicyAndReference(*models())
    recorder = Recorder(model.policy)

    def collate(pairs: list[Any]) -> dict[str, Tensor]:
        batch = toy.collate(pairs)
        tensors = {"input_ids": batch.ids, "attention_mask": batch.mask, "targets": batch.labels}
        return {**tensors, "labels": labels_of(batch)}

    options = {"remove_unused_columns": False, "label_names": ["labels"]}
    trainer = Trainer(
        model,
        TrainingArguments(**trainer_arguments(directory, size), **options),
        collate,
        PAIRS,
        PAIRS,
        optimizers=(recorder, None),
        compute_loss_func=loss_func,
    )
    trainer.train()
    assert not model.reference.training
    (grads,) = recorder.steps
    return trainer, grads


def one_per_pair(batch: Any) -> Tensor:
    return torch.zeros(len(batch.labels) // 2)


@pytest.mark.parametrize("size", [EVEN, UNEVEN])
def test_transformers_loss_func(tmp_path, size) -> None:
    recipe = load("transformers_loss_func")
    assert_exact(*loss_func_step(tmp_path, size, recipe.mean_over_step, one_per_pair))


def test_transformers_loss_func_counts_tokens_if_given_their_labels(tmp_path) -> None:
    recipe = load("transformers_loss_func")
    _, exact = exact_step(*models(), PAIRS, BETA)
    _, grads = loss_func_step(tmp_path, EVEN, recipe.mean_over_step, lambda batch: batch.labels)
    assert relative_error(grads, exact) > 0.5


def test_transformers_without_the_attribute_is_twice_too_large(tmp_path) -> None:
    class Forgotten(load("transformers_trainer").SPOTrainer):
        loss_is_scaled_for_ga = None

    _, exact = exact_step(*models(), PAIRS, BETA)
    _, grads = transformers_step(Forgotten, tmp_path, EVEN)
    assert relative_error(grads, {name: 2.0 * grad for name, grad in exact.items()}) < EXACT


def trl_step(
    directory: Path,
    policy: nn.Module,
    *,
    size: int = EVEN,
    trainer_class: type,
    precompute: bool = False,
    **options: Any,
) -> tuple[Any, Grads]:
    """One step of TRL; the adapter of a LoRA run is moved off its start first."""
    trainer = trainer_class(
        policy,
        args=trl.DPOConfig(
            **trainer_arguments(directory, size),
            beta=BETA,
            bf16=False,
            precompute_ref_log_probs=precompute,
        ),
        train_dataset=Dataset.from_list(toy.texts(PAIRS)),
        eval_dataset=Dataset.from_list(toy.texts(PAIRS)),
        processing_class=toy.tokenizer(),
        **options,
    )
    move_adapter(trainer.model)
    recorder = trainer.optimizer = Recorder(trainer.model)
    trainer.train()
    (grads,) = recorder.steps
    return trainer, grads


def move_adapter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def with_end(pairs: Iterable[Any]) -> list[Any]:
    """The pairs as TRL sees them: it ends each completion."""
    return [toy.Pair(prompt, [*chosen, 1], [*rejected, 1]) for prompt, chosen, rejected in pairs]


@pytest.fixture(params=["trl_dpo", "trl_fused"])
def trl_recipe(request) -> type:
    """SPOTrainer of either recipe for TRL."""
    return load(request.param).SPOTrainer


@of_trl
@pytest.mark.parametrize("precompute", [False, True])
def test_trl_with_a_reference_model(tmp_path, trl_recipe, precompute) -> None:
    policy, reference = models()
    loss, exact = exact_step(policy, reference, with_end(PAIRS), BETA)
    options = {"ref_model": reference, "precompute": precompute, "trainer_class": trl_recipe}
    trainer, grads = trl_step(tmp_path, policy, **options)
    assert relative_error(grads, exact) < EXACT
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, **FLOAT32_REFERENCE)
    assert log["rewards/margins"] == pytest.approx(
        log["rewards/chosen"] - log["rewards/rejected"], rel=1e-4
    )
    trainer.args.per_device_eval_batch_size = len(PAIRS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, **FLOAT32_REFERENCE)


@of_trl
def test_trl_keeps_the_log_keys_of_dpo(tmp_path, trl_recipe) -> None:
    policy, reference = models()
    ours, _ = trl_step(tmp_path, policy, ref_model=reference, trainer_class=trl_recipe)
    policy, reference = models()
    theirs, _ = trl_step(tmp_path, policy, ref_model=reference, trainer_class=trl.DPOTrainer)
    ours, theirs = ours.state.log_history[0], theirs.state.log_history[0]
    lost = {"entropy", "num_tokens", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
    assert theirs.keys() - ours.keys() == lost
    assert ours.keys() - theirs.keys() == {"rewards/margins_below_0", "rewards/margins_above_1"}
    for key in (key for key in ours.keys() & theirs.keys() if re.match("rewards/|logps/", key)):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


@of_trl
def test_trl_accumulates_means_of_means(tmp_path, trl_recipe) -> None:
    policy, reference = models()
    _, exact = exact_step(policy, reference, with_end(PAIRS), BETA)
    options = {"ref_model": reference, "trainer_class": trl_recipe}
    _, grads = trl_step(tmp_path, policy, size=UNEVEN, **options)
    assert relative_error(grads, exact) == MEAN_OF_MEANS


@of_trl
def test_trl_with_lora_takes_the_base_as_reference(tmp_path, trl_recipe) -> None:
    policy, _ = models()
    base, expected = copy.deepcopy(policy), get_peft_model(copy.deepcopy(policy), lora())
    trainer, grads = trl_step(tmp_path, policy, peft_config=lora(), trainer_class=trl_recipe)
    expected.load_state_dict(trainer.model.state_dict())
    _, exact = exact_step(expected, base, with_end(PAIRS), BETA)
    assert relative_error(grads, exact) < EXACT


@of_trl
def test_trl_with_an_adapter_of_your_own_takes_it_as_reference(tmp_path, trl_recipe) -> None:
    policy = get_peft_model(models()[0], lora())
    expected, reference = copy.deepcopy(policy), copy.deepcopy(policy)
    move_adapter(expected)
    trainer, grads = trl_step(tmp_path, policy, trainer_class=trl_recipe)
    _, exact = exact_step(expected, reference, with_end(PAIRS), BETA)
    assert relative_error(grads, exact) < EXACT
    # What adapters off would have made of it.
    _, by_base = exact_step(expected, models()[0], with_end(PAIRS), BETA)
    assert relative_error(grads, by_base) > 0.05
    assert "ref" in trainer.model.peft_config


@of_trl
def test_trl_takes_an_unknown_loss_type_until_the_first_step(tmp_path) -> None:
    policy, reference = models()

    class Named(trl.DPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["args"].loss_type = ["spo"]
            super().__init__(*args, **kwargs)

    with pytest.raises(ValueError, match="Unknown loss type: spo"):
        trl_step(tmp_path, policy, ref_model=reference, trainer_class=Named)


@of_trl
def test_trl_fused_never_calls_the_head(tmp_path) -> None:
    policy, reference = models()
    for model in (policy, reference):
        model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits were made"))
    trl_step(tmp_path, policy, ref_model=reference, trainer_class=load("trl_fused").SPOTrainer)


@of_trl
def test_trl_fused_still_gives_logits_to_those_who_ask(tmp_path) -> None:
    policy, reference = models()
    before = copy.deepcopy(policy)
    trainer, _ = trl_step(
        tmp_path, policy, ref_model=reference, trainer_class=load("trl_fused").SPOTrainer
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        _, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
        expected = before.eval()(inputs["input_ids"], inputs["attention_mask"]).logits
    torch.testing.assert_close(outputs.logits, expected)


def test_trl_fused_takes_what_a_model_does_to_its_logits() -> None:
    options = load("trl_fused").head_options
    policy, _ = models()
    assert options(policy) == {"logit_scale": 1.0, "softcap": None}
    policy.config.update({"logits_scaling": 8.0, "final_logit_softcapping": 30.0})
    assert options(policy) == {"logit_scale": 0.125, "softcap": 30.0}
    policy.config.model_type = "hyperclovax"
    assert options(policy) == {"logit_scale": 8.0, "softcap": 30.0}
    policy.config.update({"lm_head_multiplier": 0.5})
    assert options(policy) == {"logit_scale": 4.0, "softcap": 30.0}
    policy.lm_head.bias = nn.Parameter(torch.zeros(toy.VOCABULARY))
    with pytest.raises(ValueError, match="the head has a bias"):
        options(policy)


# ------------------------------------------------------------------------ Lightning, Accelerate


def lightning_step(directory: Path, size: int, nominal: int) -> tuple[Any, Any, Grads]:
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
        default_root_dir=directory,
    )
    loader = torch.utils.data.DataLoader(PAIRS, batch_size=size, collate_fn=toy.collate)
    trainer.fit(module, loader)
    (grads,) = recorder.steps
    return trainer, module, grads


# Lightning 2.6 on PyTorch 2.13 and on itself.
of_lightning = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class TestLightning:
    pytestmark = of_lightning

    @pytest.mark.parametrize("size", [EVEN, UNEVEN])
    def test_gradient(self, tmp_path, size) -> None:
        _, _, grads = lightning_step(tmp_path, size, nominal=3)
        _, exact = exact_step(*models(), PAIRS, BETA)
        assert relative_error(grads, exact) < EXACT

    def test_a_short_micro_batch_shortens_the_step(self, tmp_path) -> None:
        _, _, grads = lightning_step(tmp_path, UNEVEN, nominal=4)
        _, exact = exact_step(*models(), PAIRS, BETA)
        assert relative_error(grads, {name: 6 / 8 * grad for name, grad in exact.items()}) < EXACT

    def test_reference_stays_out_of_checkpoints_and_training_mode(self, tmp_path) -> None:
        trainer, module, _ = lightning_step(tmp_path, EVEN, nominal=3)
        trainer.save_checkpoint(tmp_path / "checkpoint")
        saved = torch.load(tmp_path / "checkpoint", weights_only=True)
        assert saved["state_dict"].keys() == {f"policy.{name}" for name in models()[0].state_dict()}
        assert not module.reference.training

    def test_log(self, tmp_path) -> None:
        trainer, _, _ = lightning_step(tmp_path, 6, nominal=6)
        loss, _ = exact_step(*models(), PAIRS, BETA)
        logged = trainer.callback_metrics
        assert logged["train/loss"].item() == pytest.approx(loss, rel=EXACT)
        assert {"train/rewards/margins", "train/rewards/accuracies"} < logged.keys()


def accelerate_steps(loader: Iterable[Any]) -> tuple[list[float], list[Grads]]:
    policy, reference = models()
    recorder = Recorder(policy)
    accelerator = accelerate.Accelerator(cpu=True)
    policy, optimizer, loader = accelerator.prepare(policy, recorder, loader)
    train = load("accelerate_loop").train
    steps = train(policy, reference, loader, optimizer, accelerator, micro_batches=2, beta=BETA)
    return list(steps), recorder.steps


@pytest.mark.parametrize("size", [EVEN, UNEVEN])
def test_accelerate(size) -> None:
    # Two steps, and with 4 pairs to a micro-batch the second is 4 + 2.
    pairs = toy.pairs(4 * size if size == EVEN else 14)
    loader = torch.utils.data.DataLoader(pairs, batch_size=size, collate_fn=toy.collate)
    losses, steps = accelerate_steps(loader)
    parts = (pairs[: 2 * size], pairs[2 * size :])
    for mean, grads, part in zip(losses, steps, parts, strict=True):
        loss, exact = exact_step(*models(), part, BETA)
        assert mean == pytest.approx(loss, rel=EXACT)
        assert relative_error(grads, exact) < EXACT


def test_accelerate_and_trainer_on_two_uneven_ranks(tmp_path) -> None:
    ranks = processes.run(trainers_worker.work, 2, tmp_path, tmp_path / "trainer")
    loss, exact = exact_step(*models(), trainers_worker.PAIRS, BETA)
    for losses, steps in ranks:
        assert losses == pytest.approx([loss] * 3, rel=EXACT)
        assert [relative_error(grads, exact) < EXACT for grads in steps] == [True] * 3


def test_accelerate_steps_too_often_when_batches_are_drawn_ahead() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    layer = nn.Linear(1, 1)
    layer, optimizer, loader = accelerator.prepare(
        layer, Recorder(layer), torch.utils.data.DataLoader(torch.ones(3, 1))
    )
    batches = iter(loader)
    for batch in list(itertools.islice(batches, 3)):
        with accelerator.accumulate(layer):
            accelerator.backward(layer(batch).sum())
            optimizer.step()
    assert len(optimizer.optimizer.steps) == 3


# ---------------------------------------------------------------------------------------- PEFT


def peft_grads(policy: PeftModel) -> Grads:
    load("peft_fused").pair_loss(policy, toy.collate(PAIRS), BETA).backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}


@of_peft
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_peft_fused(options) -> None:
    base, _ = models()
    policy = get_peft_model(copy.deepcopy(base), lora(**options))
    if options:
        with torch.no_grad():  # a head that has moved off the reference's
            policy.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.1)
    loss, exact = exact_step(policy, base, PAIRS, BETA)
    assert relative_error(peft_grads(policy), exact) < EXACT
    assert any("lm_head" in name for name in exact) == bool(options)
    value = load("peft_fused").pair_loss(policy, toy.collate(PAIRS), BETA)
    assert value.item() == pytest.approx(loss, rel=EXACT)


@of_peft
def test_peft_refuses_an_adapter_on_the_head_which_its_weight_hides() -> None:
    base, _ = models()
    policy = get_peft_model(copy.deepcopy(base), lora(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="the head has an adapter"):
        peft_grads(policy)
    head = policy.get_base_model().get_output_embeddings()
    hidden = torch.randn(5, head.weight.shape[1], dtype=torch.float64)
    assert not torch.allclose(head(hidden), hidden @ head.weight.T)


# ------------------------------------------------------------------------------- JAX and NumPy


def optax_grads() -> tuple[float, dict[str, Any]]:
    recipe, toy_jax = load("jax_flax"), load("toy_jax")
    (params, reference), optimizer = toy_jax.params(jnp.float64), optax.sgd(1.0)
    train_step = recipe.make_train_step(toy_jax.apply, optimizer, BETA)
    batch = toy_jax.batch(len(PAIRS))
    new, _, loss = train_step(params, reference, optimizer.init(params), batch)
    return float(loss), jax.tree.map(jnp.subtract, params, new)


def nnx_grads() -> tuple[float, dict[str, Any]]:
    recipe, toy_jax = load("jax_flax"), load("toy_jax")
    policy, reference = toy_jax.models(jnp.float64)
    before = {name: getattr(policy, name)[...] for name in ("embed", "head")}
    optimizer = nnx.Optimizer(policy, optax.sgd(1.0), wrt=nnx.Param)
    batch = toy_jax.batch(len(PAIRS))
    loss = recipe.nnx_train_step(policy, reference, optimizer, batch, BETA)
    return float(loss), {name: w - getattr(policy, name)[...] for name, w in before.items()}


@pytest.mark.parametrize("step", [optax_grads, nnx_grads])
def test_jax(step) -> None:
    load("toy")
    policy, reference = map(MeanOfEmbeddings, load("toy_jax").params(jnp.float64))
    value, grads = step()
    loss, exact = exact_step(policy, reference, PAIRS, BETA)
    assert value == pytest.approx(loss, rel=FLOAT64)
    grads = {name: torch.tensor(np.asarray(grad)) for name, grad in grads.items()}
    assert relative_error(grads, exact) < FLOAT64


def test_optax_takes_an_ignored_label_for_an_index() -> None:
    loss = optax.softmax_cross_entropy_with_integer_labels
    labels = jnp.array([-100])
    assert jnp.isnan(loss(jnp.zeros((1, 99)), labels)).all()
    logits = jnp.arange(128.0)[None]
    assert loss(logits, labels) == loss(logits, labels + 128)


class Bigram(nn.Module):
    """The table of numpy_bigram.py for the oracle."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_numpy() -> None:
    random = np.random.default_rng(0)
    table, reference = random.normal(size=(2, toy.VOCABULARY, toy.VOCABULARY))
    value, grad = load("numpy_bigram").loss_and_grad(table, reference, PAIRS, BETA)
    loss, exact = exact_step(Bigram(table), Bigram(reference), PAIRS, BETA)
    assert value == pytest.approx(loss, rel=FLOAT64)
    assert relative_error({"table": torch.tensor(grad)}, exact) < FLOAT64


def test_numpy_runs_without_other_libraries() -> None:
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); "
        "print([name for name in ('torch', 'jax', 'transformers') if name in sys.modules])"
    )
    done = run_python("-W", "error", "-c", code, RECIPES / "numpy_bigram.py")
    assert done.returncode == 0, done.stderr
    *losses, others = done.stdout.splitlines()
    assert [float(loss) for loss in losses] == sorted(map(float, losses), reverse=True)
    assert others == "[]"


# ---------------------------------------------------------------------------------- call sites

# Stand-ins for the four trainers: how each calls its loss, what it unpacks and does with it.


def dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    x = beta * (policy_chosen - policy_rejected - reference_chosen + reference_rejected)
    rewards = (policy_chosen - reference_chosen, policy_rejected - reference_rejected)
    return -F.logsigmoid(x), *(beta * reward.detach() for reward in rewards)


class OpenRLHF:
    """openrlhf/trainer/dpo_trainer.py at 3c3be62: lines 64 and 163 to 197."""

    def __init__(self) -> None:
        self.beta = BETA
        self.loss_fn = None

    def step(self, *logps: Tensor) -> tuple[Tensor, ...]:
        preference_loss, chosen_reward, reject_reward = self.loss_fn(*logps)
        loss = preference_loss + 0 * 0.0
        assert isinstance(preference_loss.item(), float)
        assert 0.0 <= (chosen_reward > reject_reward).float().mean().item() <= 1.0
        return loss, chosen_reward, reject_reward


class LlamaFactoryV0:
    """src/llamafactory/train/dpo/trainer.py at ff6d4d1: lines 206 to 216 and 283 to 301."""

    def __init__(self) -> None:
        self.beta = BETA

    def step(self, *logps: Tensor) -> tuple[Tensor, ...]:
        losses, chosen_rewards, rejected_rewards = self.dpo_loss(*logps)
        losses += 0.0 * -logps[0]  # pref_ftx, in place
        assert isinstance((chosen_rewards - rejected_rewards).mean().item(), float)
        return losses.mean(), chosen_rewards, rejected_rewards


class LlamaFactoryV1:
    """src/llamafactory/v1/trainers/dpo_trainer.py at ff6d4d1: lines 316 to 332 and 390 to 436."""

    def step(self, *logps: Tensor) -> tuple[Tensor, ...]:
        losses = self.compute_sigmoid_dpo_loss(*logps, beta=BETA, label_smoothing=0.0)
        chosen_rewards = (BETA * (logps[0] - logps[2])).detach()
        rejected_rewards = (BETA * (logps[1] - logps[3])).detach()
        return losses.mean(), chosen_rewards, rejected_rewards


class OpenInstruct:
    """open_instruct/dpo_utils.py at e6c3044: lines 654 to 664."""

    def step(self, *logps: Tensor) -> tuple[Tensor, ...]:
        losses, *rewards = self.dpo_loss(*logps, beta=BETA, label_smoothing=0.0)
        return losses.mean(), *rewards


CALL_SITES = {
    "openrlhf": OpenRLHF,
    "llama_factory_v0": LlamaFactoryV0,
    "llama_factory_v1": LlamaFactoryV1,
    "open_instruct": OpenInstruct,
}


@pytest.mark.parametrize("name", CALL_SITES)
def test_call_site(name) -> None:
    site = CALL_SITES[name]()
    getattr(load("call_sites"), name)(LlamaFactoryV0 if name == "llama_factory_v0" else site)
    torch.manual_seed(0)
    logps = [(-20.0 - 5.0 * torch.rand(4)).requires_grad_() for _ in range(4)]
    loss, *rewards = site.step(*logps)
    x = BETA * (logps[0] - logps[1] - logps[2] + logps[3])
    expected = (-x * torch.exp(-x)).mean()
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, logps[:2])
    torch.testing.assert_close(grads, torch.autograd.grad(expected, logps[:2]))
    _, *rewards_of_dpo = dpo(*logps, BETA)
    torch.testing.assert_close(rewards, rewards_of_dpo)
    assert not any(reward.requires_grad for reward in rewards)


# ------------------------------------------------------------------------------ files and pages


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(
    "name",
    [
        "accelerate_loop",
        "call_sites",
        "jax_flax",
        "jax_mesh",
        "lightning_module",
        "peft_fused",
        "plain_pytorch",
        "transformers_loss_func",
        "transformers_trainer",
        "trl_dpo",
        "trl_fused",
    ],
)
def test_recipe_runs_as_a_script(name, recwarn, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    load("toy_jax")
    path = RECIPES / f"{name}.py"
    runpy.run_path(str(path), run_name="__main__")
    assert len(re.findall(r"-?0\.\d{3}", capsys.readouterr().out)) >= 3
    ours = [w for w in recwarn if w.filename == str(path) or "spoloss" in w.filename]
    assert not ours, [str(w.message) for w in ours]
    assert not list(tmp_path.iterdir())


def test_the_page_lists_every_recipe() -> None:
    page = (RECIPES / "README.md").read_text()
    linked = re.findall(r"\]\((\w+\.py)\)", page)
    files = {path.name for path in RECIPES.glob("*.py") if not path.name.startswith("toy")}
    assert set(linked) == files


def test_recipes_name_the_versions_that_are_tested() -> None:
    distributions = {"PyTorch": "torch", "core": "megatron-core"}
    named = []
    for path in RECIPES.glob("*.py"):
        for sentence in re.findall(r"Tested with ([^;]*?)[;.]\s", path.read_text()):
            named += re.findall(r"(\w+) (\d[\d.]*\d)", sentence)
    assert len(named) > 10
    for name, number in set(named):
        installed = version(distributions.get(name, name.lower()))
        assert f"{installed}.".startswith(f"{number}."), (name, number, installed)
