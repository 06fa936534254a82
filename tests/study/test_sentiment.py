"""The study of a pretrained model: a tiny random Llama in place of SmolLM2."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoTokenizer, LlamaForCausalLM

import spoloss
from benchmarks.studies import declared, experiment, figures, second, seeds
from benchmarks.studies.__main__ import main
from benchmarks.studies.arms import FORMS, Arm, arms
from benchmarks.studies.evaluation import win_rate
from benchmarks.studies.experiment import Part
from benchmarks.studies.foundation import Foundation, Ground, all_openings
from benchmarks.studies.pretrained import (
    IGNORED,
    TopBlocks,
    reference_policy,
    write_answers,
)
from benchmarks.studies.questions import WIN_RATE, Question, decide
from benchmarks.studies.results import Results, choose, interval, verdict
from benchmarks.studies.reviews import compound, draw_any_pairs, draw_pairs, write_reviews
from benchmarks.studies.store import Store, open_store
from benchmarks.studies.training import Pairs, Rounds
from helpers.studies import loss_by_hand, rows_of
from helpers.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.extended, pytest.mark.usefixtures("one_thread")]

LENGTH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    write_tiny_llama(path, all_openings())
    return str(path)


@pytest.fixture(scope="module")
def whole(folder: str) -> LlamaForCausalLM:
    """The model as Transformers runs it, without a split."""
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def pairs(folder: str) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    openings = all_openings()[::6]
    return draw_pairs(write_reviews(reference_policy(folder), openings, 8, LENGTH, generator))


def nudged(policy: TopBlocks, size: float = 0.05) -> TopBlocks:
    """A policy whose last blocks differ from the reference's."""
    other = policy.copy()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.trained():
            parameter += size * torch.randn_like(parameter)
    return other


def by_hand(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> float:
    """The log-probability of an answer, token by token from the whole model's logits."""
    with torch.no_grad():
        logps = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(1)
    return sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


# -------------------------------------------------------------------------------------- the model


def test_answers_have_the_log_probabilities_of_the_whole_model(
    folder: str, whole: LlamaForCausalLM
) -> None:
    reference = reference_policy(folder)
    policy = nudged(reference)
    trained = LlamaForCausalLM.from_pretrained(folder).eval()
    trained.model.layers[2:].load_state_dict(policy.top.layers.state_dict())
    prompts = [reference.base.tokenizer(opening)["input_ids"] for opening in all_openings()[:3]]
    generator = torch.Generator().manual_seed(0)
    written = write_answers(policy, prompts, 5, LENGTH, 20, generator)
    again = policy.logps({"states": written.states, "labels": written.labels})
    lengths = set()
    for row, labels in enumerate(written.labels):
        answer = labels[labels != IGNORED].tolist()
        lengths.add(len(answer))
        prompt = prompts[row // 5]
        ours, theirs = by_hand(trained, prompt, answer), by_hand(whole, prompt, answer)
        assert abs(ours - theirs) > 1e-3
        assert written.logps[row].item() == pytest.approx(ours, abs=1e-3)
        assert again[row].item() == pytest.approx(ours, abs=1e-3)
        assert written.reference[row].item() == pytest.approx(theirs, abs=1e-3)
    assert len(lengths) > 2


def test_answers_are_drawn_from_the_policy(folder: str, whole: LlamaForCausalLM) -> None:
    policy, number = reference_policy(folder), 20_000
    prompt = policy.base.tokenizer(all_openings()[0])["input_ids"]
    generator = torch.Generator().manual_seed(0)
    drawn = write_answers(policy, [prompt], number, 1, len(prompt), generator).labels[:, -1]
    with torch.no_grad():
        want = whole(torch.tensor([prompt])).logits[0, -1].double().softmax(0)
    found = torch.bincount(drawn, minlength=len(want))
    assert chisquare(found, number * want).pvalue > 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_a_batch_and_its_gradient(form: str, folder: str, pairs: Pairs) -> None:
    policy, arm, batch = nudged(reference_policy(folder)), Arm(form, 0.3), pairs[:6]
    made = policy.pair_loss(arm, batch)
    got = torch.autograd.grad(made.loss, policy.trained())
    chosen, rejected = policy.logps(batch.inputs).chunk(2)
    reference = batch.answers.reference.float()
    h = (chosen - reference[batch.chosen]) - (rejected - reference[batch.rejected])
    want = loss_by_hand(arm, h, batch.gap)
    torch.testing.assert_close(made.loss, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.margins, h.detach(), rtol=0, atol=1e-4)
    for ours, theirs in zip(got, torch.autograd.grad(want, policy.trained()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


# --------------------------------------------------------------------------------- reviews, pairs


def test_the_reward_is_of_the_answer_alone(folder: str) -> None:
    assert compound(" great .") > 0.5 > -0.4 > compound(" terrible .")
    assert compound(" wooden .") == 0.0
    reviews = write_reviews(
        reference_policy(folder),
        ["To be honest, the hotel was", "In my opinion, the film was"],
        20,
        LENGTH,
        torch.Generator().manual_seed(0),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rewards = reviews.rewards.tolist()
    for labels, reward in zip(reviews.inputs["labels"], rewards, strict=True):
        assert reward == compound(tokenizer.decode(labels[labels != IGNORED]))
    assert len(set(rewards)) > 3


def test_reviews_come_opening_by_opening(folder: str) -> None:
    reference = reference_policy(folder)
    openings = ["To be honest, the hotel was", "My friends and I found the film", "To be honest"]
    openings.append("In my opinion, the city was")
    generator = torch.Generator().manual_seed(0)
    states = write_reviews(reference, openings, 2, LENGTH, generator).inputs["states"]
    for row, opening in enumerate(np.repeat(openings, 2)):
        ids = reference.base.tokenizer(str(opening), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            want = reference.base.lower(ids, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(states[row, : len(want)], want, rtol=0, atol=1e-4)


def test_pairs_are_of_one_opening_and_ordered_by_reward(folder: str, pairs: Pairs) -> None:
    assert len(pairs) > 20
    assert (pairs.gap >= 0.05).all()
    openings = (pairs.chosen // 8).tolist()
    assert openings == (pairs.rejected // 8).tolist()
    assert openings != sorted(openings)
    used = torch.cat((pairs.chosen, pairs.rejected))
    assert len(used.unique()) == len(used)
    got = reference_policy(folder).logps(pairs.inputs)
    torch.testing.assert_close(got, torch.cat(pairs.references), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------- decided comparisons


def candidate(*seeds: float) -> list[np.ndarray]:
    """Three prompts with two answers each, all with the reward of their seed."""
    return [np.full((3, 2), reward) for reward in seeds]


def test_the_other_seeds_choose_the_best() -> None:
    steady = candidate(1.0, 1.0, 1.0)
    # In seed 0, where `lucky` has its luck, the other seeds choose `steady`; and the reverse.
    best = choose({"lucky": candidate(9.0, 0.0, 0.0), "steady": steady})
    assert best.titles == ["steady", "lucky", "lucky"]
    assert best.title == "steady or lucky"
    assert [rewards.mean() for rewards in best.rewards] == [1.0, 0.0, 0.0]
    found = declared.wins("", best, choose({"steady": steady}), verdict, "")
    assert found.measures[WIN_RATE].tolist() == [0.5, 0.0, 0.0]
    assert (found.further["ties"], found.further["theirs"]) == (pytest.approx(1 / 3), "steady")
    broken = candidate(9.0, 9.0, math.nan)
    assert choose({"broken": broken, "steady": steady}).titles == ["steady", "steady", "broken"]


# ---------------------------------------------------------------------------- the second study


def results_of(part: Part, found: Callable[[Arm, int], dict[str, Any]]) -> Results:
    """Results whose every arm and seed is what `found` says."""
    results = object.__new__(Results)
    results.part = part
    results.arms = {arm: [found(arm, seed) for seed in part.seeds] for arm in part.arms}
    return results


def test_any_pairs_of_an_opening(folder: str) -> None:
    generator = torch.Generator().manual_seed(0)
    reviews = write_reviews(reference_policy(folder), all_openings()[:4], 6, LENGTH, generator)
    pairs = draw_any_pairs(reviews, 6, 1000, generator)
    rewards = reviews.rewards.view(4, 6).tolist()
    apart = [abs(a - b) >= 0.05 for row in rewards for a, b in itertools.combinations(row, 2)]
    assert len(pairs) == sum(apart) > 20
    assert (pairs.gap >= 0.05).all()
    assert (pairs.chosen // 6 == pairs.rejected // 6).all()
    rows = torch.stack((pairs.chosen, pairs.rejected)).sort(0).values
    assert len(rows.unique(dim=1).T) == len(pairs)
    some = draw_any_pairs(reviews, 6, 12, generator)
    assert len(some) == 12
    assert len((some.chosen // 6).unique()) > 1


def test_in_rounds_the_policy_in_training_writes_the_pairs(folder: str, tmp_path: Path) -> None:
    foundation = tiny_foundation(folder)
    store = open_store(tmp_path / "rounds", {})
    foundation.lay(0, store)
    ground = foundation.load(0, store)
    stage = Rounds(8, 4, batch=4, lr=1e-3, rounds=2, openings=3, answers=8)

    def drawn(later: TopBlocks) -> list[Pairs]:
        policy = ground.reference.copy()
        found = []
        for pairs in ground.rounds(policy, stage):
            found.append(pairs)
            policy.top = later.top
        return found

    same, other = drawn(ground.reference), drawn(nudged(ground.reference, 0.5))
    assert [len(pairs) for pairs in same] == [4] * 4
    for i, agree in enumerate((True, True, False, False)):
        pairs = other[i]
        chosen = [each.answers.inputs["labels"][each.chosen] for each in (same[i], pairs)]
        assert torch.equal(*chosen) == agree
        want = ground.reference.logps(pairs.inputs)
        torch.testing.assert_close(torch.cat(pairs.references), want, rtol=0, atol=1e-3)
    # A round takes whole batches alone, and the first without one is the last.
    for batch, lengths in ((5, [5, 5]), (9, [])):
        found = ground.rounds(ground.reference, replace(stage, batch=batch))
        assert [len(pairs) for pairs in found] == lengths
    used = torch.stack(
        (
            torch.cat([each.chosen for each in same[:2]]),
            torch.cat([each.rejected for each in same[:2]]),
        )
    )
    assert len(used.unique(dim=1).T) == 8


def test_reward_at_equal_kl() -> None:
    both = (*arms("dpo", 0.1, 0.4, 1.6), *arms("spo", 0.1, 0.4))
    part = Part("matched", both, second.STAGE, range(10, 14), "")

    def results(spread: float) -> Results:
        """SPO's gain is 0.25 on average, and differs by so much from seed to seed."""

        def found(arm: Arm, seed: int) -> dict[str, Any]:
            log_kl = math.sin(7.0 * arm.beta + (arm.form == "spo"))
            gain = (0.25 + spread * (seed - 11.5)) * (arm.form == "spo")
            return {"kl": math.exp(log_kl), "reward": seed + 0.3 * log_kl - log_kl**2 + gain}

        return results_of(part, found)

    def gains(question: Question) -> list[float]:
        return question.measures["reward"].tolist()

    uneven = results(0.0)
    uneven.arms[Arm("spo", 0.1)][0]["kl"] = -0.1  # has no logarithm
    found = declared.at_equal_kl(uneven)
    assert gains(found) == pytest.approx([0.25] * 4)
    assert found.further == {"spo_points": 7, "dpo_points": 12}
    # KL is the same in all seeds, so the jackknife's values are the seeds' own gains.
    found = declared.at_equal_kl(results(0.1))
    assert gains(found) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    (row,) = decide([declared.at_equal_kl(results(0.0), 90.0, 99.0)])
    assert (row["spo_points"], row["dpo_points"], row["verdict"]) == (0, 0, "broken")
    # Without seed 10, which alone has points of SPO, no fit tells what SPO gains.
    for arm in arms("spo", 0.1, 0.4):
        for each in uneven.arms[arm][1:]:
            each["kl"] = -0.1
    (row,) = decide([declared.at_equal_kl(uneven)])
    assert (row["spo_points"], row["dpo_points"], row["verdict"]) == (1, 12, "broken")


def test_matched_betas_are_averaged_within_a_seed() -> None:
    """SPO(0.1) always beats DPO(0.4); SPO(0.2) beats DPO(0.8) in one seed; others are not asked."""
    part = replace(
        second.MATCHED,
        arms=(*arms("spo", 0.1, 0.2), *arms("dpo", 0.1, 0.4, 0.8)),
        seeds=range(10, 12),
    )

    def found(arm: Arm, seed: int) -> dict[str, Any]:
        level = {"spo:0.1": 2, "dpo:0.4": 1, "spo:0.2": 3 if seed == 10 else 0, "dpo:0.8": 1}
        reward = float(level.get(str(arm), 9))
        rewards = [[reward, reward]]
        return {"rewards": rewards, "reward": reward, "kl": arm.beta, "judgements": []}

    results = results_of(part, found)
    results.references = [{"rewards": []}] * 2
    row = declared.of_matched(results)["decided"][1]
    assert (row["estimate"], row["standard_error"], row["ties"]) == pytest.approx((0.75, 0.25, 0))


def test_all_intervals_of_a_part_hold_at_once() -> None:
    values = [[0.0, 0.5, 1.0], [0.1, 0.2, 0.3], [math.nan, 0.1, 0.2]]
    kl, reward, broken = map(pd.Series, values)
    rows = decide(
        [
            Question("both", {"log KL": kl, "reward": reward}, lambda *ends: str(len(ends)), {}),
            Question("broken", {"J": broken}, verdict, {}),
            Question("a share", {WIN_RATE: kl}, verdict, {}),
        ]
    )
    assert [(row["measure"], row["verdict"]) for row in rows] == [
        ("log KL", "2"),
        ("reward", "2"),
        ("J", "broken"),
        (WIN_RATE, "not distinguishable"),
    ]
    assert (rows[1]["low"], rows[1]["high"]) == interval(reward, 4)
    assert rows[0]["low"] < -0.5  # of a win rate with the same values, the interval ends at 0
    assert (rows[3]["low"], rows[3]["high"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("log_kl", "reward", "says"),
    [(-0.5, 0.0, "holds"), (-0.5, -0.1, "not shown"), (0.5, 0.1, "not shown")],
)
def test_both_halves_of_staying_closer_have_to_hold(
    log_kl: float, reward: float, says: str
) -> None:
    def found(arm: Arm, seed: int) -> dict[str, Any]:
        ours = arm.form == "spo"
        noise = 0.001 * (seed % 2) * ours
        return {"kl": math.exp(log_kl * ours + noise), "reward": reward * ours + noise}

    rows = decide([declared.closer(results_of(second.OVERTRAINED, found))])
    assert [row["verdict"] for row in rows] == [says] * 2


def test_grids_are_extended_where_an_edge_is_best() -> None:
    part = second.OVERTRAINED

    def extended(best: dict[str, float], stopped: float = 0.1) -> set[str]:
        def found(arm: Arm, _: int) -> dict[str, Any]:
            early = {"step": 40, "rewards": [[2.0 * (arm.beta == stopped)]]}
            return {"rewards": [[float(arm.beta == best[arm.form])]], "judgements": [early]}

        (longer,) = second.extended((part,), lambda each: results_of(each, found))
        assert longer.arms[: len(part.arms)] == part.arms
        return {str(arm) for arm in longer.arms[len(part.arms) :]}

    assert extended({"dpo": 0.1, "spo": 0.1}) == set()
    assert extended({"dpo": 0.05, "spo": 0.1}) == {"dpo:0.0125", "spo:0.003125"}
    assert extended({"dpo": 0.1, "spo": 0.4}) == {"dpo:6.4", "spo:1.6"}
    # An edge of DPO at its best beta and step extends both grids too; SPO on the way does not.
    assert extended({"dpo": 0.1, "spo": 0.1}, stopped=1.6) == {"dpo:6.4", "spo:1.6"}
    assert extended({"dpo": 0.1, "spo": 0.1}, stopped=0.0125) == set()
    assert second.extended((part,), lambda _: None) == (part,)


def test_the_pilot_chooses_a_learning_rate_for_each_loss() -> None:
    parts = (second.ON_POLICY, second.PILOT)
    assert second.rated(parts, lambda _: None) == (second.PILOT,)
    best = {"squared-gap": 1e-4, "spo-gap-weighted-below0": 1e-3, "dpo": 1e-4, "dpo-soft": 3e-4}

    def found(arm: Arm, _: int) -> dict[str, Any]:
        # Two runs break: one has no J, the other's policy before its failure has the greatest.
        if arm.form == "dpo-soft" and arm.rate != 3e-4:
            broken = {"reward": math.nan, "kl": math.nan}, {"reward": 0.9, "kl": 1.0}
            return {**broken[arm.rate == 1e-4], "stopped_at": 7}
        # The greatest reward is that of another rate, at a KL that costs more.
        good = arm.rate == best[arm.form]
        return {"reward": 0.5 if good else 0.6, "kl": 1.0 if good else 2.0, "stopped_at": None}

    part, pilot = second.rated(parts, lambda each: results_of(each, found))
    assert pilot == second.PILOT
    assert [arm.rate for arm in part.arms] == [1e-4, 1e-3, 3e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-3]


def test_the_optimum_of_the_objective() -> None:
    rewards = np.array([[0.1, -0.4, 0.9], [0.0, 0.3, 0.3]])
    want = (0.2 * np.log(np.exp(rewards / 0.2).mean(1))).mean()
    assert declared.optimum({"rewards": rewards.tolist()}) == pytest.approx(want)


def test_the_share_of_the_road_that_works() -> None:
    part = replace(
        second.ROAD, arms=(*arms("dpo", 1.0, 2.0), Arm("spo", 1.0), Arm("spo", 2.0, 1.0))
    )

    def found(arm: Arm, seed: int) -> dict[str, Any]:
        stopped = 3 if str(arm) == "spo:2~1" and seed == 11 else None
        return {"reward": 0.5 - 0.2 * (str(arm) == "dpo:2"), "kl": 1.0, "stopped_at": stopped}

    shares = declared.of_road(results_of(part, found))["shares"]
    assert shares == [
        {"form": "dpo", "finite": 1.0, "near_best": 0.5},
        {"form": "spo", "finite": 0.5, "near_best": 0.5},
    ]


@pytest.mark.parametrize("seen", [0, 1])
def test_the_pictures_of_a_run_that_stopped_early(seen: int, tmp_path: Path) -> None:
    """It has been looked at once, or never, and its policy has no reward."""
    part = replace(second.OVERTRAINED, arms=(*arms("spo", 0.1), *arms("dpo", 0.1, 0.4)))

    def found(arm: Arm, _: int) -> dict[str, Any]:
        stopped = arm.form == "spo"
        snapshots = [
            {"step": step, "split": split, "x_q10": -1.0, "x_q50": step / 40, "x_q90": 9.0}
            for step in (40, 80)[: seen if stopped else 2]
            for split in ("train", "held_out")
        ]
        kl = math.nan if stopped else 0.4 - arm.beta  # a KL of 0 has no place on the axis
        return {"reward": 0.1 + kl, "kl": kl, "snapshots": snapshots}

    results = results_of(part, found)
    for draw in (figures.draw_frontier, figures.draw_margins):
        figures.save(draw(results), tmp_path / "picture.png", "a line")


# ------------------------------------------------------------------------------------- whole runs


def tiny_foundation(folder: str) -> Foundation:
    return Foundation(
        folder,
        held_out_openings=6,
        pair_answers=4,
        held_out_pair_answers=4,
        answers=4,
        length=LENGTH,
    )


def test_the_held_out_openings_are_not_trained_on(folder: str) -> None:
    training, held_out = tiny_foundation(folder).openings(3)
    assert len(held_out) == 6
    assert sorted(training + held_out) == sorted(all_openings())
    assert held_out != tiny_foundation(folder).openings(4)[1]


def test_what_a_policys_reviews_say_of_it(folder: str, whole: LlamaForCausalLM, pairs) -> None:
    foundation, reference = tiny_foundation(folder), reference_policy(folder)
    policy = nudged(reference)
    trained = LlamaForCausalLM.from_pretrained(folder).eval()
    trained.model.layers[2:].load_state_dict(policy.top.layers.state_dict())
    ground = Ground(foundation, 0, reference, pairs, pairs)
    judged = ground.judge(policy, "a name", 3)
    assert ground.judge(policy, "another", 3)["rewards"] != judged["rewards"]
    openings = foundation.openings(0)[1]
    generator = seeds.generator("answers", "a name")
    reviews = write_reviews(policy, openings, 3, LENGTH, generator)
    answers = [row[row != IGNORED].tolist() for row in reviews.inputs["labels"]]
    prompts = [reference.base.tokenizer(opening)["input_ids"] for opening in openings]
    both = [(prompts[row // 3], answer) for row, answer in enumerate(answers)]
    ours, theirs = (np.array([by_hand(m, *each) for each in both]) for m in (trained, whole))
    lengths = np.array(list(map(len, answers)))
    neighbours = [pair for answer in answers for pair in itertools.pairwise(answer)]
    want = {
        "reward": reviews.rewards.mean().item(),
        "kl": (ours - theirs).mean(),
        "tokens": lengths.mean(),
        "reference_nll": -theirs.sum() / lengths.sum(),
        "distinct_2": len(set(neighbours)) / len(neighbours),
    }
    assert {key: judged[key] for key in want} == pytest.approx(want, abs=1e-3)
    assert judged["rewards"] == reviews.rewards.view(6, 3).tolist()
    np.testing.assert_allclose(judged["log_ratios"], (ours - theirs).reshape(6, 3), atol=2e-3)


def test_jobs_run_once_in_workers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("done", {"x": 0})
    jobs = {name: methodcaller("write", name, {"x": 1}) for name in ("done", "new")}
    experiment.run_jobs(jobs, store, 1)
    assert [store.read(name)["x"] for name in jobs] == [0, 1]
    with pytest.raises(FileNotFoundError):
        experiment.run_jobs({"broken": methodcaller("read", "nothing")}, store, 1)


@pytest.fixture
def _in_this_process(monkeypatch) -> None:
    """Jobs run without workers."""

    def run_jobs(jobs: dict[str, Callable[[Store], None]], store: Store, _: int) -> None:
        for name, job in jobs.items():
            if not store.has(name):
                job(store)

    monkeypatch.setattr(experiment, "run_jobs", run_jobs)


@pytest.mark.usefixtures("_in_this_process")
def test_the_second_study(folder: str, tmp_path: Path, monkeypatch) -> None:
    study = tmp_path / "study"
    command = ["sentiment", "--model", folder, "--quick", "--output", str(study)]
    assert main(command) == 0
    for part, number in (("matched", 3), ("overtrained", 5), ("on-policy", 3)):
        assert len(rows_of(study / part / "decided.csv")) == number
        rewards = rows_of(study / part / "rewards.csv")
        assert {row["policy"] for row in rewards} == {
            row["policy"] for row in rows_of(study / part / "policies.csv") if row["stage"] == part
        }
    # Of a grid of two betas an end is the best, so both grids were extended by a factor of 4.
    rows = rows_of(study / "overtrained/policies.csv")
    arms = {row["policy"] for row in rows if row["stage"] == "overtrained"}
    assert arms & {"dpo:0.0125", "dpo:0.4"}
    assert len(arms & {"dpo:0.0125", "dpo:0.4"}) == len(arms & {"spo:0.003125", "spo:0.1"})
    rewards = rows_of(study / "overtrained/rewards.csv")
    assert {row["step"] for row in rewards} == {"1", "4", ""}
    (row,) = (
        row
        for row in rewards
        if (row["policy"], row["seed"], row["step"], row["opening"]) == ("dpo:0.1", "11", "", "3")
    )
    store = Store(study)
    kept = store.read("seed-11/overtrained-dpo:0.1")
    assert list(map(float, row["rewards"].split())) == kept["rewards"][3]
    # The trained policy is measured and judged, on the way too.
    assert kept["train"]["x_mean"] > kept["snapshots"][0]["x_mean"] > 1e-4
    assert np.any(kept["judgements"][0]["log_ratios"])
    rewards = (np.array(each["rewards"]) for each in (kept, store.read("seed-11/foundation")))
    row = next(
        row
        for row in rows
        if (row["stage"], row["policy"], row["seed"]) == ("overtrained", "dpo:0.1", "11")
    )
    assert float(row["win_rate_vs_reference"]) == pytest.approx(win_rate(*rewards), abs=1e-5)
    # An arm of part 4 at the learning rate of part 1 is that of part 1.
    road = {row["policy"]: row for row in rows_of(study / "road/policies.csv")}
    matched = store.read("seed-10/matched-dpo:0.1")
    assert float(road["dpo:0.1"]["reward"]) == pytest.approx(matched["reward"], abs=1e-5)
    moved = [float(road[f"dpo:0.1{rate}"]["train_x_mean"]) for rate in ("~0.0001", "", "~0.001")]
    assert moved[0] < 0.6 * moved[1] < 0.36 * moved[2]
    rates = [float(row["rate"]) for row in rows_of(study / "road/road.csv")]
    assert sorted(rates) == [rate for rate in (1e-4, 3e-4, 1e-3) for _ in range(8)]
    the_objective_is_that_of_the_completions(study / "on-policy")
    settings = json.loads((study / "settings.json").read_text())
    policies = {row["policy"] for row in rows_of(study / "on-policy/rewards.csv")}
    assert policies == {"reference", *settings["on-policy, settled"]["arms"]}
    rows = rows_of(study / "on-policy/decided.csv")
    for row in rows:
        rates = (f"rate {rate})" in row["ours"] + row["theirs"] for rate in ("0.0001", "0.001"))
        assert (" rate " in row["at_edge"]) == any(rates)
    assert rows[1]["at_edge"].startswith(("dpo lowest", "dpo highest"))  # of a grid of two betas
    monkeypatch.setattr(spoloss, "__version__", "0")
    assert main(command) == 2


def the_objective_is_that_of_the_completions(folder: Path) -> None:
    keys = ("policy", "seed", "step")
    found = defaultdict(list)
    for row in rows_of(folder / "rewards.csv"):
        both = (map(float, row[measure].split()) for measure in ("rewards", "log_ratios"))
        found[tuple(row[key] for key in keys)] += zip(*both, strict=True)
    rows = rows_of(folder / "objective.csv")
    assert len(rows) > 10
    for row in rows:
        reward, kl = np.mean(found[tuple(row[key] for key in keys)], axis=0)
        assert reward - 0.2 * kl == pytest.approx(float(row["j"]), abs=1e-3)
