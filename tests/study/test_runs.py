"""Whole runs of the studies on the made-up language: what they leave, and how they go on."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import alignment, sentiment, stability
from benchmarks.studies.__main__ import main
from benchmarks.studies.evaluation import win_rate
from benchmarks.studies.experiment import settings_of
from benchmarks.studies.store import open_store
from benchmarks.studies.training import Stage
from helpers.alignment import TINY, TINY_PARTS, rows_of
from helpers.pages import RESULTS

pytestmark = [pytest.mark.extended, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alignment") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(alignment.SIZES, "quick", (TINY, TINY_PARTS, folder))
        assert main(["alignment", "--quick"]) == 0
    return folder


def test_published_win_rates_are_those_of_the_kept_rewards(finished: Path) -> None:
    rows = {(row["row"], row["column"]): row for row in rows_of(finished / "win_rates.csv")}
    assert len(rows) == 5 * 4
    rates = []
    for seed in (0, 1):
        work = finished / "work" / f"seed-{seed}"
        a, b = (
            np.array(json.loads((work / f"{name}.json").read_text())["rewards"])
            for name in ("spo_0.1@noisy", "foundation")
        )
        assert a.shape == (32, 4)
        rates.append(win_rate(a, b))
    row, mirrored = rows["spo:0.1@noisy", "sft"], rows["sft", "spo:0.1@noisy"]
    assert float(row["win_rate"]) == pytest.approx(statistics.fmean(rates), rel=1e-5)
    assert float(mirrored["win_rate"]) == pytest.approx(1 - statistics.fmean(rates), rel=1e-5)
    error = abs(rates[0] - rates[1]) / 2
    assert float(row["standard_error"]) == pytest.approx(error, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("folder", "settings"),
    [
        ("alignment/full", settings_of(alignment.FULL_FOUNDATION, alignment.FULL_PARTS)),
        ("alignment/stability", asdict(stability.STUDY)),
        ("sentiment", {name: part.settings() for name, part in sentiment.PARTS.items()}),
    ],
)
def test_the_published_results_are_of_these_settings(folder: str, settings: dict) -> None:
    published = json.loads((RESULTS / folder / "settings.json").read_text())
    assert {name: published[name] for name in settings} == json.loads(json.dumps(settings))


def test_a_small_stability_study(tmp_path: Path) -> None:
    study = replace(
        stability.STUDY,
        foundation=TINY,
        stage=Stage(pairs=48, steps=6, batch=8, lr_end=1.0),
        forms=("dpo", "spo", "spo-below0"),
        betas=(1000.0,),
        rates=(3e-2,),
        clips=(None,),
    )
    store = open_store(tmp_path / "study", {})
    for job in study.jobs():
        job.function(store)
    stability.report(study, store)
    rows = rows_of(store.folder / "stability.csv")
    assert len(rows) == 6
    stopped = {(row["form"], row["labels"]) for row in rows if row["stopped_at"]}
    assert stopped >= {("spo", "noisy")}
    assert not any(form == "dpo" for form, _ in stopped)
