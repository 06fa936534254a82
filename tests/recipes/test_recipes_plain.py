"""The recipes without a framework make the gradient that `exact_step` makes."""

from __future__ import annotations

import re
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.interpreter import RECIPES, run_python
from helpers.recipes_oracle import (
    BETA,
    EVEN,
    PAIRS,
    UNEVEN,
    assert_step,
    exact_step,
    grads_of,
    load,
    models,
    run_script,
    toy,
)
from spoloss.torch import head_of

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------- PyTorch


def plain(form: str, size: int, policy: nn.Module, reference: nn.Module) -> float:
    heads = (head_of(policy), head_of(reference)) if form == "tiles" else ()
    loss_of = partial(getattr(load("plain_pytorch"), f"loss_by_{form}"), policy, reference, *heads)
    batches = [toy.collate(PAIRS[i : i + size]) for i in range(0, len(PAIRS), size)]
    return load("plain_pytorch").accumulate(loss_of, batches, BETA)


def padding_free(form: str, policy: nn.Module, reference: nn.Module) -> float:
    recipe = load("padding_free")
    heads = ([head_of(policy)], [head_of(reference)]) if form == "tiles" else ([], [])
    by, models = getattr(recipe, f"by_{form}"), (policy, reference)
    sides = [partial(by, model, *head) for model, head in zip(models, heads, strict=True)]
    loss = recipe.mean_loss(*sides, recipe.pack(PAIRS), BETA)
    loss.backward()
    return loss.item()


def shared_prompts(policy: nn.Module, reference: nn.Module) -> float:
    recipe = load("shared_prompts")
    row, heads = recipe.pack(PAIRS), (head_of(policy), head_of(reference))
    assert row.ids.shape[1] == sum(len(part) for pair in PAIRS for part in pair)
    loss = recipe.mean_loss(policy, reference, heads, row, BETA)
    loss.backward()
    return loss.item()


STEPS = {
    f"{name}, {form}": partial(step, form, *options)
    for name, step, *options in [
        ("plain, even", plain, EVEN),
        ("plain, uneven", plain, UNEVEN),
        ("padding-free", padding_free),
    ]
    for form in ("logits", "tiles")
} | {"shared prompts": shared_prompts}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(("tied", "attention"), [(False, "sdpa"), (True, "eager")])
def test_pytorch(step, tied, attention) -> None:
    policy, reference = models(tied=tied)
    for model in (policy, reference):
        model.set_attn_implementation(attention)
    assert_step(step(policy, reference), grads_of(policy), exact_step(policy, reference, PAIRS))


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
    loss, grad = load("numpy_bigram").loss_and_grad(table, reference, PAIRS, BETA)
    exact = exact_step(Bigram(table), Bigram(reference), PAIRS)
    assert_step(loss, {"table": torch.tensor(grad)}, exact, 1e-10)


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


# ------------------------------------------------- trainers that are not installed: their calls

LOSSES = {  # by function of call_sites.py, how that trainer calls what the function has replaced
    "openrlhf": lambda site, *logps: site.loss_fn(*logps),
    "llama_factory_v0": lambda site, *logps: site().dpo_loss(*logps),
    "llama_factory_v1": lambda site, *logps: (
        site.compute_sigmoid_dpo_loss(*logps, beta=BETA, label_smoothing=0.0),
        *rewards_of_dpo(*logps),  # its own
    ),
    "open_instruct": lambda site, *logps: site.dpo_loss(*logps, beta=BETA, label_smoothing=0.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_call_sites(name) -> None:
    site = type("Site", (), {"beta": BETA})
    getattr(load("call_sites"), name)(site)
    check_call(partial(LOSSES[name], site), count=0 if name == "openrlhf" else 4)


def rewards_of_dpo(*logps: Tensor) -> list[Tensor]:
    return [BETA * (logps[i] - logps[i + 2]).detach() for i in range(2)]


def check_call(call: Any, count: int = 4) -> None:
    """The trainer gets losses, or if `count` is 0 their mean, and rewards without a gradient."""
    torch.manual_seed(0)
    logps = [(-20.0 - 5.0 * torch.rand(4)).requires_grad_() for _ in range(4)]
    losses, *rewards = call(*logps)
    assert losses.shape == ((count,) if count else ())
    x = BETA * (logps[0] - logps[1] - logps[2] + logps[3])
    expected = (-x * torch.exp(-x)).mean()
    torch.testing.assert_close(losses.mean(), expected)
    losses += 0.0  # in place, as LLaMA-Factory does
    grads = torch.autograd.grad(losses.mean(), logps[:2])
    torch.testing.assert_close(grads, torch.autograd.grad(expected, logps[:2]))
    torch.testing.assert_close(rewards, rewards_of_dpo(*logps))
    assert not any(reward.requires_grad for reward in rewards)


@pytest.fixture
def ms_swift_trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer of the class that ms-swift finds in its table after it has imported the plugin."""
    options = {"label_smoothing": 0.0, "reference_free": False, "f_divergence_type": "reverse_kl"}
    theirs = type("DPOTrainer", (), {"beta": BETA, "dpo_loss": lambda _, *call: call, **options})
    table: dict[str, str] = {}
    for name, contents in {
        "swift": {},
        "swift.rlhf_trainers": {"DPOTrainer": theirs},
        "swift.trainers": {"TrainerFactory": SimpleNamespace(TRAINER_MAPPING=table)},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ms_swift", raising=False)
    load("ms_swift")
    module_name, _, class_name = table["dpo"].rpartition(".")
    return getattr(sys.modules.pop(module_name), class_name)()


def test_ms_swift(ms_swift_trainer) -> None:
    check_call(lambda *logps: ms_swift_trainer.dpo_loss(*logps, "spo", {}))
    of_another_loss = (*range(4), "sft", {})
    assert ms_swift_trainer.dpo_loss(*of_another_loss) == of_another_loss


@pytest.mark.parametrize(
    "option",
    [
        {"label_smoothing": 0.1},
        {"reference_free": True},
        {"f_divergence_type": "js_divergence"},
    ],
)
def test_ms_swift_refuses_options_of_other_losses(ms_swift_trainer, option) -> None:
    vars(ms_swift_trainer).update(option)
    with pytest.raises(ValueError, match=next(iter(option))):
        ms_swift_trainer.dpo_loss(*torch.zeros(4, 2), "spo", {})


# ------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", ["plain_pytorch", "padding_free", "shared_prompts"])
def test_recipe_runs_as_a_script(name) -> None:
    first, *others = run_script(name)
    assert first == pytest.approx(0.0, abs=1e-6)  # the reference is a copy of the policy
    assert others[-1] < -0.01


def test_the_page_lists_every_recipe() -> None:
    linked = re.findall(r"\]\((\w+\.py)\)", (RECIPES / "README.md").read_text())
    files = {path.name for path in RECIPES.glob("*.py") if not path.name.startswith("toy")}
    assert set(linked) == files
