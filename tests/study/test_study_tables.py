"""The tables of the studies, where a run has stopped early."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pages import ROOT

pytestmark = pytest.mark.extended

POLICIES = """# a machine
stage,policy,seed,reward,stopped_at
matched,reference,0,0.1,
matched,dpo:0.1,0,0.2,
"""
JUDGEMENTS = """# a machine
stage,policy,seed,step,reward
overtrained,dpo:0.1,0,40,0.2
overtrained,dpo:0.1,0,120,0.3
overtrained,dpo:0.1,1,40,0.4
overtrained,dpo:0.1,1,120,
overtrained,spo:0.1,0,40,0.6
overtrained,spo:0.1,0,120,0.7
overtrained,spo:0.1,1,40,0.8
"""
OBJECTIVE = """# a machine
policy,seed,step,j,reference,optimum,attained
dpo:0.2,0,60,0.1,0.0,0.8,0.1
dpo:0.2,0,,0.2,0.0,0.8,0.25
dpo:0.2,1,60,0.3,0.0,0.8,0.4
dpo:0.2,1,120,0.3,0.0,0.8,0.4
dpo:0.2,1,,0.4,0.0,0.8,0.5
spo:0.2,0,,0.1,0.0,0.8,0.1
spo:0.2,1,,0.1,0.0,0.8,0.1
"""


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """docs/study_tables.py, which reads results from here."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import study_tables

    monkeypatch.setattr(study_tables, "RESULTS", tmp_path)
    contents = {
        "run/policies.csv": POLICIES,
        "run/judgements.csv": JUDGEMENTS,
        "sentiment_second/on-policy/objective.csv": OBJECTIVE,
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return study_tables


def test_a_step_that_not_all_seeds_reached_has_no_mean(tables, capsys) -> None:
    missed = tables.NOT_REACHED
    tables.on_the_way("run", "reward", 2)
    lines = capsys.readouterr().out.split("\n")
    assert "| DPO(0.1) | 0.30 | not finite |" in lines
    assert f"| SPO(0.1) | 0.70 | {missed} |" in lines
    tables.objective()
    lines = capsys.readouterr().out.split("\n")
    assert f"| DPO(0.2) | +0.200 | {missed} | +0.300 | +38% |" in lines
    assert f"| SPO(0.2) | {missed} | {missed} | +0.100 | +10% |" in lines


def test_a_policy_without_results_is_an_error(tables, capsys) -> None:
    tables.policies("run", "matched", "reward", "dpo:0.1")
    assert "| DPO(0.1) | 0.20 |" in capsys.readouterr().out
    with pytest.raises(KeyError, match=r"dpo:0\.2"):
        tables.policies("run", "matched", "reward", "dpo:0.2")
