"""What docs/choosing.md and docs/claims.md conclude in words holds in the committed results.

Their tables are generated (test_tables.py). These conclusions would go unnoticed when a study is
run again with another outcome.
"""

from __future__ import annotations

from statistics import fmean

from helpers.pages import measured


def mean(policy: str, column: str, stage: str = "preference") -> float:
    """A figure of a policy in the desk-scale run, averaged over seeds."""
    rows = measured("alignment/full/policies.csv")
    found = [row for row in rows if (row["stage"], row["policy"]) == (stage, policy)]
    return fmean(float(row[column]) for row in found)


def test_spo_is_worse_or_level_at_every_compared_beta() -> None:
    rows = measured("alignment/full/comparisons.csv")
    assert len(rows) == 16
    clear = {
        (row["spo"], row["dpo"], row["verdict"]) for row in rows if "not" not in row["verdict"]
    }
    assert clear == {
        ("spo:1", "dpo:1", "worse"),
        ("spo:1", "dpo:4", "worse"),
        ("spo:0.25@noisy", "dpo:0.25@noisy", "worse"),
    }


def test_plain_spo_stops_at_large_betas_and_nothing_else_does() -> None:
    runs = measured("alignment/stability/stability.csv")
    stopped = [run for run in runs if run["stopped_at"]]
    assert {(run["form"], run["beta"]) for run in stopped} == {("spo", "1"), ("spo", "5")}
    assert all(-46 < float(run["lowest_x"]) < -38 for run in stopped)
    # "linear_below=-1 has the fewest runs below SFT and the best mean win rate of the guarded".
    guarded = {}
    for form in ("spo-below0", "spo-below-1", "spo-below-2"):
        wins = [float(run["win_rate"]) for run in runs if run["form"] == form]
        guarded[form] = (sum(win < 0.5 for win in wins), -fmean(wins))
    assert min(guarded, key=lambda form: guarded[form]) == "spo-below-1"


def test_spo_and_dpo_at_four_times_the_beta_end_alike() -> None:
    for spo, dpo in (("spo:0.1", "dpo:0.4"), ("spo:0.025", "dpo:0.1")):
        for side in ("chosen", "rejected"):
            change = [mean(policy, f"train_dlogp_{side}") for policy in (spo, dpo)]
            assert abs(change[0] - change[1]) < 0.06 * abs(change[1])
    assert abs(mean("spo:0.1", "reward") - mean("dpo:0.4", "reward")) < 0.05
    assert abs(mean("spo:0.1", "kl") - mean("dpo:0.4", "kl")) < 0.2


def test_memorised_margins_settle_at_1_and_the_answers_are_ruined() -> None:
    assert abs(mean("spo:0.1", "train_x_mean", "memorised") - 1.0) < 0.01
    assert mean("spo:0.1", "malformed", "memorised") > 0.9
    assert mean("spo:1", "kl", "memorised") < 1.0 < 30.0 < mean("dpo:1", "kl", "memorised")


def test_a_known_gap_reduces_the_distance_more_than_tenfold() -> None:
    kl = {
        row["method"]: float(row["kl"])
        for row in measured("tabular.csv")
        if (row["labels"], row["beta"]) == ("clean", "0.3")
    }
    assert kl["SPO(beta)"] > 10 * kl["SPO, known gap"]
    assert kl["SPO(beta)"] > 10 * kl["SPO, known gap, weighted, guarded"]
