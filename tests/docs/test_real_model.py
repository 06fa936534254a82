"""docs/real_model.md describes the task that runs, and concludes what the committed runs show."""

from __future__ import annotations

import json
import re
from statistics import fmean

import pytest

from benchmarks.alignment.sentiment.parts import PARTS, STAGE, full_protocol
from benchmarks.alignment.sentiment.task import LEAST_GAP, OPENINGS, THINGS
from benchmarks.real_pairs import task as real_pairs
from benchmarks.real_pairs.material import FOLDS, LENGTH
from helpers.pages import RESULTS, ROOT, measured

PAGE = (ROOT / "docs" / "real_model.md").read_text()
TEXT = " ".join(PAGE.split())


def mean(part: str, policy: str, column: str) -> float:
    """A figure of a policy, averaged over seeds."""
    rows = measured(f"sentiment/{part}/policies.csv")
    return fmean(float(row[column]) for row in rows if row["policy"] == policy)


def verdicts(part: str) -> dict[str, str]:
    return {row["question"]: row["verdict"] for row in measured(f"sentiment/{part}/decided.csv")}


def test_the_task_is_the_one_that_runs() -> None:
    foundation = full_protocol("model").foundation
    assert f"{len(THINGS) * len(OPENINGS)} openings" in TEXT
    assert f"({len(THINGS)} things in {len(OPENINGS)} phrasings)" in TEXT
    assert f"A seed holds out {foundation.held_out_openings} of them" in TEXT
    assert f"or {foundation.length} tokens" in TEXT
    assert f"differ by {LEAST_GAP} or more" in TEXT
    assert f"{STAGE.steps} steps of {STAGE.batch} pairs" in TEXT
    assert (STAGE.lr, STAGE.lr_end, STAGE.clip) == (3e-4, 0.0, 1.0)
    over = PARTS["overtraining"].stage
    passes = over.steps * over.batch / over.pairs
    assert f"{over.pairs} pairs, {over.steps} steps of {over.batch} pairs" in TEXT
    assert f"({passes:.0f} passes)" in TEXT
    seeds = {name: part.seeds for name, part in PARTS.items()}
    assert seeds == {"sweep": 4, "overtraining": 3, "flips": 3, "gaps": 4}
    assert "There are four seeds in (a) and (d) and three in (b) and (c)" in TEXT


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_complete_and_on_the_page(name: str) -> None:
    settings = json.loads((RESULTS / "sentiment" / "settings.json").read_text())
    assert settings[name] == PARTS[name].settings()
    tables = (RESULTS / "sentiment" / name / "tables.md").read_text()
    assert "not complete" not in tables
    assert "not run yet" not in tables
    assert f"sentiment/{name}/tables.md" in PAGE


def test_both_losses_learn_the_task() -> None:
    rows = {row["form"]: row for row in measured("sentiment/sweep/gains.csv")}
    for form in ("dpo", "spo", "squared", "spo-below0"):
        assert float(rows[form]["gain"]) > 3 * float(rows[form]["standard_error"])


@pytest.mark.parametrize("name", ["sweep", "flips", "gaps"])
def test_no_other_comparison_is_decided(name: str) -> None:
    assert set(verdicts(name).values()) == {"not distinguishable"}


def test_spo_and_dpo_at_four_times_the_beta_are_the_same_run() -> None:
    betas = (("0.003125", "0.0125"), ("0.0125", "0.05"), ("0.025", "0.1"), ("0.05", "0.2"))
    for spo, dpo in (*betas, ("0.1", "0.4")):
        for side in ("chosen", "rejected"):
            ours, theirs = (
                mean("sweep", policy, f"train_dlogp_{side}")
                for policy in (f"spo:{spo}", f"dpo:{dpo}")
            )
            assert abs(ours - theirs) < 0.1


def test_what_the_sweep_shows() -> None:
    assert {row["verdict"] for row in measured("sentiment/sweep/comparisons.csv")} == {
        "not distinguishable"
    }
    (row,) = (
        row
        for row in measured("sentiment/sweep/decided.csv")
        if row["question"].startswith("(a) SPO against DPO")
    )
    low, high = float(row["low"]), float(row["high"])
    assert low < 0.5373 < high
    assert high == pytest.approx(0.5650, abs=0.005)
    for beta in ("0.0125", "0.05", "0.1", "0.4"):
        assert mean("sweep", f"spo:{beta}", "kl") < mean("sweep", f"dpo:{beta}", "kl")
    for policy in ("spo:0.003125", "spo:0.0125", "dpo:0.0125"):
        assert mean("sweep", policy, "reward") == pytest.approx(0.33, abs=0.006)
    for policy in ("spo:0.003125", "dpo:0.0125"):  # in which the text of some seeds gets worse
        rows = [row for row in measured("sentiment/sweep/policies.csv") if row["policy"] == policy]
        assert max(float(row["reference_nll"]) for row in rows) > 4.4
        assert min(float(row["distinct_2"]) for row in rows) < 0.72
    own, diverse = (mean("sweep", "reference", key) for key in ("reference_nll", "distinct_2"))
    for beta in ("0.025", "0.1"):
        for policy in (f"spo:{beta}", f"dpo:{float(beta) * 4:g}"):
            assert abs(mean("sweep", policy, "reference_nll") - own) < 0.1
            assert 0.0 < diverse - mean("sweep", policy, "distinct_2") < 0.06


def test_over_trained_spo_is_worse_than_dpo() -> None:
    assert set(verdicts("overtraining").values()) == {"worse"}
    assert mean("overtraining", "spo:0.1", "train_x_near_1") == pytest.approx(0.96, abs=0.005)
    own = mean("sweep", "reference", "reward")
    assert own == pytest.approx(0.09, abs=0.01)
    assert mean("overtraining", "spo:0.1", "reward") < own + 0.03
    assert mean("overtraining", "dpo:0.4", "reward") > own + 0.1
    assert mean("overtraining", "dpo:0.4", "train_x_mean") == pytest.approx(11.5, abs=0.1)
    assert mean("overtraining", "spo:0.4", "train_x_q90") > 2.0
    assert mean("overtraining", "spo:0.4", "reference_nll") == pytest.approx(5.0, abs=0.1)
    rows = measured("sentiment/overtraining/policies.csv")
    assert max(float(row["grad_norm_max"]) for row in rows if row["policy"] == "spo:0.4") > 1000


def test_flipped_labels_cost_all_losses_about_the_same() -> None:
    for labels, expected in (("flip20", 0.2), ("flip40", 0.15)):
        for form in ("dpo", "spo", "squared"):
            policies = {row["policy"] for row in measured("sentiment/flips/policies.csv")}
            rewards = [
                mean("flips", policy, "reward")
                for policy in policies
                if policy.startswith(f"{form}:") and policy.endswith(labels)
            ]
            assert max(rewards) == pytest.approx(expected, abs=0.03)


def test_known_gaps_point_one_way_and_decide_nothing() -> None:
    rows = measured("sentiment/gaps/decided.csv")
    assert all(0.51 <= float(row["win_rate"]) <= 0.54 for row in rows)
    assert max(float(row["low"]) for row in rows) == pytest.approx(0.49, abs=0.005)
    for beta in ("0.0125", "0.05"):
        guarded, alone = (
            mean("gaps", f"spo-gap{form}:{beta}", "reward") for form in ("-weighted-below0", "")
        )
        assert guarded > alone + 0.1
    best = mean("gaps", "spo-gap-weighted-below0:0.0125", "reward")
    for part in PARTS:
        rewards = {row["policy"] for row in measured(f"sentiment/{part}/policies.csv")}
        spos = [policy for policy in rewards if policy.startswith("spo")]
        assert all(mean(part, policy, "reward") <= best for policy in spos)


def test_real_pairs_are_level_and_length_is_a_better_judge() -> None:
    assert f"cut at {LENGTH} tokens" in TEXT
    assert FOLDS == 5
    assert f"learning rate of {real_pairs.STAGE.lr:.0e}".replace("e-0", "e-") in TEXT
    report = (RESULTS / "real_pairs" / "tables.md").read_text()
    (longer,) = re.findall(r"longer text, before any text is cut, in ([\d.]+) ±", report)
    for row in measured("real_pairs/arms.csv"):
        assert abs(float(row["lead"])) <= 2 * float(row["lead_error"])
        assert 100 * float(row["accuracy"]) < float(longer)
    settings = json.loads((RESULTS / "real_pairs" / "settings.json").read_text())
    assert settings["arms"] == [str(arm) for arm in real_pairs.ARMS]
