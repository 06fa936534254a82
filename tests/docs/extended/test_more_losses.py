"""The gallery of losses against TRL's own numbers, the papers' equations, and `check_loss`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import more_losses as more
from helpers.backends import Backend
from helpers.recipes_oracle import relative_error
from helpers.trl_losses import (
    Numbers,
    cpo_numbers,
    cpo_trainer,
    dpo_numbers,
    dpo_trainer,
    first_batch,
    numbers_of,
    orpo_numbers,
)
from spoloss import DPO, Squared, pair_grad, pair_loss
from spoloss.losses import pairwise
from spoloss.testing import check_loss
from spoloss.torch import Completions, Head, linear_logps, linear_pair_loss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # TRL 1.16 asks for gradient checkpointing by names that Transformers 5.23 will drop.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_.*)?` is:FutureWarning"),
]

EXAMPLES = Path(more.__file__).parent
BETAS = (0.1, 2.0)
BETA = 0.5  # of the whole models


@dataclass(frozen=True)
class Entry:
    """A loss of the gallery, mostly away from its defaults, and what means the same in TRL."""

    loss: Any
    options: dict[str, Any]
    trainer: str = "dpo"  # the others average the log-probabilities, without a reference
    float32: bool = False  # whether TRL computes in float32, whatever it gets


SIMPO = more.SimPO(gamma=0.8)
ENTRIES = {
    "hinge": Entry(more.Hinge(), {"loss_type": "hinge"}),
    "robust": Entry(more.RobustDPO(0.2), {"loss_type": "robust", "label_smoothing": 0.2}),
    "discopop": Entry(more.DiscoPOP(tau=0.1), {"loss_type": "discopop", "discopop_tau": 0.1}),
    "exo": Entry(more.EXO(0.01), {"loss_type": "exo_pair", "label_smoothing": 0.01}),
    "nca": Entry(more.NCA(), {"loss_type": "nca_pair"}),
    "bco": Entry(more.BCO(), {"loss_type": "bco_pair"}),
    "sppo": Entry(more.SPPOHard(), {"loss_type": "sppo_hard"}),
    "apo_zero": Entry(more.APOZero(), {"loss_type": "apo_zero"}),
    "apo_down": Entry(more.APODown(), {"loss_type": "apo_down"}),
    "forward_kl": Entry(more.Scored(DPO(), more.Power(-1.0)), {"f_divergence_type": "forward_kl"}),
    "jensen_shannon": Entry(
        more.Scored(DPO(), more.JensenShannon()), {"f_divergence_type": "js_divergence"}
    ),
    "alpha_divergence": Entry(
        more.Scored(DPO(), more.Power(0.6 - 1.0)),
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6},
        float32=True,
    ),
    "simpo": Entry(SIMPO, {"simpo_gamma": 0.8}, "cpo"),
    "alphapo": Entry(
        more.Scored(SIMPO, more.Power(-0.25)), {"simpo_gamma": 0.8, "alpha": 0.25}, "cpo"
    ),
    "orpo": Entry(more.Scored(DPO(), more.LogOdds()), {}, "orpo", float32=True),
}


# What TRL 1.16 lacks or computes in float32, as the papers write it: of u_w, u_l and beta.
PAPERS: dict[str, tuple[Any, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "BCO with a delta": (
        more.BCO(delta=0.7),
        lambda w, r, b: -logsigmoid(b * w - 0.7) - logsigmoid(-(b * r - 0.7)),
    ),
    "DPOP": (
        more.DPOP(penalty=5.0),
        lambda w, r, b: -logsigmoid(b * (w - r - 5.0 * torch.relu(-w))),
    ),
    "Cal-DPO": (
        more.CalDPO(),
        lambda w, r, b: (
            -logsigmoid(w - r) + 0.5 * ((w - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2)
        ),
    ),
    "chi-PO": (
        more.Scored(DPO(), more.ChiSquared()),
        lambda w, r, b: -logsigmoid(b * (w.exp() + w) - b * (r.exp() + r)),
    ),
    "ORPO": (
        more.Scored(DPO(), more.LogOdds()),
        lambda w, r, b: (
            -logsigmoid(b * torch.log((w.exp() / (1 - w.exp())) / (r.exp() / (1 - r.exp()))))
        ),
    ),
}


GALLERY = [entry.loss for entry in ENTRIES.values()] + [loss for loss, _ in PAPERS.values()]


@pytest.mark.parametrize("loss", GALLERY, ids=str)
def test_the_gallery_keeps_the_rules(loss: Any) -> None:
    # Scores with e^u have no limit where the other completion is forbidden.
    unbounded = isinstance(loss, more.Scored) and isinstance(
        loss.score, (more.Power, more.ChiSquared)
    )
    check_loss(loss, limits=not unbounded)


def logps_at(x: np.ndarray, beta: float, entry: Entry) -> tuple[Tensor, ...]:
    """Four log-probabilities of pairs: with the given x = beta * h, or averages per token."""
    random = np.random.default_rng(0)
    if entry.trainer != "dpo":
        zeros = torch.zeros(len(x), dtype=torch.float64)
        return *torch.tensor(-random.uniform(0.05, 6.0, size=(2, len(x)))), zeros, zeros
    rejected, ref_chosen, ref_rejected = random.normal(size=(3, len(x))) * 6.0 - 40.0
    if entry.float32:
        x, ref_rejected = x * beta / 4.0, rejected + random.normal(size=len(x))
    chosen = x / beta + rejected + ref_chosen - ref_rejected
    return tuple(map(torch.tensor, (chosen, rejected, ref_chosen, ref_rejected)))


def numbers_of_trl(entry: Entry, folder: Path, beta: float) -> Numbers:
    x = np.concatenate([np.linspace(-6.0, 9.0, 16), [1e-6, -0.1, 0.05, -30.0, 30.0]])
    logps = logps_at(x, beta, entry)
    if entry.float32:
        logps = tuple(array.float() for array in logps)
    if entry.trainer == "cpo":
        return cpo_numbers(cpo_trainer(folder, beta, **entry.options), logps)
    if entry.trainer == "orpo":
        return orpo_numbers(logps, beta)
    return dpo_numbers(dpo_trainer(folder, beta, **entry.options), logps)


def check_against(loss: Any, want: Numbers, *, rtol: float) -> None:
    """Value, slopes and autograd of each pair, to the rounding of x = beta * h."""
    sides = [side.clone().requires_grad_() for side in want.logps[:2]]
    call = {"beta": want.beta, "reduction": "none"}
    losses = pair_loss(loss, *sides, *want.logps[2:], **call)
    by_autograd = torch.autograd.grad(losses.sum(), sides, materialize_grads=True)
    close = {"rtol": rtol, "atol": rtol / 100.0}
    torch.testing.assert_close(losses.detach(), want.losses, **close)
    for mine in (by_autograd, pair_grad(loss, *want.logps, **call)):
        torch.testing.assert_close(tuple(mine), (want.by_chosen, want.by_rejected), **close)


@pytest.mark.parametrize("name", ENTRIES)
def test_trls_own_code_agrees(name: str, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    for beta in (1.0,) if name == "orpo" else BETAS:
        want = numbers_of_trl(entry, tmp_path, beta)
        check_against(entry.loss, want, rtol=3e-4 if entry.float32 else 1e-11)


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_equation_agrees(name: str) -> None:
    loss, formula = PAPERS[name]
    random, zeros = np.random.default_rng(1), torch.zeros(40, dtype=torch.float64)
    low, high = (-4.0, -0.05) if name == "ORPO" else (-6.0, 6.0)
    for beta in BETAS:
        sides = [side.requires_grad_() for side in torch.tensor(random.uniform(low, high, (2, 40)))]
        want = numbers_of((*sides, zeros, zeros), beta, formula(*sides, beta), sides)
        check_against(loss, want, rtol=1e-9)


@pytest.mark.parametrize("loss", GALLERY, ids=str)
def test_every_array_library_computes_the_same(loss: Any, backend: Backend) -> None:
    points = np.random.default_rng(2).uniform(-2.0, -0.01, (2, 30))
    of_pairs, beta = pairwise(loss), np.linspace(0.1, 2.0, 30)
    tensors = *map(torch.tensor, points), torch.tensor(beta)
    want = of_pairs.value(*tensors), *of_pairs.slopes(*tensors)
    arrays = backend.arrays(*points, beta)
    got = of_pairs.value(*arrays), *of_pairs.slopes(*arrays)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(
            np.asarray(a), b, rtol=backend.rtol(1e-11), atol=backend.rtol(1e-12)
        )


# Whole models


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def fused_step(trainer: Any, loss: Any, *, beta: float, average: bool = False) -> Tensor:
    """The loss of DPOTrainer's first batch through the fused head."""
    batch = first_batch(trainer)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    hidden, ref_hidden = (
        model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        for model in (trainer.model, trainer.ref_model)
    )
    ref_head = Head(trainer.ref_model.lm_head.weight)
    ref_logps = linear_logps(ref_head, Completions(ref_hidden, labels), average=average)
    chosen, rejected = map(Completions, hidden.chunk(2), labels.chunk(2))
    references = ref_logps.detach().chunk(2)
    head = Head(trainer.model.lm_head.weight)
    call = {"beta": beta, "average": average}
    return linear_pair_loss(loss, head, chosen, rejected, *references, **call).loss


@pytest.mark.parametrize(
    ("options", "loss", "beta", "average"),
    [
        (ENTRIES["apo_down"].options, ENTRIES["apo_down"].loss, BETA, False),
        ({"loss_type": "sigmoid_norm"}, DPO(), BETA, True),
        ({"loss_type": "ipo"}, Squared(), 2.0 * BETA, True),
    ],
    ids=["apo_down", "sigmoid_norm", "ipo"],
)
def test_a_step_of_trl_through_the_fused_head(
    options: dict[str, Any], loss: Any, beta: float, average: bool, tmp_path: Path
) -> None:
    """Loss and every gradient are TRL's, whose log-probabilities are float32."""
    trainer = dpo_trainer(tmp_path, BETA, **options)
    theirs = trainer.compute_loss(trainer.model, first_batch(trainer))
    want = gradients(theirs, trainer.model)
    mine = fused_step(trainer, loss, beta=beta, average=average)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert relative_error(gradients(mine, trainer.model), want) < 1e-4


def test_discopop_is_finite_where_trl_is_nan(tmp_path: Path) -> None:
    logps = tuple(torch.tensor([value]) for value in (-100.0, 0.0, 0.0, 0.0))
    trainer = dpo_trainer(tmp_path, beta=1.0, loss_type="discopop")
    assert dpo_numbers(trainer, logps).losses.isnan().all()
    assert pair_loss(more.DiscoPOP(), *logps, beta=1.0).item() == pytest.approx(100.0)


def test_where_discopop_goes_uphill() -> None:
    x = np.linspace(-1.0, 1.0, 20_001)
    uphill = x[more.DiscoPOP().slope(x, 1.0) > 0.0]
    assert (uphill.min(), uphill.max()) == pytest.approx((-0.119, 0.072), abs=0.0006)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the script of docs/your_own_loss.md leaves."""
    text = (EXAMPLES.parent / "your_own_loss.md").read_text()
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), names)
    return names


def test_kto_of_pairs_without_z_is_half_of_apo_zero(page: dict[str, Any]) -> None:
    logps = torch.randn(4, 5, dtype=torch.float64) * 6.0 - 40.0
    desirable = torch.tensor([True] * 5 + [False] * 5)
    got = page["kto_loss"](logps[:2].ravel(), logps[2:].ravel(), desirable, 0.0, beta=0.2)
    torch.testing.assert_close(got, pair_loss(more.APOZero(), *logps, beta=0.2) / 2.0)
    moved = page["kto_loss"](logps[:2].ravel(), logps[2:].ravel() - 3.0, desirable, 3.0, beta=0.2)
    torch.testing.assert_close(moved, got)


def test_plackett_luce_is_a_product_of_choices(page: dict[str, Any]) -> None:
    logps, ref_logps = torch.randn(2, 4, 3, dtype=torch.float64)
    rewards = 0.7 * (logps - ref_logps)
    first = rewards.softmax(-1)[:, 0]
    second = rewards[:, 1:].softmax(-1)[:, 0]
    got = page["plackett_luce_loss"](logps, ref_logps, beta=0.7)
    torch.testing.assert_close(got, -(first * second).log().mean())
    two = page["plackett_luce_loss"](logps[:, :2], ref_logps[:, :2], beta=0.7)
    four = logps[:, 0], logps[:, 1], ref_logps[:, 0], ref_logps[:, 1]
    torch.testing.assert_close(two, pair_loss(DPO(), *four, beta=0.7))
