"""The alignment experiment on a language model: a tiny random Llama in place of SmolLM2."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.studies import sentiment
from benchmarks.studies.arms import FORMS, Arm, Logps
from benchmarks.studies.decided import Best, Candidate, choose, compared, decided_rows
from benchmarks.studies.experiment import Part, settings_of
from benchmarks.studies.pretrained import (
    IGNORED,
    TopBlocks,
    reference_policy,
    write_answers,
)
from benchmarks.studies.results import Estimate
from benchmarks.studies.sentiment_task import (
    SentimentFoundation,
    all_openings,
    compound,
    draw_pairs,
    write_reviews,
)
from benchmarks.studies.store import open_store
from benchmarks.studies.training import Pairs, pair_logps
from helpers.alignment import rows_of
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
    written = write_answers(policy, prompts, 5, LENGTH, generator)
    again = policy.logps(written.inputs)
    lengths = set()
    for row, tokens in enumerate(written.tokens):
        answer = tokens[tokens != IGNORED].tolist()
        lengths.add(len(answer))
        prompt = prompts[row // 5]
        ours, theirs = by_hand(trained, prompt, answer), by_hand(whole, prompt, answer)
        assert abs(ours - theirs) > 1e-3
        assert written.logps[row].item() == pytest.approx(ours, abs=1e-3)
        assert again[row].item() == pytest.approx(ours, abs=1e-3)
        assert written.reference[row].item() == pytest.approx(theirs, abs=1e-3)
    assert len(lengths) > 2


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_a_batch_and_its_gradient(form: str, folder: str, pairs: Pairs) -> None:
    policy, arm, batch = nudged(reference_policy(folder)), Arm(form, 0.3), pairs[:6]
    made = policy.pair_loss(arm, batch)
    got = torch.autograd.grad(made.loss, policy.trained())
    both = policy.logps(pairs.answers[torch.cat((batch.chosen, batch.rejected))].inputs)
    logps = batch.logps_given(*both.chunk(2))
    want = arm.loss(Logps(*logps), batch.gap)
    torch.testing.assert_close(made.loss, want, rtol=1e-4, atol=1e-5)
    pc, pr, rc, rr = logps
    torch.testing.assert_close(made.margins, ((pc - rc) - (pr - rr)).detach(), rtol=0, atol=1e-4)
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
    rewards = reviews.rewards.flatten()
    for text, tokens, reward in zip(reviews.texts, reviews.tokens, rewards, strict=True):
        answer = tokenizer.decode(tokens[tokens != IGNORED])
        assert text.endswith(answer)
        assert reward == compound(answer)
    assert len(set(rewards)) > 3


def test_pairs_are_of_one_opening_and_ordered_by_reward(folder: str, pairs: Pairs) -> None:
    assert len(pairs) > 20
    assert (pairs.gap >= 0.05).all()
    assert (pairs.chosen // 8 == pairs.rejected // 8).all()
    used = torch.cat((pairs.chosen, pairs.rejected))
    assert len(used.unique()) == len(used)
    for got, want in zip(
        pair_logps(reference_policy(folder), pairs)[:2],
        pair_logps(reference_policy(folder), pairs)[2:],
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------- decided comparisons


def candidate(title: str, *seeds: float) -> Candidate:
    """Three prompts with two answers each, all with the reward of their seed."""
    return Candidate(title, tuple(np.full((3, 2), reward) for reward in seeds))


def test_the_other_seeds_choose_the_best() -> None:
    lucky = candidate("lucky", 9.0, 0.0, 0.0)
    steady = candidate("steady", 1.0, 1.0, 1.0)
    broken = candidate("broken", 9.0, 9.0, math.nan)
    # In seed 0, where `lucky` has its luck, the other seeds choose `steady`; and the reverse.
    best = choose([lucky, steady])
    assert best == Best((steady, lucky, lucky))
    assert best.title == "steady or lucky"
    assert best.reward == Estimate((1.0, 0.0, 0.0))
    assert best.wins_over(Best((steady,) * 3)) == Estimate((0.5, 0.0, 0.0))
    assert choose([broken, steady]) == Best((steady, steady, broken))
    assert choose([]) is None


def test_the_verdict_of_a_decided_comparison() -> None:
    high, low = (choose([candidate(str(r), r, r + 0.02)]) for r in (1.0, 0.5))
    row = compared(high, low, 1)
    assert (row["ours"], row["theirs"], row["verdict"]) == ("1.0", "0.5", "better")
    assert (row["our_reward"], row["win_rate"], row["low"]) == pytest.approx((1.01, 1.0, 1.0))
    assert compared(low, high, 1)["verdict"] == "worse"
    broken = choose([candidate("broken", 1.0, math.nan)])
    assert "verdict" not in compared(high, broken, 1)


# ------------------------------------------------------------------------------------- whole runs


def tiny_foundation(folder: str) -> SentimentFoundation:
    return SentimentFoundation(
        folder,
        held_out_openings=6,
        pair_answers=4,
        held_out_pair_answers=4,
        answers=4,
        limit_answers=4,
        length=LENGTH,
    )


def tiny(part: Part) -> Part:
    """DPO at two betas, the other losses at one, and two steps for each."""
    stage = replace(part.stage, pairs=8, steps=2, batch=4)
    due = {name: min(getattr(stage, name), 2) for name in ("snapshots", "judgements")}
    first: dict[tuple[str, str], Arm] = {}
    for arm in part.arms:
        first.setdefault((arm.form, arm.labels), arm)
    arms = (*first.values(), *[arm for arm in part.arms if arm.form == "dpo"][1:2])
    return replace(part, arms=arms, stage=replace(stage, **due), seeds=1)


def test_a_study_in_parts(folder: str, tmp_path: Path, capsys) -> None:
    foundation, parts = tiny_foundation(folder), tuple(map(tiny, sentiment.PARTS.values()))
    store = open_store(tmp_path / "study", settings_of(foundation, parts))
    jobs = {job.name: job for job in sentiment.jobs_in_order(foundation, parts)}
    # DPO and SPO come first; an arm of the gaps that the sweep has is trained once.
    first = [name for name in jobs if "sweep-spo:" in name or "sweep-dpo:" in name]
    others = [name for name in jobs if "sweep-squared" in name]
    assert max(map(list(jobs).index, first)) < min(map(list(jobs).index, others))
    assert {"seed-0/sweep-spo-gap:0.0125", "seed-0/flips-dpo:0.1@flip20"} <= jobs.keys()

    assert sentiment.finished_results(foundation, parts[0], store) is None
    for name in ["seed-0/foundation", *first]:
        jobs[name].function(store)
    partial = sentiment.finished_results(foundation, parts[0], store)
    assert {arm.form for arm in partial.arms} == {"dpo", "spo"}
    assert [row["question"][:8] for row in decided_rows(partial)] == ["(a) SPO "]

    for name, job in jobs.items():
        if not store.has(name):
            job.function(store)
    for part, number in zip(parts, (3, 2, 4, 4), strict=True):
        results = sentiment.finished_results(foundation, part, store)
        sentiment.report_part(results, store, "tiny")
        rows = rows_of(store.folder / part.name / "policies.csv")
        assert {row["policy"] for row in rows} == {"reference", *map(str, part.arms)}
        assert all(math.isfinite(float(row["kl"])) for row in rows)
        assert len(rows_of(store.folder / part.name / "decided.csv")) == number
    over = store.read("seed-0/overtraining-dpo:0.4")["judgements"]
    rows = rows_of(store.folder / "overtraining/judgements.csv")
    assert [row["step"] for row in rows if row["policy"] == "dpo:0.4"] == ["1", "2"]
    assert float(rows[1]["reward"]) == pytest.approx(over[1]["reward"], abs=1e-5)
    assert "squared with known gaps" in capsys.readouterr().out
