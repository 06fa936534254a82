"""docs/real_model.md describes the task that runs and what the committed runs show."""

from __future__ import annotations

import re

from benchmarks.alignment.sentiment.parts import PARTS, STAGE, full_protocol, quick_protocol
from benchmarks.alignment.sentiment.task import LEAST_GAP, OPENINGS, THINGS
from helpers.pages import RESULTS, ROOT, measured, table_below

PAGE = (ROOT / "docs" / "real_model.md").read_text()
TEXT = " ".join(PAGE.split())
QUICK = (RESULTS / "sentiment" / "quick" / "tables.md").read_text()


def quick(heading: str, row: str, column: str) -> str:
    columns, rows = table_below(QUICK, heading)
    return rows[row][columns.index(column)]


def test_the_task_is_the_one_that_runs() -> None:
    foundation = full_protocol("model").foundation
    assert f"{len(THINGS) * len(OPENINGS)} openings" in TEXT
    assert f"({len(THINGS)} things in {len(OPENINGS)} phrasings)" in TEXT
    assert f"A seed holds out {foundation.held_out_openings} of them" in TEXT
    assert f"or {foundation.length} tokens" in TEXT
    assert f"differ by {LEAST_GAP} or more" in TEXT
    assert f"{STAGE.steps} steps of {STAGE.batch} pairs" in TEXT
    assert (STAGE.lr, STAGE.lr_end, STAGE.clip) == (3e-4, 0.0, 1.0)
    seeds = {name: part.seeds for name, part in PARTS.items()}
    assert seeds == {"sweep": 5, "overtraining": 3, "flips": 3, "gaps": 3}
    assert "There are five seeds in (a) and three in the other parts" in TEXT
    over = PARTS["overtraining"].stage
    passes = over.steps * over.batch / over.pairs
    assert f"{over.pairs} pairs, {over.steps} steps of {over.batch} pairs" in TEXT
    assert f"({passes:.0f} passes)" in TEXT


def test_what_has_been_run_is_what_is_committed() -> None:
    for name in PARTS:
        if (RESULTS / "sentiment" / name).exists():
            assert f"sentiment/{name}/tables.md" in PAGE
    if not any((RESULTS / "sentiment" / name).exists() for name in PARTS):
        assert "None of the comparisons (a) to (d) has been run" in TEXT


def test_what_the_page_concludes_from_the_quick_run() -> None:
    arms = ("DPO(0.1)", "DPO(0.4)", "SPO(0.1)")
    policies = "### Policies, clean labels"

    def figures(column: str) -> list[float]:
        return [float(quick(policies, row, column)) for row in ("reference", *arms)]

    reward, nll = figures("reward"), figures("NLL under the reference (nats/token)")
    assert min(reward[1:]) > reward[0]
    assert max(abs(each - nll[0]) for each in nll[1:]) < 0.2
    assert abs(float(quick("### All win rates", "SPO(0.1)", "DPO(0.4)")) - 50.0) < 1.0
    assert re.search(r"^196 training pairs", QUICK, re.MULTILINE)
    assert "(2.6 passes at most)" in QUICK
    assert all(quick("### Pairs, clean labels", arm, "x < 0 (%)") == "0" for arm in arms)
    assert f"Of the {quick_protocol('model').foundation.measured_pairs} training pairs" in TEXT
    held_out = [
        float(row["held_out_x_mean"] or "nan")
        for row in measured("sentiment/quick/policies.csv")[1:]
    ]
    assert max(map(abs, held_out)) < 0.05
