"""The tabular study: its optimum, its minima and its training against independent arithmetic."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from benchmarks.studies import tabular
from benchmarks.studies import tabular_methods as methods
from benchmarks.studies.tabular import Size
from benchmarks.studies.tabular_methods import Pairs, World

pytestmark = pytest.mark.extended

METHODS = {method.name: method for method in methods.UNKNOWN_GAP + methods.KNOWN_GAP}
SMALL = Size(prompts=3, responses=6, pairs=60, steps=200, seeds=2)


@pytest.fixture
def world() -> World:
    return methods.draw_world((SMALL.prompts, SMALL.responses), np.random.default_rng(1))


def objective(world: World, policy: np.ndarray, beta: float) -> float:
    """Equation 1, written out."""
    p = np.exp(policy)
    rows = (p * world.reward).sum(1) - beta * (p * (policy - world.reference)).sum(1)
    return float(rows.mean())


# ------------------------------------------------------------------------------------ the optimum


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_no_policy_beats_the_optimum_and_regret_is_what_it_lacks(world, beta) -> None:
    rng = np.random.default_rng(2)
    optimum = world.optimum(beta)
    np.testing.assert_allclose(np.exp(optimum).sum(1), 1.0, rtol=1e-12)
    best = objective(world, optimum, beta)
    for size in (1e-3, 0.1, 3.0):
        policy = log_softmax(optimum + size * rng.normal(size=optimum.shape), axis=-1)
        lacks = best - objective(world, policy, beta)
        assert lacks > 0.0
        regret = beta * methods.kl(policy, optimum)
        assert regret == pytest.approx(lacks, rel=1e-6, abs=1e-12)


# -------------------------------------------------------------------------------------- the pairs


@pytest.mark.parametrize("noisy", [False, True])
def test_labels_follow_the_reward_or_bradley_terry(world, noisy) -> None:
    rng = np.random.default_rng(4)
    both = np.tile([[0, 1], [3, 2]], (20_000, 1))
    pairs = methods.label(world, both, rng, noisy=noisy)
    assert pairs.weights.sum() == pytest.approx(1.0, rel=1e-12)
    for first, second in ((0, 1), (3, 2)):
        won = pairs.weights[(pairs.chosen == first) & (pairs.rejected == second)].sum() * 2.0
        gap = world.reward[0, first] - world.reward[0, second]
        want = 1.0 / (1.0 + math.exp(-gap)) if noisy else float(gap > 0.0)
        assert won == pytest.approx(want, abs=5.0 * math.sqrt(0.25 / 20_000) if noisy else 0.0)


@pytest.mark.parametrize("noisy", [False, True])
def test_every_pair_is_what_many_draws_tend_to(world, noisy) -> None:
    pairs = methods.every_pair(world, noisy=noisy)
    many = methods.draw_pairs(world, 100_000, np.random.default_rng(5))
    drawn = methods.label(world, many, np.random.default_rng(6), noisy=noisy)
    table = np.zeros((2, world.reward.size, world.reward.size))
    for n, each in enumerate((pairs, drawn)):
        np.add.at(table[n], (each.chosen, each.rejected), each.weights)
        # Draws of the same response twice are left out, prompt by prompt.
        rows = table[n].reshape(SMALL.prompts, -1)
        rows /= rows.sum(1, keepdims=True)
    np.testing.assert_allclose(table[0], table[1], atol=5.0 * math.sqrt(0.25 / 100_000))


# ------------------------------------------------------------------------------- gradient and Adam


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_gradient_is_that_of_the_mean_loss_by_the_scores_of_a_softmax(world, method) -> None:
    both = methods.draw_pairs(world, SMALL.pairs, np.random.default_rng(7))
    pairs = methods.label(world, both, np.random.default_rng(8), noisy=False)
    scores = world.reference + 0.1 * np.random.default_rng(9).normal(size=world.reference.shape)
    got = method.gradient(world, pairs, 0.5)(scores)
    leaf = torch.tensor(scores, requires_grad=True)
    mean_loss_by_hand(method.name, world, pairs, leaf.log_softmax(-1), 0.5).backward()
    np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=1e-9, atol=1e-12)


def mean_loss_by_hand(
    name: str, world: World, pairs: Pairs, policy: torch.Tensor, beta: float
) -> torch.Tensor:
    """Each method's loss, typed from its formula."""
    reward, reference = torch.tensor(world.reward).ravel(), torch.tensor(world.reference).ravel()
    won, lost = torch.tensor(pairs.chosen), torch.tensor(pairs.rejected)
    ratio = policy.ravel() - reference
    h, gap = ratio[won] - ratio[lost], reward[won] - reward[lost]
    x, z = beta * h, beta * h / gap
    log_s = torch.nn.functional.logsigmoid
    right = torch.sigmoid(gap)
    losses = {
        "DPO(beta)": -log_s(x),
        "DPO(4 beta)": -log_s(4.0 * x),
        "IPO(beta)": (h - 0.5 / beta) ** 2,
        "SPO(beta)": -x * torch.exp(-x),
        "DPO, soft labels s(gap)": -right * log_s(x) - (1.0 - right) * log_s(-x),
        "SPO, known gap": -z * torch.exp(-z),
        "SPO, known gap, weighted, guarded": gap**2
        * torch.where(z < 0.0, -z, -z * torch.exp(-z.clamp(min=0.0))),
        "squared, known gap": (h - gap / beta) ** 2,
    }
    return (torch.tensor(pairs.weights) * losses[name]).sum()


# -------------------------------------------------------------------------------------- the minima


@pytest.mark.parametrize("probability", [0.55, 0.6, 0.8, 0.9, 0.99])
def test_where_flipped_labels_lead(probability) -> None:
    p = mpmath.mpf(probability)
    expected = {
        "DPO": lambda x: -mpmath.log(1 / (1 + mpmath.exp(-x))),
        "SPO": lambda x: -x * mpmath.exp(-x),
        "squared": lambda x: (x - 1) ** 2,
    }
    for method, (closed_form, found) in tabular.flipped_labels(probability).items():
        loss = expected[method]
        mean = lambda x, loss=loss: p * loss(x) + (1 - p) * loss(-x)  # noqa: E731
        # Scanned, since a root finder could settle on another stationary point.
        grid = np.linspace(-1.0, 6.0, 701)
        near = float(min(grid, key=lambda x, mean=mean: mean(mpmath.mpf(x))))
        minimum = mpmath.findroot(lambda x, mean=mean: mpmath.diff(mean, x), near)
        assert closed_form == pytest.approx(float(minimum), rel=1e-9)
        assert found == pytest.approx(float(minimum), rel=1e-9)


LIMITS = [
    *((method, True) for method in methods.UNKNOWN_GAP),
    *((method, False) for method in methods.UNKNOWN_GAP[2:]),
    *((method, False) for method in methods.KNOWN_GAP),  # a known gap is a known order
]


def test_dpo_has_no_limit_on_clean_labels(world) -> None:
    for method in methods.UNKNOWN_GAP[:2]:
        assert method.limit(world, False) is None


@pytest.mark.parametrize(
    ("method", "noisy"),
    [pytest.param(*case, id=f"{case[0].name}-{case[1]}") for case in LIMITS],
)
def test_endless_pairs_lead_to_the_limit(world, method, noisy) -> None:
    limit = method.limit(world, noisy)
    pairs = methods.every_pair(world, noisy=noisy)
    for beta in (0.3, 2.0):
        leaf = torch.tensor(world.tilted(limit, beta), requires_grad=True)
        loss = mean_loss_by_hand(method.name, world, pairs, leaf, beta)
        loss.backward()
        slope = leaf.grad.abs().max()
        assert slope < 1e-9 * max(1.0, 1.0 / beta)
        for moved in (0.05, -0.05, 0.5):
            rng = np.random.default_rng(12)
            near = world.tilted(limit + moved * rng.normal(size=limit.shape), beta)
            assert mean_loss_by_hand(method.name, world, pairs, torch.tensor(near), beta) > loss


def test_ipo_limit_is_least_squares(world) -> None:
    for noisy in (False, True):
        pairs = methods.every_pair(world, noisy=noisy)
        root = np.sqrt(pairs.weights)
        design = np.zeros((len(root), world.reward.size))
        rows = np.arange(len(root))
        design[rows, pairs.chosen], design[rows, pairs.rejected] = root, -root
        solved = np.linalg.lstsq(design, 0.5 * root, rcond=None)[0].reshape(world.reward.shape)
        limit = methods.ipo_limit(world, noisy)
        solved, limit = (each - each.mean(1, keepdims=True) for each in (solved, limit))
        np.testing.assert_allclose(limit, solved, atol=1e-10)


# ------------------------------------------------------------------------------------ a whole run


def test_outcome_is_of_the_trained_policy(world) -> None:
    method, beta = METHODS["SPO(beta)"], 0.5
    both = methods.draw_pairs(world, SMALL.pairs, np.random.default_rng(13))
    pairs = methods.label(world, both, np.random.default_rng(14), noisy=True)
    outcome = tabular.train(method, beta, world, pairs, world.reward, 40)
    early, late = tabular.adam(method.gradient(world, pairs, beta), world.reference, (30, 40))
    optimum = world.optimum(beta)

    def distance(policy: np.ndarray) -> float:
        return float(np.mean(np.sum(np.exp(optimum) * (optimum - policy), axis=1)))

    lacks = objective(world, optimum, beta) - objective(world, late, beta)
    assert outcome.kl == pytest.approx(distance(late), rel=1e-9)
    assert outcome.kl_change == pytest.approx(distance(late) - distance(early), rel=1e-6)
    assert outcome.regret == pytest.approx(lacks, rel=1e-6)
    assert outcome.kl_endless == pytest.approx(0.0, abs=1e-12)
    still = tabular.untrained(world, beta)
    lacks = objective(world, optimum, beta) - objective(world, world.reference, beta)
    assert (still.kl, still.regret) == pytest.approx((distance(world.reference), lacks), rel=1e-6)


def test_small_study_ranks_as_the_theory_says() -> None:
    rows = {
        (row["labels"], row["method"]): row
        for row in tabular.study(Size(4, 8, 200, 300, 3), betas=(1.0,))
    }
    assert len(rows) == 2 * 5 + 4
    clean = {method: row for (labels, method), row in rows.items() if labels == "clean"}
    for method in ("DPO, soft labels s(gap)", "squared, known gap"):
        assert clean[method]["kl"] < 0.1 * clean["SPO(beta)"]["kl"]
    assert clean["SPO(beta)"]["kl"] < clean["no training"]["kl"] < clean["DPO(beta)"]["kl"]
    assert clean["DPO(beta)"]["kl_endless"] == math.inf
    assert clean["DPO(beta)"]["kl_change"] > 0.0
    assert rows["noisy", "DPO(beta)"]["kl_endless"] == pytest.approx(0.0, abs=1e-12)
    assert rows["noisy", "SPO(beta)"]["kl_endless"] > 0.05
    for row in rows.values():
        assert row["diverged"] == 0
        assert row["kl_error"] > 0.0
        assert row["regret"] >= 0.0
