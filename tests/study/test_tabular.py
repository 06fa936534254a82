"""The tabular study: its optimum, its minima and its training against independent arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import log_softmax

from benchmarks.studies import tabular
from benchmarks.studies import tabular_methods as methods
from benchmarks.studies.tabular import Size
from benchmarks.studies.tabular_methods import Pairs, World
from spoloss import DPO, SPO, Squared

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
def test_no_policy_beats_the_optimum_and_kl_is_what_it_lacks(world, beta) -> None:
    rng = np.random.default_rng(2)
    optimum = world.optimum(beta)
    np.testing.assert_allclose(np.exp(optimum).sum(1), 1.0, rtol=1e-12)
    best = objective(world, optimum, beta)
    for size in (1e-3, 0.1, 3.0):
        policy = log_softmax(optimum + size * rng.normal(size=optimum.shape), axis=-1)
        lacks = best - objective(world, policy, beta)
        assert lacks > 0.0
        assert beta * methods.kl(policy, optimum) == pytest.approx(lacks, rel=1e-6, abs=1e-12)


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


@pytest.mark.parametrize(
    ("probability", "spo"), [(0.6, 0.10), (0.8, 0.34), (0.9, 0.52), (0.99, 0.89)]
)
def test_where_flipped_labels_lead(probability, spo) -> None:
    """The minimum in x of the mean loss of labels that are right with a probability."""
    log_odds = math.log(probability / (1.0 - probability))
    found = brentq(lambda x: 2.0 * x + 2.0 * math.atanh(x) - log_odds, 0.0, 1.0 - 1e-15)
    assert found == pytest.approx(spo, abs=0.005)
    for loss, x in ((DPO(), log_odds), (SPO(), found), (Squared(), 2.0 * probability - 1.0)):
        mean = lambda x, loss=loss: (  # noqa: E731
            probability * loss.value(x, 1.0) + (1.0 - probability) * loss.value(-x, 1.0)
        )
        # Scanned, since there may be other stationary points.
        grid = np.linspace(-1.0, 6.0, 7001)
        assert grid[mean(grid).argmin()] == pytest.approx(x, abs=0.001)


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


def test_a_row_is_of_the_trained_policies() -> None:
    size, beta = Size(prompts=3, responses=6, pairs=60, steps=40, seeds=2), 0.5
    row = tabular.study(size, [beta]).set_index(["labels", "method"]).loc["noisy", "SPO(beta)"]
    method, late, changes = METHODS["SPO(beta)"], [], []
    for seed in range(size.seeds):
        rng = np.random.default_rng(seed)
        world = methods.draw_world((size.prompts, size.responses), rng)
        both = methods.draw_pairs(world, size.pairs, rng)
        methods.label(world, both, rng, noisy=False)  # draws no random numbers
        pairs = methods.label(world, both, rng, noisy=True)
        gradient, optimum = method.gradient(world, pairs, beta), world.optimum(beta)
        policies = tabular.adam(gradient, world.reference, (30, 40))
        p = np.exp(optimum)
        distances = [np.mean(np.sum(p * (optimum - policy), axis=1)) for policy in policies]
        late.append(distances[1])
        changes.append(distances[1] - distances[0])
    assert row["kl"] == pytest.approx(np.mean(late), rel=1e-9)
    assert row["kl_error"] == pytest.approx(abs(late[0] - late[1]) / 2, rel=1e-6)
    assert row["kl_change"] == pytest.approx(np.mean(changes), rel=1e-6)


def test_a_diverged_seed_empties_the_mean(monkeypatch) -> None:
    starts = []

    def adam(_, start, stops):
        starts.append(start)
        gradient = np.full_like(start, math.inf if len(starts) == 1 else 0.0)
        return trained(lambda _: gradient, start, stops)

    trained = tabular.adam
    monkeypatch.setattr(tabular, "adam", adam)
    table = tabular.study(Size(3, 6, 20, 4, 2), [0.5]).set_index(["labels", "method"])
    assert table["diverged"].tolist() == [0, 1] + [0] * 12
    assert math.isnan(table["kl"]["clean", "DPO(beta)"])
    assert table["kl"].count() == 13


def test_small_study_ranks_as_the_theory_says() -> None:
    table = tabular.study(Size(4, 8, 200, 300, 3), betas=(1.0,)).set_index(["labels", "method"])
    assert len(table) == 2 * 5 + 4
    clean, noisy = table.loc["clean"], table.loc["noisy"]
    for method in ("DPO, soft labels s(gap)", "squared, known gap"):
        assert clean["kl"][method] < 0.1 * clean["kl"]["SPO(beta)"]
    assert clean["kl"]["SPO(beta)"] < clean["kl"]["no training"] < clean["kl"]["DPO(beta)"]
    assert math.isnan(clean["kl_endless"]["DPO(beta)"])
    assert clean["kl_change"]["DPO(beta)"] > 0.0
    assert noisy["kl_endless"]["DPO(beta)"] == pytest.approx(0.0, abs=1e-12)
    assert noisy["kl_endless"]["SPO(beta)"] > 0.05
    assert (table["diverged"] == 0).all()
    assert (table["kl_error"] > 0.0).all()
