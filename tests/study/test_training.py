"""How the studies train, judge and compare."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax

from benchmarks.studies import training
from benchmarks.studies.arms import Arm
from benchmarks.studies.evaluation import measure_pairs, tie_rate, win_rate
from benchmarks.studies.results import interval, verdict
from benchmarks.studies.training import Answers, Pairs, Stage
from helpers.studies import TablePolicy

pytestmark = [pytest.mark.extended, pytest.mark.usefixtures("one_thread")]


# --------------------------------------------------------------------------- win rates, intervals


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


def test_intervals_widen_with_the_number_of_comparisons() -> None:
    wins = pd.Series([0.55, 0.57, 0.56])
    half = 4.3027 * 0.01 / math.sqrt(3)
    assert interval(wins, 1) == pytest.approx((0.56 - half, 0.56 + half), rel=1e-4)
    half = 8.8602 * 0.01 / math.sqrt(3)  # 1 - 0.05 / 8 of Student's distribution
    assert interval(wins, 4) == pytest.approx((0.56 - half, 0.56 + half), rel=1e-4)
    assert verdict(interval(wins, 1)) == "better"
    assert verdict(interval(wins, 100)) == "not distinguishable"
    assert verdict(interval(1 - wins, 1)) == "worse"


# ------------------------------------------------------------------------------ pairs, the loop


def some_pairs(number: int) -> Pairs:
    """The reference's log-probabilities are those of a uniform table."""
    rewards = torch.cat((torch.linspace(0.5, 2, number), torch.zeros(number)))
    logps = torch.full((2 * number,), -math.log(2 * number))
    answers = Answers({"answer": torch.arange(2 * number)}, rewards, logps, logps)
    return Pairs(answers, torch.arange(number), number + torch.arange(number))


def train(form: str, start: float) -> training.Trained:
    """From a policy that has every pair in the wrong order, at h = start."""
    pairs, policy = some_pairs(16), TablePolicy(32)
    with torch.no_grad():
        policy.scores[:16] += start
    stage = Stage(pairs=16, steps=30, batch=16, lr=0.5, lr_end=1.0, clip=math.inf)
    batches = lambda _: training.fixed_batches(pairs, stage, 0)  # noqa: E731
    return training.train_on_pairs(policy, batches, Arm(form, 1.0), stage)


def test_a_run_stops_at_the_first_loss_that_is_not_finite() -> None:
    # At x = -50 the loss is finite, and the squares of its gradient are not.
    stopped = train("spo", -50.0)
    assert stopped.stopped_at == 1
    assert stopped.summary()["grad_norm_max"] == math.inf
    assert stopped.summary()["steps"] == 0
    assert stopped.lowest_x == pytest.approx(-50.0)
    assert stopped.policy.scores[0].item() == -50.0
    # SPO is convex below its target and takes pairs from -20 towards it.
    finite = train("spo", -20.0)
    assert (finite.stopped_at, finite.summary()["steps"]) == (None, 30)
    assert finite.policy.scores[0] > -20.0
    assert train("spo-below-1", -50.0).stopped_at is None


def test_a_run_without_a_batch_takes_no_step() -> None:
    stage = Stage(pairs=16, steps=2, batch=16, lr=0.1)
    none = training.train_on_pairs(TablePolicy(2), lambda _: iter(()), Arm("dpo", 1), stage)
    summary = none.summary()
    assert (summary["steps"], summary["stopped_at"]) == (0, None)
    assert math.isnan(summary["grad_norm_max"])


def test_every_pass_has_all_pairs_in_an_order_of_its_own() -> None:
    stage = Stage(pairs=16, steps=8, batch=4, lr=0.1)
    batches = training.fixed_batches(some_pairs(16), stage, 3)
    first, second = torch.cat([each.chosen for each in batches]).view(2, 16).tolist()
    assert sorted(first) == sorted(second) == [*range(16)]
    assert first != second


def test_the_loop_is_plain_adamw() -> None:
    """Against PyTorch's own optimizer and schedule: steps, clipping, and the order of pairs."""
    stage = Stage(pairs=16, steps=5, batch=4, lr=0.1, lr_end=0.3, clip=0.1)
    pairs, arm, start = some_pairs(16), Arm("spo", 0.5), TablePolicy(32)
    batches = list(training.fixed_batches(pairs, stage, 3))
    trained = training.train_on_pairs(start, lambda _: iter(batches), arm, stage)
    scores = torch.zeros(32, requires_grad=True)
    adamw = torch.optim.AdamW([scores], lr=0.1, weight_decay=0.0)
    for step, batch in enumerate(batches):
        adamw.param_groups[0]["lr"] = 0.1 * (0.65 + 0.35 * math.cos(math.pi * step / 5))
        x = 0.5 * (scores[batch.chosen] - scores[batch.rejected])
        (-x * torch.exp(-x)).mean().backward()
        norm = scores.grad.norm()
        assert trained.grad_norms[step] == pytest.approx(norm.item(), rel=1e-5)
        scores.grad *= min(1.0, 0.1 / norm.item())
        adamw.step()
        adamw.zero_grad()
    torch.testing.assert_close(trained.policy.scores, scores, rtol=0, atol=1e-4)
    assert (start.scores == 0).all()


def test_what_is_measured_of_pairs() -> None:
    """Against NumPy."""
    pairs, policy, beta = some_pairs(16), TablePolicy(32), 0.2
    policy.scores.data = torch.linspace(-1, 1, 32)
    reference = np.random.default_rng(0).normal(-4.0, 1.5, 32)
    answers = replace(pairs.answers, reference=torch.tensor(reference))
    found = measure_pairs(policy, replace(pairs, answers=answers), beta)
    moved = log_softmax(np.linspace(-1, 1, 32)) - reference
    x = beta * (moved[:16] - moved[16:])
    assert found["x_mean"] == pytest.approx(x.mean(), rel=1e-4)
    assert found["x_sd"] == pytest.approx(x.std(ddof=1), rel=1e-4)
    assert found["x_q10"] == pytest.approx(np.quantile(x, 0.1), rel=1e-4)
    assert (found["x_below_0"], found["accuracy"]) == ((x < 0).mean(), (x > 0).mean())
    assert 0 < found["accuracy"] < 1
    assert found["dlogp_chosen"] == pytest.approx(moved[:16].mean(), rel=1e-4)
    assert found["dlogp_rejected"] == pytest.approx(moved[16:].mean(), rel=1e-4)
