"""The stability study: its grid, its counts and what they recommend."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.alignment import stability
from benchmarks.alignment.arms import Arm
from benchmarks.alignment.store import open_store
from benchmarks.alignment.training import Stage
from helpers.alignment import TINY, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")


def outcome(form: str, stopped_at: int | None, rate: float, lr: float = 1e-3) -> stability.Outcome:
    setting = stability.Setting(Arm(form, 1.0), lr, None)
    return stability.Outcome(setting, stopped_at, 10.0, rate, 1.0, 0.1, -1.0)


def test_the_recommendation_follows_from_the_counts() -> None:
    safe = [outcome("spo-below0", None, 0.6), outcome("spo-below0", None, 0.4)]
    better = [outcome("spo-below-1", None, 0.7), outcome("spo-below-1", None, 0.55, lr=3e-4)]
    stopped = [outcome("spo", 7, 0.9), outcome("spo", None, 0.99)]
    unasked = [outcome("dpo", None, 0.95)] * 2
    advice = stability.advice([*stopped, *safe, *better, *unasked])
    assert "win rate): spo-below-1. Of its 2 runs 0 stopped and 0 ended below SFT" in advice
    assert "(of as many: spo-below0 0 and 1, spo 1 and 0)" in advice
    assert "Within it β 1, lr 0.001: 70.0 %" in advice
    assert "win rate): spo-below0." in stability.advice([*stopped, *safe])
    broken = [outcome("spo", 3, math.nan), *stopped]
    (count,) = stability.count_by(stability.form_of, broken)
    assert (count.stopped, count.worse_than_sft) == (2, 1)
    assert count.win_rate == pytest.approx((0.0 + 0.9 + 0.99) / 3)


def test_the_study_asks_for_what_it_says() -> None:
    runs = stability.STUDY.runs()
    assert len({run.name for run in runs}) == len(runs) == 180
    stages = {run.name: job for run, job in zip(runs, stability.STUDY.jobs()[1:], strict=True)}
    unclipped = next(
        run for run in runs if run.clip is None and run.lr == 3e-3 and run.arm.labels == "noisy"
    )
    name, arm, stage, *_ = stages[unclipped.name].function.args
    assert (name, arm, stage.lr, stage.clip) == (unclipped.name, unclipped.arm, 3e-3, None)
    assert (stage.steps, stage.lr_factor(149)) == (150, 1.0)


def test_a_small_study(tmp_path: Path) -> None:
    study = replace(
        stability.STUDY,
        foundation=TINY.foundation,
        stage=Stage(pairs=48, steps=6, batch=8, lr_end=1.0),
        forms=("dpo", "spo", "spo-below0"),
        betas=(1000.0,),
        rates=(3e-2,),
        clips=(None,),
    )
    store = open_store(tmp_path / "study", {})
    for job in study.jobs():
        job.function(store, lambda: None)
    text = stability.report(study, store)
    rows = rows_of(store.folder / "stability.csv")
    assert len(rows) == 6
    stopped = {(row["form"], row["labels"]) for row in rows if row["stopped_at"]}
    assert stopped >= {("spo", "noisy")}
    assert not any(form == "dpo" for form, _ in stopped)
    assert "win rate): spo-below0. Of its 2 runs 0 stopped" in text
    assert (store.folder / "stability.png").stat().st_size > 1000
