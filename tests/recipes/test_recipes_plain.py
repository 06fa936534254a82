"""The recipes without a framework make the gradient that `exact_step` makes.

The gradient of a step is what reaches the optimizer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.interpreter import run_python
from helpers.recipes_oracle import (
    BETA,
    RECIPES,
    Grads,
    exact_step,
    load,
    models,
    relative_error,
    run_script,
    toy,
)
from spoloss.torch import head_of

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-6
FLOAT64 = 1e-10
PAIRS = toy.pairs(6)
FORMS = ("logits", "tiles")


def grads_of(policy: nn.Module) -> Grads:
    return {name: parameter.grad for name, parameter in policy.named_parameters()}


# ------------------------------------------------------------------------------ plain PyTorch


def step(loss_of: Any, *inputs: Any, size: int) -> float:
    batches = [toy.collate(PAIRS[i : i + size]) for i in range(0, len(PAIRS), size)]
    return load("plain_pytorch").accumulate(partial(loss_of, *inputs), batches, BETA)


@pytest.mark.parametrize("size", [6, 4])  # at once, and 4 + 2 pairs
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True])
def test_plain_pytorch(form, size, tied) -> None:
    policy, reference = models(tied=tied)
    loss, exact = exact_step(policy, reference, PAIRS)
    heads = (head_of(policy), head_of(reference)) if form == "tiles" else ()
    loss_of = getattr(load("plain_pytorch"), f"loss_by_{form}")
    found = step(loss_of, policy, reference, *heads, size=size)
    assert found == pytest.approx(loss, rel=EXACT)
    assert relative_error(grads_of(policy), exact) < EXACT


def test_the_comparison_sees_a_mean_of_means_and_swapped_pairs() -> None:
    recipe = load("plain_pytorch")

    def mean(*arguments: Any) -> Tensor:
        # `accumulate` divides by all 6 pairs: the mean of 2 micro-batches' means, times 6 / 2.
        return recipe.loss_by_logits(*arguments) / (len(arguments[2].labels) // 2) * len(PAIRS) / 2

    def swapped(policy: Any, reference: Any, batch: Any, beta: float) -> Tensor:
        rows = [torch.cat(rows.chunk(2)[::-1]) for rows in batch]
        return recipe.loss_by_logits(policy, reference, toy.Batch(*rows), beta)

    _, exact = exact_step(*models(), PAIRS)
    for wrong, least in ((mean, 0.3), (swapped, 1.0)):
        policy, reference = models()
        step(wrong, policy, reference, size=4)
        assert relative_error(grads_of(policy), exact) > least


# -------------------------------------------------------------------------------- padding-free


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_free(form, attention) -> None:
    recipe = load("padding_free")
    policy, reference = models()
    sides = []
    for model in (policy, reference):
        model.set_attn_implementation(attention)
        head = [head_of(model)] if form == "tiles" else []
        sides.append(partial(getattr(recipe, f"by_{form}"), model, *head))
    found = recipe.mean_loss(*sides, recipe.pack(PAIRS), BETA)
    found.backward()
    loss, exact = exact_step(policy, reference, PAIRS)
    assert found.item() == pytest.approx(loss, rel=EXACT)
    assert relative_error(grads_of(policy), exact) < EXACT


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_prompts(attention) -> None:
    recipe = load("shared_prompts")
    policy, reference = models()
    for model in (policy, reference):
        model.set_attn_implementation(attention)
    row, heads = recipe.pack(PAIRS), (head_of(policy), head_of(reference))
    assert row.ids.shape[1] == sum(len(part) for pair in PAIRS for part in pair)
    found = recipe.mean_loss(policy, reference, heads, row, BETA)
    found.backward()
    loss, exact = exact_step(policy, reference, PAIRS)
    assert found.item() == pytest.approx(loss, rel=EXACT)
    assert relative_error(grads_of(policy), exact) < EXACT


# --------------------------------------------------------------------------------------- NumPy


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
    loss, exact = exact_step(Bigram(table), Bigram(reference), PAIRS)
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

# The shape of each trainer's call: what it passes, unpacks and does with the result. These classes
# are written from the releases that the recipe names, so they do not see what a trainer changes.


class OpenRLHFCall:
    """openrlhf/trainer/dpo_trainer.py of OpenRLHF 0.11.2: lines 64 and 163 to 197."""

    beta = BETA

    def step(self, *logps: Tensor) -> tuple[Tensor, ...]:
        loss, chosen_reward, reject_reward = self.loss_fn(*logps)
        assert isinstance(loss.item(), float)
        return loss, chosen_reward, reject_reward


class LlamaFactoryV0Call:
    """src/llamafactory/train/dpo/trainer.py of 0.9.5: lines 206 to 216 and 283 to 301."""

    beta = BETA

    def step(self, *logps: Tensor) -> tuple[Tensor, ...]:
        losses, chosen_rewards, rejected_rewards = self.dpo_loss(*logps)
        losses += 0.0 * -logps[0]  # pref_ftx, in place
        return losses.mean(), chosen_rewards, rejected_rewards


class LlamaFactoryV1Call:
    """src/llamafactory/v1/trainers/dpo_trainer.py at ff6d4d1: lines 316 to 332 and 390 to 436."""

    def step(self, *logps: Tensor) -> tuple[Tensor, ...]:
        losses = self.compute_sigmoid_dpo_loss(*logps, beta=BETA, label_smoothing=0.0)
        return losses.mean(), *(BETA * (logps[i] - logps[i + 2]).detach() for i in range(2))


class OpenInstructCall:
    """open_instruct/dpo_utils.py of 0.3.0: lines 654 to 664."""

    def step(self, *logps: Tensor) -> tuple[Tensor, ...]:
        losses, *rewards = self.dpo_loss(*logps, beta=BETA, label_smoothing=0.0)
        return losses.mean(), *rewards


CALLS = {
    "openrlhf": OpenRLHFCall,
    "llama_factory_v0": LlamaFactoryV0Call,
    "llama_factory_v1": LlamaFactoryV1Call,
    "open_instruct": OpenInstructCall,
}


@pytest.mark.parametrize("name", CALLS)
def test_shape_of_call(name) -> None:
    site = CALLS[name]()
    getattr(load("call_sites"), name)(CALLS[name] if name == "llama_factory_v0" else site)
    check_call(site.step)


def check_call(step: Callable[..., tuple[Any, ...]]) -> None:
    """A trainer's step returns the mean of SPO, and the rewards of DPO without a gradient."""
    torch.manual_seed(0)
    logps = [(-20.0 - 5.0 * torch.rand(4)).requires_grad_() for _ in range(4)]
    loss, *rewards = step(*logps)
    x = BETA * (logps[0] - logps[1] - logps[2] + logps[3])
    expected = (-x * torch.exp(-x)).mean()
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, logps[:2])
    torch.testing.assert_close(grads, torch.autograd.grad(expected, logps[:2]))
    of_dpo = [BETA * (logps[i] - logps[i + 2]).detach() for i in range(2)]
    torch.testing.assert_close(rewards, of_dpo)
    assert not any(reward.requires_grad for reward in rewards)


# ------------------------------------------------------------------------------------- ms-swift


class MsSwiftCall:
    """swift/rlhf_trainers/dpo_trainer.py of ms-swift 4.6.0: lines 87 to 90, 228 and 397 to 410."""

    beta = BETA
    label_smoothing, reference_free, f_divergence_type = 0.0, False, "reverse_kl"

    def dpo_loss(self, *arguments: Any) -> tuple[Any, ...]:
        return arguments

    def step(self, loss_type: str, *logps: Tensor) -> tuple[Any, ...]:
        losses, chosen_rewards, rejected_rewards = self.dpo_loss(*logps, loss_type, {})
        return losses.mean(), chosen_rewards, rejected_rewards


@pytest.fixture
def ms_swift_trainer(monkeypatch: pytest.MonkeyPatch) -> type[MsSwiftCall]:
    """The class that ms-swift finds in its table after it has imported the plugin."""
    table = {"dpo": "swift.rlhf_trainers.DPOTrainer"}
    stand_ins = {
        "swift": {},
        "swift.rlhf_trainers": {"DPOTrainer": MsSwiftCall},
        "swift.trainers": {"TrainerFactory": SimpleNamespace(TRAINER_MAPPING=table)},
    }
    for name, contents in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ms_swift", raising=False)
    load("ms_swift")
    module_name, _, class_name = table["dpo"].rpartition(".")
    return getattr(sys.modules.pop(module_name), class_name)


def test_ms_swift(ms_swift_trainer) -> None:
    check_call(partial(ms_swift_trainer().step, "spo"))


def test_ms_swift_keeps_its_other_losses(ms_swift_trainer) -> None:
    call = (*range(4), "sft", {})
    assert ms_swift_trainer().dpo_loss(*call) == call


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing", 0.1),
        ("reference_free", True),
        ("f_divergence_type", "js_divergence"),
    ],
)
def test_ms_swift_refuses_options_of_other_losses(ms_swift_trainer, name, value) -> None:
    trainer = ms_swift_trainer()
    setattr(trainer, name, value)
    with pytest.raises(ValueError, match=name):
        trainer.step("spo", *torch.zeros(4, 2))


# ------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", ["plain_pytorch", "padding_free", "shared_prompts"])
def test_recipe_runs_as_a_script(name) -> None:
    first, *others = run_script(name)
    assert first == pytest.approx(0.0, abs=1e-6)  # the reference is a copy of the policy
    assert others[-1] < -0.01


def test_call_sites_run_as_a_script() -> None:
    assert len(run_script("call_sites")) == 3


def test_the_page_lists_every_recipe() -> None:
    linked = re.findall(r"\]\((\w+\.py)\)", (RECIPES / "README.md").read_text())
    files = {path.name for path in RECIPES.glob("*.py") if not path.name.startswith("toy")}
    assert set(linked) == files
