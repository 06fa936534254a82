"""Whole runs of the studies on the made-up language: what they leave, and how they go on."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import InputError, alignment, stability
from benchmarks.studies.__main__ import main
from benchmarks.studies.evaluation import win_rate
from benchmarks.studies.experiment import jobs_of, settings_of
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


def test_a_run_leaves_its_tables_and_figures(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    tables = ("win_rates", "policies", "comparisons", "margins", "limits", "texts")
    assert names >= {f"{name}.csv" for name in tables} | {"frontier.png", "margins.png"}
    policies = rows_of(finished / "policies.csv")
    assert {(row["policy"], row["seed"]) for row in policies} == {
        *((arm, seed) for arm in ("sft", *map(str, TINY_PARTS[0].arms)) for seed in "01"),
        ("spo:0.25", "0"),
    }


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


def test_an_interrupted_run_goes_on_and_gives_the_same(finished: Path, tmp_path: Path) -> None:
    store = open_store(tmp_path / "run", settings_of(TINY, TINY_PARTS))
    for job in jobs_of(TINY, TINY_PARTS):
        job.function(store)
    # Seeds hang on names, not on processes or their order: arms train alike up to rounding.
    for path in finished.glob("work/seed-0/*_*.json"):
        ours, theirs = (
            json.loads((folder / path.relative_to(finished)).read_text())["grad_norms"]
            for folder in (store.folder, finished)
        )
        assert ours == pytest.approx(theirs, rel=1e-3), path

    path = store.path("seed-0/dpo:0.1")
    path.unlink()
    kept = {each: each.stat().st_mtime_ns for each in store.folder.glob("work/*/*.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(alignment.SIZES, "quick", (TINY, TINY_PARTS, store.folder))
        assert main(["alignment", "--quick", "--workers", "1"]) == 0
    assert path.exists()
    assert {each: each.stat().st_mtime_ns for each in kept} == kept


def test_folders_of_others_stay_as_they_are(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["alignment", "--quick", "--output", str(tmp_path)]) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    open_store(tmp_path / "run", {"stage": 1})
    with pytest.raises(InputError, match="these differ: stage;"):
        open_store(tmp_path / "run", {"stage": 2})


@pytest.mark.parametrize(
    ("folder", "settings"),
    [
        ("full", settings_of(alignment.FULL_FOUNDATION, alignment.FULL_PARTS)),
        ("stability", asdict(stability.STUDY)),
    ],
)
def test_the_published_results_are_of_these_settings(folder: str, settings: dict) -> None:
    published = json.loads((RESULTS / "alignment" / folder / "settings.json").read_text())
    assert published == json.loads(json.dumps(settings))


# -------------------------------------------------------------------------------------- stability


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


def test_counts_of_runs() -> None:
    row = {"form": "spo", "clip": 1.0, "grad_norm_max": 2.0}
    rows = [
        row | {"stopped_at": 3, "win_rate": math.nan},
        row | {"stopped_at": None, "win_rate": 0.9, "grad_norm_max": 5.0},
        row | {"stopped_at": None, "win_rate": 0.3},
    ]
    counts = stability.counts(rows).loc["spo", 1.0]
    assert (counts["runs"], counts["stopped"], counts["below_sft"]) == (3, 1, 2)
    assert (counts["grad_norm_max"], counts["win_rate"]) == (5.0, pytest.approx(0.4))
