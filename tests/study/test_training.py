"""How the studies train, judge and compare."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch

from benchmarks.studies import results, training
from benchmarks.studies.arms import FORMS, Arm, Logps, parse_arm
from benchmarks.studies.evaluation import best_of, find_limits, tie_rate, tilt, win_rate
from benchmarks.studies.experiment import labelled_for, wrong_labels
from benchmarks.studies.training import Answers, Pairs, Stage
from helpers.studies import TablePolicy

pytestmark = [pytest.mark.extended, pytest.mark.usefixtures("one_thread")]


# --------------------------------------------------------------------------- win rates and limits


def test_win_rate_is_over_all_pairs_of_unequal_number() -> None:
    ours = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]])
    theirs = np.array([[2.0, 2.0, 0.0], [0.0, 7.0, 5.0]])
    points = []
    for a, b in zip(ours, theirs, strict=True):
        for i, j in itertools.permutations(range(3), 2):
            points.append(1.0 if a[i] > b[j] else 0.5 if a[i] == b[j] else 0.0)
    assert win_rate(ours, theirs) == pytest.approx(statistics.fmean(points))
    assert win_rate(ours, theirs) + win_rate(theirs, ours) == pytest.approx(1.0)
    assert win_rate(ours, ours) == 0.5
    # Equal numbers left out: a text never meets the one that was drawn along with it.
    assert win_rate(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])) == 0.5
    assert win_rate(np.array([[1.0, 0.0, 2.0]]), np.array([[0.0, 2.0]])) == 0.5
    assert tie_rate(np.array([[1.0, 0.0, 2.0]]), np.array([[0.0, 2.0]])) == 0.5
    assert math.isnan(win_rate(ours, np.full((2, 3), np.nan)))


def test_limits_of_a_coin() -> None:
    coin = np.tile([0.0, 1.0], (3, 50))
    p = 1 / (1 + math.exp(-2))
    optimum = tilt(coin, beta=0.5)
    assert optimum.reward == pytest.approx(p)
    assert optimum.kl == pytest.approx(math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p))
    assert best_of(coin, 3).reward == pytest.approx(7 / 8)
    assert best_of(coin, 3).kl == pytest.approx(math.log(3) - 2 / 3)
    told = [limit["parameter"] for limit in find_limits(coin) if limit["curve"] == "best of n"]
    assert told == [1, 2, 4, 8, 16]  # 100 texts say little of the best of 32


def test_intervals_widen_with_the_number_of_comparisons() -> None:
    wins = results.Estimate((0.55, 0.57, 0.56))
    assert wins.error == pytest.approx(0.01 / math.sqrt(3))
    low, high = wins.interval(1)
    assert (low, high) == pytest.approx(
        (0.56 - 4.3027 * wins.error, 0.56 + 4.3027 * wins.error), rel=1e-4
    )
    assert results.verdict(wins.interval(1)) == "better"
    assert results.verdict(wins.interval(100)) == "not distinguishable"
    mirrored = results.Estimate(tuple(1 - value for value in wins.values))
    assert results.verdict(mirrored.interval(1)) == "worse"
    assert results.win_interval(results.Estimate((0.2, 0.8)), 1) == (0.0, 1.0)


# ----------------------------------------------------------------------------------- arms, stages


X0 = {"spo-below0": 0.0, "spo-below-1": -1.0, "spo-below-2": -2.0}


def loss_by_hand(form: str, beta: float, h: np.ndarray, gap: np.ndarray) -> float:
    def curve(x: np.ndarray, x0: float = -math.inf) -> np.ndarray:
        tangent = math.exp(-x0) * (-x0 + (x0 - 1) * (x - x0)) if math.isfinite(x0) else x
        return np.where(x < x0, tangent, -x * np.exp(-x))

    p = 1 / (1 + np.exp(-gap))
    x = beta * h
    return float(
        np.mean(
            {
                "dpo": np.log1p(np.exp(-x)),
                "spo": curve(x),
                **{name: curve(x, x0) for name, x0 in X0.items()},
                "squared": (h - 1 / beta) ** 2,
                "dpo-soft": p * np.log1p(np.exp(-x)) + (1 - p) * np.log1p(np.exp(x)),
                "squared-gap": (h - gap / beta) ** 2,
                "spo-gap": curve(x / gap),
                "spo-gap-floor": curve(x / np.maximum(gap, 0.5)),
                "spo-gap-weighted": gap**2 * curve(x / gap),
                "spo-gap-weighted-below0": gap**2 * curve(x / gap, 0.0),
                "dpo-weighted": gap * np.log1p(np.exp(-x)),
                "spo-weighted-below0": gap * curve(x, 0.0),
            }[form]
        )
    )


@pytest.mark.parametrize("form", FORMS)
def test_losses_of_the_arms(form: str) -> None:
    rng = np.random.default_rng(0)
    logps = rng.normal(-20, 3, (4, 64))
    logps[0, 0] -= 30.0  # a pair far on the steep side
    gap = rng.uniform(0.1, 3, 64)
    h = (logps[0] - logps[2]) - (logps[1] - logps[3])
    assert (0.3 * h).min() < -2
    got = Arm(form, 0.3).loss(Logps(*map(torch.tensor, logps)), torch.tensor(gap))
    assert got.item() == pytest.approx(loss_by_hand(form, 0.3, h, gap), rel=1e-9)


def some_pairs(number: int) -> Pairs:
    inputs = {"answer": torch.arange(2 * number)}
    rewards = torch.cat((torch.linspace(0.5, 2, number), torch.zeros(number)))
    answers = Answers(inputs, rewards, training.score(TablePolicy(2 * number), inputs))
    return Pairs(answers, torch.arange(number), number + torch.arange(number))


def test_wrong_labels_exchange_chosen_and_rejected() -> None:
    pairs = some_pairs(4)
    torch.testing.assert_close(pairs.gap, torch.linspace(0.5, 2, 4))
    wrong = torch.tensor([True, False, True, False])
    flipped = pairs.flipped(wrong)
    assert flipped.chosen.tolist() == [4, 1, 6, 3]
    assert flipped.rejected.tolist() == [0, 5, 2, 7]
    assert (flipped.gap == torch.where(wrong, -pairs.gap, pairs.gap)).all()
    policy = TablePolicy(8)
    policy.scores.data = torch.linspace(-2, 1, 8)
    right, exchanged = training.pair_logps(policy, pairs), training.pair_logps(policy, flipped)
    for got, want in zip(exchanged, right.reversed(), strict=True):
        torch.testing.assert_close(got[wrong], want[wrong])
    for got, want in zip(exchanged, right, strict=True):
        torch.testing.assert_close(got[~wrong], want[~wrong])


def test_kinds_of_labels() -> None:
    answers = Answers({}, torch.tensor([1.0, 0.0]), torch.zeros(2))
    number = 4000
    pairs = Pairs(answers, torch.zeros(number).long(), torch.ones(number).long())

    def share_wrong(arm: str) -> float:
        return (labelled_for(parse_arm(arm), pairs, 0).gap < 0).double().mean().item()

    assert share_wrong("spo:0.1") == 0.0
    for arm, share in (
        ("spo:0.1@flip20", 0.2),
        ("dpo:1@flip40", 0.4),
        ("dpo:1@noisy", 1 / (1 + math.e)),
    ):
        assert abs(share_wrong(arm) - share) < 5 * math.sqrt(share * (1 - share) / number), arm
    # All arms of a seed are given the same labels.
    first, second = (wrong_labels("flip20", pairs, seed) for seed in (0, 1))
    assert (first == wrong_labels("flip20", pairs, 0)).all()
    assert (first != second).any()


def train(arm: str, start: float) -> training.Trained:
    """From a policy that has every pair in the wrong order, at h = start."""
    pairs, policy = some_pairs(16), TablePolicy(32)
    with torch.no_grad():
        policy.scores[:16] += start
    stage = Stage(pairs=16, steps=30, batch=16, lr=0.5, lr_end=1.0, clip=None)
    batches = lambda _: training.fixed_batches(pairs, stage, 0)  # noqa: E731
    return training.train_on_pairs(policy, batches, parse_arm(arm), stage)


def test_a_run_stops_at_the_first_loss_that_is_not_finite() -> None:
    # At x = -50 the loss is finite, and the squares of its gradient are not.
    stopped = train("spo:1", -50.0)
    assert stopped.stopped_at == 1
    assert stopped.summary()["grad_norm_max"] == math.inf
    assert stopped.summary()["steps"] == 0
    assert stopped.lowest_x == pytest.approx(-50.0)
    assert stopped.policy.scores[0].item() == -50.0
    # SPO is convex below its target and takes pairs from -20 towards it.
    finite = train("spo:1", -20.0)
    assert (finite.stopped_at, finite.summary()["steps"]) == (None, 30)
    assert finite.policy.scores[0] > -20.0
    assert train("spo-below0:1", -50.0).stopped_at is None


def test_a_run_without_a_batch_takes_no_step() -> None:
    stage = Stage(pairs=16, steps=2, batch=16)
    none = training.train_on_pairs(TablePolicy(2), lambda _: iter(()), parse_arm("dpo:1"), stage)
    summary = none.summary()
    assert (summary["steps"], summary["stopped_at"]) == (0, None)
    assert math.isnan(summary["grad_norm_max"])


def test_the_loop_is_plain_adamw() -> None:
    """Against PyTorch's own optimizer and schedule: steps, clipping, and the order of pairs."""
    stage = Stage(pairs=16, steps=5, batch=4, lr=0.1, clip=0.1)
    pairs, arm, start = some_pairs(16), parse_arm("spo:0.5"), TablePolicy(32)
    batches = list(training.fixed_batches(pairs, stage, 3))
    trained = training.train_on_pairs(start, lambda _: iter(batches), arm, stage)
    assert torch.cat([each.chosen for each in batches[:4]]).sort().values.tolist() == [*range(16)]
    scores = torch.zeros(32, requires_grad=True)
    adamw = torch.optim.AdamW([scores], lr=0.1, weight_decay=0.0)
    for step, batch in enumerate(batches):
        adamw.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 5))
        x = 0.5 * (scores[batch.chosen] - scores[batch.rejected])
        (-x * torch.exp(-x)).mean().backward()
        norm = scores.grad.norm()
        assert trained.grad_norms[step] == pytest.approx(norm.item(), rel=1e-5)
        scores.grad *= min(1.0, 0.1 / norm.item())
        adamw.step()
        adamw.zero_grad()
    torch.testing.assert_close(trained.policy.scores, scores, rtol=0, atol=1e-4)
    assert (start.scores == 0).all()
