"""The gallery of losses against TRL's own numbers, autograd, differences and limits."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch
from torch import Tensor

import more_losses as more
from helpers import checks
from helpers.backends import Backend
from helpers.fused import Case, check_fused
from helpers.mutants import mutants, passed
from helpers.recipes_oracle import relative_error
from helpers.trl_losses import (
    Numbers,
    cpo_numbers,
    cpo_trainer,
    dpo_numbers,
    dpo_trainer,
    first_batch,
)
from spoloss import DPO, MarginLoss, Squared, pair_grad, pair_loss
from spoloss.torch import linear_logps, linear_pair_loss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # TRL 1.16 asks for gradient checkpointing by names that Transformers 5.23 will drop.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_.*)?` is:FutureWarning"),
]

BETAS = (0.1, 2.0)
BETA = 0.5  # of the whole models


@dataclass(frozen=True)
class Entry:
    """A loss of the gallery, away from its defaults, and the TRL options that mean the same."""

    loss: MarginLoss
    loss_type: str
    options: dict[str, float]


ENTRIES = {
    "hinge": Entry(more.Hinge(), "hinge", {}),
    "robust": Entry(more.RobustDPO(flip_rate=0.2), "robust", {"label_smoothing": 0.2}),
    "simpo": Entry(more.SimPO(gamma=0.8), "simpo", {"gamma": 0.8}),
    "discopop": Entry(more.DiscoPOP(tau=0.1), "discopop", {"discopop_tau": 0.1}),
    "exo": Entry(more.EXO(label_smoothing=0.01), "exo_pair", {"label_smoothing": 0.01}),
}


def logps_at(x: np.ndarray, beta: float, *, reference_free: bool) -> tuple[Tensor, ...]:
    """Four log-probabilities of pairs with the given x = beta * h."""
    random = np.random.default_rng(0)
    rejected, ref_chosen, ref_rejected = random.normal(size=(3, len(x))) * 6.0 - 40.0
    if reference_free:
        ref_chosen, ref_rejected = np.zeros((2, len(x)))
    chosen = x / beta + rejected + ref_chosen - ref_rejected
    return tuple(map(torch.tensor, (chosen, rejected, ref_chosen, ref_rejected)))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Numbers]]:
    """TRL's numbers by an entry's name, for every beta; each made once."""
    folder, made = tmp_path_factory.mktemp("trl"), {}
    x = np.concatenate([np.linspace(-6.0, 9.0, 16), [1e-6, -0.1, 0.05, -30.0, 30.0]])

    def make(name: str, beta: float) -> Numbers:
        entry = ENTRIES[name]
        if name == "simpo":
            trainer = cpo_trainer(folder, beta, **entry.options)
            return cpo_numbers(trainer, logps_at(x, beta, reference_free=True))
        trainer = dpo_trainer(folder, entry.loss_type, beta, **entry.options)
        return dpo_numbers(trainer, logps_at(x, beta, reference_free=False))

    def of(name: str) -> list[Numbers]:
        if name not in made:
            made[name] = [make(name, beta) for beta in BETAS]
        return made[name]

    return of


def check_against_trl(loss: Any, theirs: list[Numbers]) -> None:
    """Value, slope and autograd of each pair are TRL's, to the rounding of x = beta * h."""
    for trl in theirs:
        sides = [side.clone().requires_grad_() for side in trl.logps[:2]]
        call = {"beta": trl.beta, "reduction": "none"}
        losses = pair_loss(loss, *sides, *trl.logps[2:], **call)
        by_autograd = torch.autograd.grad(losses.sum(), sides)
        by_slope = pair_grad(loss, *trl.logps, **call)
        close = {"rtol": 1e-11, "atol": 1e-13}
        torch.testing.assert_close(losses.detach(), trl.losses, **close)
        for mine in (by_autograd, by_slope):
            torch.testing.assert_close(mine[0], trl.by_chosen, **close)
            torch.testing.assert_close(mine[1], trl.by_rejected, **close)


@pytest.mark.parametrize("name", ENTRIES)
def test_trl_by_log_probabilities(name, numbers) -> None:
    check_against_trl(ENTRIES[name].loss, numbers(name))


# ------------------------------------------------------------------------------- the fused head


def trl_step(trainer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """TRL's loss of its first batch and the gradient by all of the policy's parameters."""
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    return loss.detach(), gradients(loss, trainer.model)


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def fused_step_of_dpo(trainer: Any, loss: Any, *, beta: float, average: bool = False) -> Tensor:
    batch = first_batch(trainer)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    hidden, ref_hidden = (
        model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        for model in (trainer.model, trainer.ref_model)
    )
    ref_logps = linear_logps(ref_hidden, trainer.ref_model.lm_head.weight, labels, average=average)
    return linear_pair_loss(
        loss,
        *hidden.chunk(2),
        trainer.model.lm_head.weight,
        *labels.chunk(2),
        *ref_logps.detach().chunk(2),
        beta=beta,
        average=average,
    ).loss


def fused_step_of_cpo(trainer: Any, loss: Any, *, beta: float) -> Tensor:
    batch = first_batch(trainer)
    chosen, rejected = (
        trainer.model.model(
            batch[f"{side}_input_ids"], attention_mask=batch[f"{side}_attention_mask"]
        ).last_hidden_state
        for side in ("chosen", "rejected")
    )
    labels = batch["chosen_labels"], batch["rejected_labels"]
    return linear_pair_loss(
        loss,
        chosen,
        rejected,
        trainer.model.lm_head.weight,
        *labels,
        0.0,
        0.0,
        beta=beta,
        average=True,
    ).loss


@dataclass(frozen=True)
class Step:
    """A trainer of TRL, and its loss and gradient on its first batch."""

    trainer: Any
    loss: Tensor
    grads: dict[str, Tensor]


@pytest.fixture
def trl_of(name: str, tmp_path: Path) -> Step:
    """TRL's step with the entry's loss."""
    entry = ENTRIES[name]
    if name == "simpo":
        trainer = cpo_trainer(tmp_path, BETA, **entry.options)
    else:
        trainer = dpo_trainer(tmp_path, entry.loss_type, BETA, **entry.options)
    return Step(trainer, *trl_step(trainer))


def check_fused_against_trl(loss: Any, trl_of: Step) -> None:
    """A whole model: loss and every gradient are TRL's, whose log-probabilities are float32."""
    fused_step = fused_step_of_dpo if hasattr(trl_of.trainer, "ref_model") else fused_step_of_cpo
    check_same_step(fused_step(trl_of.trainer, loss, beta=BETA), trl_of)


def check_same_step(mine: Tensor, trl: Step) -> None:
    assert mine.item() == pytest.approx(trl.loss.item(), rel=1e-4)
    assert relative_error(gradients(mine, trl.trainer.model), trl.grads) < 1e-4


@pytest.mark.parametrize("name", ENTRIES)
def test_trl_through_the_fused_head(name, trl_of) -> None:
    check_fused_against_trl(ENTRIES[name].loss, trl_of)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("chunk_size", [3, None])
def test_fused_is_unfused(name, chunk_size) -> None:
    case = Case()
    check_fused(case, ENTRIES[name].loss, case.fused, chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("loss_type", "loss", "beta"),
    [("sigmoid_norm", DPO(), BETA), ("ipo", Squared(), 2.0 * BETA)],
)
def test_average_log_probabilities_give_two_more_of_trl(loss_type, loss, beta, tmp_path) -> None:
    trainer = dpo_trainer(tmp_path, loss_type, BETA)
    mine = fused_step_of_dpo(trainer, loss, beta=beta, average=True)
    check_same_step(mine, Step(trainer, *trl_step(trainer)))


# ------------------------------------------------------------ the slope, by every array library


@pytest.mark.parametrize("name", ENTRIES)
def test_autograd_gives_the_slope(name) -> None:
    loss = ENTRIES[name].loss
    for beta in checks.BETAS:
        margin = torch.tensor(checks.POINTS, requires_grad=True)
        (grad,) = torch.autograd.grad(loss.value(margin, beta).sum(), margin)
        slope = loss.slope(margin.detach(), beta)
        torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-15)
        by_jax = jax.grad(lambda h, beta=beta: loss.value(h, beta).sum())(margin.detach().numpy())
        np.testing.assert_allclose(by_jax, slope, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_library_keeps_the_dtype_and_the_limits(name, backend: Backend) -> None:
    loss = ENTRIES[name].loss
    checks.check_no_nan_at_infinity(loss, backend)
    for dtype in (np.float32, np.float64):
        margin = np.linspace(-90.0, 90.0, 200, dtype=dtype)
        for beta in (0.5, np.linspace(0.1, 2.0, 200, dtype=dtype)):
            theirs = beta if isinstance(beta, float) else backend.array(beta)
            for method in (loss.value, loss.slope):
                got = np.asarray(method(backend.array(margin), theirs))
                assert got.dtype == dtype
                want = method(margin.astype(np.float64), beta)
                eps = np.finfo(dtype if backend.exp is None else backend.exp).eps
                atol = 4.0 * eps * (1.0 + np.abs(beta * margin))
                assert np.all(np.abs(got - want) <= atol * (1.0 + np.abs(want)))


@pytest.mark.parametrize("name", ENTRIES)
def test_mlx(name) -> None:
    loss = ENTRIES[name].loss
    margin = np.array([-np.inf, -400.0, -3.0, -0.1, 0.0, 0.5, 3.0, 400.0, np.inf], np.float32)
    here = mx.array(margin)
    want = loss.value(margin, 0.5), loss.slope(margin, 0.5)
    got = loss.value(here, 0.5), loss.slope(here, 0.5)
    grad = mx.grad(lambda h: loss.value(h, 0.5).sum())(here)
    for mine, numpy in zip((*got, grad), (*want, want[1]), strict=True):
        np.testing.assert_allclose(np.asarray(mine), numpy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ENTRIES)
def test_compiled_and_jitted(name) -> None:
    loss = ENTRIES[name].loss
    margin = np.linspace(-5.0, 5.0, 11)
    want = loss.value(margin, 0.5)
    by_jax = jax.jit(lambda h: loss.value(h, 0.5))(jnp.asarray(margin))
    np.testing.assert_allclose(by_jax, want, rtol=1e-12)
    pairs = jax.jit(pair_loss, static_argnums=0, static_argnames="reduction")
    by_pairs = pairs(loss, margin, *jnp.zeros((3, 11)), beta=0.5, reduction="none")
    np.testing.assert_allclose(by_pairs, want, rtol=1e-12)
    by_torch = torch.compile(lambda h: loss.value(h, 0.5), fullgraph=True, backend="eager")
    np.testing.assert_allclose(by_torch(torch.tensor(margin)), want, rtol=1e-12)


def test_discopop_is_finite_where_trl_is_nan(tmp_path) -> None:
    logps = tuple(torch.tensor([value]) for value in (-100.0, 0.0, 0.0, 0.0))
    trainer = dpo_trainer(tmp_path, "discopop", beta=1.0)
    assert dpo_numbers(trainer, logps).losses.isnan().all()
    assert pair_loss(more.DiscoPOP(), *logps, beta=1.0).item() == pytest.approx(100.0)


# -------------------------------------------------------------------------------- wrong on purpose


OPTIONS = {
    "robust": {"flip_rate": 0.0},
    "simpo": {"gamma": 0.0},
    "discopop": {"tau": 1.0},
    "exo": {"label_smoothing": 0.5},
}


def wrong_losses(name: str) -> dict[str, Any]:
    loss = ENTRIES[name].loss
    lost = {"option lost": replace(loss, **OPTIONS[name])} if name in OPTIONS else {}
    return mutants(loss) | lost


@pytest.mark.parametrize("name", ENTRIES)
def test_wrong_losses_are_caught(name, numbers) -> None:
    assert passed(check_against_trl, wrong_losses(name), numbers(name)) == []


@pytest.mark.parametrize("name", ENTRIES)
def test_wrong_losses_are_caught_through_the_fused_head(name, trl_of) -> None:
    # The fused head takes its gradients from the slope: what autograd makes of the value is unseen.
    wrong = {what: loss for what, loss in wrong_losses(name).items() if what != "slope cut"}
    assert passed(check_fused_against_trl, wrong, trl_of) == []


def test_the_file_runs_as_a_script(capsys) -> None:
    runpy.run_path(more.__file__, run_name="__main__")
    printed = capsys.readouterr().out
    assert [str(loss) in printed for loss in more.GALLERY] == [True] * 5
