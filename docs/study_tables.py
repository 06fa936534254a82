"""The tables of the studies, from the committed CSV files; pages call them as `tables` does."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean, stdev
from typing import Any

import numpy as np
from tables import Row, listed, measured, pivoted

from spoloss import DPO, SPO

MEANS = {
    "win_rate_vs_reference": ("win rate vs reference (%)", ".1%"),
    "reward": ("reward", ".2f"),
    "kl": ("KL (nats)", ".2f"),
    "tokens": ("tokens", ".1f"),
    "reference_nll": ("NLL under the reference (nats/token)", ".2f"),
    "distinct_2": ("distinct-2 (%)", ".1%"),
}
"""Columns of `policies` with a standard error: heading and format."""
OTHERS = {
    "grad_norm_median": ("gradient norm, median", "{grad_norm_median:.3g}"),
    "grad_norm_max": ("max", "{grad_norm_max_max:.2g}"),
    "train_x_mean": ("trained: x mean", "{train_x_mean:.2f}"),
    "train_x_sd": ("sd", "{train_x_sd:.2f}"),
    "train_x": ("10/50/90 %", "{train_x_q10:.2f} / {train_x_q50:.2f} / {train_x_q90:.2f}"),
    "train_dlogp_chosen": ("Δlogp chosen", "{train_dlogp_chosen:.2f}"),
    "train_dlogp_rejected": ("rejected", "{train_dlogp_rejected:.2f}"),
    "held_out_dlogp": (
        "held-out: Δlogp chosen / rejected",
        "{held_out_dlogp_chosen:.2f} / {held_out_dlogp_rejected:.2f}",
    ),
    "held_out_x_mean": ("held-out: x mean", "{held_out_x_mean:.2f}"),
}
"""Those without: heading and cell."""


def policies(run: str, stage: str, columns: str, names: str, corner: str = "") -> None:
    """Means over seeds of some policies, ± their standard errors.

    Args:
      run: a folder of results.
      stage: of training, as policies.csv has it.
      columns: keys of MEANS and OTHERS, separated by spaces.
      names: policies as policies.csv names them, separated by spaces.
      corner: the heading of the first column.
    """
    seeds = defaultdict(list)
    for row in measured(f"{run}/policies.csv"):
        if row["stage"] == stage or row["policy"] == "reference":
            seeds[row["policy"]].append(row)
    rows = [averaged(seeds[name]) | {"title": title(name.split("@")[0])} for name in names.split()]
    cells = {
        heading: f"{{{key}:{form}}} ± {{{key}_error:{form}}}"
        for key, (heading, form) in MEANS.items()
    }
    cells |= dict(OTHERS.values())
    headings = [(MEANS | OTHERS)[key][0] for key in columns.split()]
    listed(rows, {corner: "{title}"} | {heading: cells[heading] for heading in headings})


def averaged(seeds: list[dict[str, Any]]) -> dict[str, float]:
    """Mean, standard error and maximum of every number over seeds."""
    found: dict[str, float] = {}
    for name, first in seeds[0].items():
        if isinstance(first, (int, float)):
            values = [row[name] for row in seeds]
            error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            found |= {name: fmean(values), f"{name}_error": error, f"{name}_max": max(values)}
    return found


def title(policy: str) -> str:
    """SPO-below0(0.1) for spo-below0:0.1."""
    form, _, beta = policy.partition(":")
    form = form.replace("spo", "SPO").replace("dpo", "DPO")
    return f"{form}({beta})" if beta else form


def best_against_best() -> None:
    """SPO against DPO, each at its best beta."""
    studies = {
        "second study: 8 seeds, 50 completions per opening": "sentiment_second/matched",
        "first study: 4 other seeds, 10 completions": "sentiment/sweep",
    }
    columns = {
        "SmolLM2-135M-Instruct, judged by VADER": "{study}",
        "SPO": "{ours}",
        "DPO": "{theirs}",
        "SPO wins (%)": "{win_rate:.1%} ± {standard_error:.1%}",
        "95 % interval (%)": "{low:.1%} to {high:.1%}",
    }
    firsts = {study: measured(f"{run}/decided.csv")[0] for study, run in studies.items()}
    # The second study has several measures, so its column is `estimate`.
    rows = ({"win_rate": row.get("estimate"), **row, "study": s} for s, row in firsts.items())
    listed(rows, columns)


def matched_betas(run: str) -> None:
    """Win rates of SPO over DPO at the same beta and at four times that, in %.

    Args:
      run: a folder of results. Its verdicts are those of intervals for all comparisons at once.
    """
    marks = {"better": " (better)", "worse": " (worse)"}
    names = {1: "DPO(beta)", 4: "DPO(4 beta)"}
    cells = {}
    for row in measured(f"{run}/comparisons.csv"):
        beta, _, labels = row["spo"].removeprefix("spo:").partition("@")
        factor = round(float(row["dpo"].removeprefix("dpo:").partition("@")[0]) / float(beta))
        wins = f"{100 * row['win_rate']:.1f} ± {100 * row['standard_error']:.1f}"
        line = f"{names[factor]}, {labels or 'clean'} labels"
        cells[line, float(beta)] = wins + marks.get(row["verdict"], "")
    pivoted("SPO(beta) over", "beta = {:g}", cells)


def decided(part: str) -> None:
    """The comparisons of a part of the real-model study that were written down before its runs."""
    columns = {
        "comparison": "{question}",
        "the first": "{ours}, reward {our_reward:.3f} ± {our_reward_error:.3f}",
        "the second": "{theirs}, reward {their_reward:.3f} ± {their_reward_error:.3f}",
        "wins of the first (%)": "{win_rate:.1%} ± {standard_error:.1%}",
        "95 % interval (%)": "{low:.1%} to {high:.1%}",
        "verdict": "{verdict}",
    }
    listed(measured(f"sentiment/{part}/decided.csv"), columns)


def planned(part: str) -> None:
    """The comparisons of a part of the second study, as docs/second_study.md plans them.

    Args:
      part: a folder of sentiment_second. Its intervals hold at once; win rates are in %.
    """
    rows = []
    for row in measured(f"sentiment_second/{part}/decided.csv"):
        unit, form = ("%", ".1%") if row["measure"] == "win rate" else ("", "+.3f")
        form = f"{{:{form}}}".format
        numbers = ("estimate", "standard_error", "low", "high")
        found = {key: "-" if row[key] == "" else form(row[key]).strip("%") for key in numbers}
        found["standard_error"] = found["standard_error"].lstrip("+")
        sides = f"{row['ours']} against {row['theirs']}" if row.get("ours") else ""
        rows.append({**row, **found, "sides": sides, "unit": unit, "notes": notes(row)})
    columns = {
        "comparison": "{question}",
        "policies": "{sides}",
        "measure": "{measure} {unit}",
        "estimate": "{estimate} ± {standard_error}",
        "joint 95 % interval": "{low} to {high}",
        "verdict": "{verdict}",
        "notes": "{notes}",
    }
    listed(rows, columns)


def notes(row: Row) -> str:
    """What the plan says is reported with a comparison."""
    found = [f"{row['ties']:.1%} ties"] if row.get("ties", "") != "" else []
    if row.get("spo_points", "") != "":
        found.append(f"{row['spo_points']} policies of SPO, {row['dpo_points']} of DPO")
    return "; ".join(found + ([f"at an edge: {row['at_edge']}"] if row.get("at_edge") else []))


def over_training(measure: str, digits: int) -> None:
    """A measure of the completions during over-training, by policy and step; means over seeds."""
    found = defaultdict(list)
    for row in measured("sentiment/overtraining/judgements.csv"):
        found[title(row["policy"]), row["step"]].append(row[measure])
    cells = {key: f"{fmean(values):.{digits}f}" for key, values in found.items()}
    pivoted(measure, "step {}", cells)


def overflow() -> None:
    """The loss and the squared slope of one pair in float32, plain and with linear_below=-1."""
    losses = {"SPO": SPO(), "SPO, `linear_below=-1`": SPO(linear_below=-1.0), "DPO": DPO()}
    cells = {}
    for x in (-1, -10, -40, -44, -84, -90):
        margin = np.array([x], np.float32)
        for name, loss in losses.items():
            with np.errstate(over="ignore"):
                value, square = loss.value(margin, 1.0)[0], loss.slope(margin, 1.0)[0] ** 2
            cells[f"{name}: loss", -x] = f"{value:.2g}"
            cells[f"{name}: slope, squared", -x] = f"{square:.2g}"
    pivoted("", "x = -{:g}", cells)


def tabular(labels: str) -> None:
    """The distance to the optimal policy, KL(pi* || pi) in nats, by method and beta."""
    cells = {
        (row["method"], row["beta"]): f"{row['diverged']} diverged"
        if row["diverged"]
        else f"{row['kl']:.3f} ± {row['kl_error']:.3f}"
        for row in measured("tabular.csv")
        if row["labels"] == labels
    }
    pivoted(f"{labels} labels", "beta = {:g}", cells)


def real_pairs() -> None:
    """Held-out accuracy, margin and change of log-probability of each arm on real pairs."""
    columns = {
        "": "{title}",
        "held-out accuracy (%)": "{accuracy:.1%} ± {accuracy_error:.1%}",
        "minus DPO(0.4)'s (%)": "{lead:+.1%} ± {lead_error:.1%}",
        "h (nats)": "{h:.2f}",
        "Δlogp chosen / rejected (nats)": (
            "{held_out_dlogp_chosen:.2f} / {held_out_dlogp_rejected:.2f}"
        ),
        "64 trained pairs: x mean": "{train_x_mean:.2f}",
        "largest gradient norm": "{grad_norm_max:.2g}",
    }
    rows = measured("real_pairs/arms.csv")
    listed(({**row, "title": title(row["arm"])} for row in rows), columns)
