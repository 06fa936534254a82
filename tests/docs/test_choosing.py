"""docs/choosing.md and other pages quote the tables of the committed runs, cell by cell."""

from __future__ import annotations

import re

import pytest

from helpers.pages import RESULTS, ROOT, measured, table_below

PAGE = (ROOT / "docs" / "choosing.md").read_text()
TABLES = (RESULTS / "alignment" / "full" / "tables.md").read_text()


def quoted(marker: str) -> list[tuple[list[str], dict[str, list[str]]]]:
    starts = [match.start() for match in re.finditer(re.escape(marker), PAGE)]
    return [table_below(PAGE[start:], marker) for start in starts]


@pytest.mark.parametrize("table", quoted("<!-- policies: clean -->"), ids=["beta", "gap"])
def test_policies(table: tuple[list[str], dict[str, list[str]]]) -> None:
    columns, ours = table_below(TABLES, "### Policies, clean labels")
    columns = ["gradient norm, max" if column == "max" else column for column in columns]
    header, policies = table
    assert len(policies) >= 7
    for policy, cells in policies.items():
        assert cells == [ours[policy][columns.index(name)] for name in header], policy


def test_changes_of_log_probability() -> None:
    columns, ours = table_below(TABLES, "### Pairs, clean labels")
    start = columns.index("Δlogp chosen")
    ((_, policies),) = quoted("<!-- pairs: clean -->")
    assert len(policies) == 6
    for policy, cells in policies.items():
        assert cells == ours[policy][start : start + 2], policy


def test_win_rates_in_the_text() -> None:
    for labels, rate in (("clean", "49.5 ± 0.9"), ("noisy", "49.7 ± 0.4")):
        assert f"SPO(0.1) over DPO(0.4), {labels} labels: {rate} %" in TABLES
        assert f"{rate} %" in PAGE
    text = " ".join(TABLES.split())
    found = re.findall(r"SPO\(([\d.]+)\) over DPO\(([\d.]+)\), clean labels: ([\d.]+)", text)
    rates = {(float(spo), float(dpo)): float(rate) for spo, dpo, rate in found}
    four_times = [rates[beta, 4 * beta] for beta in (0.025, 0.05, 0.1, 0.25)]
    assert (round(min(four_times)), round(max(four_times))) == (49, 51)
    assert "SPO(1) over DPO(4), clean labels: 43.8 ± 0.2 %" in TABLES
    assert (round(rates[0.1, 0.1]), round(rates[1.0, 1.0])) == (67, 30)


def test_memorised_pairs_in_the_text() -> None:
    columns, ours = table_below(TABLES, "### Memorised")

    def value(policy: str, column: str) -> float:
        return float(ours[policy][columns.index(column)])

    kl, wins = "KL (nats)", "win rate vs SFT (%)"
    for policy in ("SPO(1)", "DPO(1)"):
        both = (f"KL {value(policy, kl):.1f}", f"KL {value(policy, kl):.0f}")
        assert any(text in PAGE for text in both)
        assert f"{value(policy, wins):.0f} %" in PAGE
    assert f"(KL {value('SPO(0.1)', kl):.0f} and {value('DPO(0.1)', kl):.0f})" in PAGE


def test_stability() -> None:
    runs = measured("alignment/stability/stability.csv")
    ((_, quoted_rows),) = quoted("<!-- stability -->")
    for form, cells in quoted_rows.items():
        ours = [run for run in runs if run["form"] == form]
        clipped = [run for run in ours if run["clip"] != "none"]
        stopped = [bool(run["stopped_at"]) for run in ours]
        below = [float(run["win_rate"]) < 0.5 for run in ours]
        assert cells[:3] == [
            f"{sum(stopped)} of {len(ours)}",
            f"{sum(bool(run['stopped_at']) for run in clipped)} of {len(clipped)}",
            str(sum(below)),
        ], form
        assert cells[3] == f"{max(float(run['grad_norm_max']) for run in ours):.2g}", form
    plain = [run for run in runs if run["form"] == "spo"]
    gentle = [run for run in plain if run["beta"] == "0.1"]
    assert max(float(run["grad_norm_max"]) for run in gentle) < 9.0
    assert not any(run["stopped_at"] for run in gentle)
    assert all(-46 < float(run["lowest_x"]) < -38 for run in plain if run["stopped_at"])
    assert sum(bool(run["stopped_at"]) for run in plain if run["beta"] != "0.1") == 11


@pytest.mark.parametrize("page", ["README.md", "docs/from_dpo.md"])
def test_the_win_rate_that_other_pages_quote(page: str) -> None:
    rate = re.search(r"SPO\(0.1\) over DPO\(0.4\), clean labels: ([\d.]+ ± [\d.]+) %", TABLES)
    assert rate is not None
    assert f"{rate[1]} %" in " ".join((ROOT / page).read_text().split())
