"""The tables of the studies, from the committed CSV files; pages call them as `tables` does."""

from __future__ import annotations

import numpy as np
import pandas as pd
from tables import RESULTS, Row, listed, measured, pivoted, write

from spoloss import DPO, SPO

NONE = "not finite"
"""Stands for a mean over seeds of which one has no finite value."""
NOT_REACHED = "not reached in all seeds"
"""Stands for a mean after a step that training did not come to in every seed."""
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

    A title says how many seeds stopped at a loss or gradient that is not finite.

    Args:
      run: a folder of results.
      stage: of training, as policies.csv has it.
      columns: keys of MEANS and OTHERS, separated by spaces.
      names: policies as policies.csv names them, separated by spaces.
      corner: the heading of the first column.
    """
    found = seeds_of(f"{run}/policies.csv")
    found = found[(found["stage"] == stage) | (found["policy"] == "reference")]
    found = found.set_index("policy")
    forms = {
        heading: f"{{{key}:{form}}} ± {{{key}_error:{form}}}"
        for key, (heading, form) in MEANS.items()
    }
    forms |= dict(OTHERS.values())
    headings = [(MEANS | OTHERS)[key][0] for key in columns.split()]
    lines = []
    for name in names.split():
        seeds = found.loc[[name]]
        numbers = seeds.select_dtypes("number")
        errors, greatest = numbers.sem().add_suffix("_error"), numbers.max().add_suffix("_max")
        row = {**numbers.mean(skipna=False), **errors, **greatest}
        cells = [forms[heading].format_map(row) for heading in headings]
        cells = [cell.replace("%", "").replace(" ± nan", "") for cell in cells]  # of one seed
        stopped = seeds["stopped_at"].count()
        marked = f", stopped in {stopped} of {len(seeds)} seeds" if stopped else ""
        empty = "-" if name == "reference" else NONE  # the reference is not trained
        lines.append([title(name) + marked, *(empty if "nan" in cell else cell for cell in cells)])
    write([corner, *headings], lines)


def seeds_of(name: str) -> pd.DataFrame:
    """The rows of a committed CSV file, below the line about the machine; empty cells are nan."""
    return pd.read_csv(RESULTS / name, skiprows=1)


def title(policy: str) -> str:
    """SPO-below0(0.1) for spo-below0:0.1, with the rate behind a ~, without what is behind an @."""
    form, _, rest = policy.partition("@")[0].partition(":")
    form = form.replace("spo", "SPO").replace("dpo", "DPO")
    return f"{form}({rest.replace('~', ', rate ')})" if rest else form


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
        found = {"estimate": "cannot be computed", "interval": "none"}
        if row["low"] != "":
            estimate, low, high = (
                f"{row[key]:{form}}".strip("%") for key in ("estimate", "low", "high")
            )
            error = f"{row['standard_error']:{form}}".strip("+%")
            found = {"estimate": f"{estimate} ± {error}", "interval": f"{low} to {high}"}
        sides = f"{row['ours']} against {row['theirs']}" if row.get("ours") else ""
        rows.append({**row, **found, "sides": sides, "unit": unit, "notes": notes(row)})
    columns = {
        "comparison": "{question}",
        "policies": "{sides}",
        "measure": "{measure} {unit}",
        "estimate": "{estimate}",
        "joint 95 % interval": "{interval}",
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


def on_the_way(run: str, measure: str, digits: int) -> None:
    """A measure of the completions during training, by policy and step; means over seeds."""
    found = seeds_of(f"{run}/judgements.csv")
    seeds = found["seed"].nunique()
    cells = {
        (title(policy), step): mean_after(values, seeds, f".{digits}f")
        for (policy, step), values in found.groupby(["policy", "step"], sort=False)[measure]
    }
    pivoted(measure, "step {}", cells)


def mean(values: pd.Series, form: str) -> str:
    """The mean over seeds, in words where one of them has none."""
    return NONE if values.isna().any() else f"{values.mean():{form}}"


def mean_after(values: pd.Series, seeds: int, form: str) -> str:
    """`mean` after a step, in words where fewer than so many seeds came to it."""
    return mean(values, form) if len(values) == seeds else NOT_REACHED


def objective() -> None:
    """J on the way and at the end, and its share of the optimum's lead over the reference."""
    found = seeds_of("sentiment_second/on-policy/objective.csv")
    last = found[found["step"].isna()]
    steps = sorted(found["step"].dropna().unique())
    lines = []
    for policy, seeds in found.groupby("policy", sort=False):
        end = seeds[seeds["step"].isna()]
        way = [mean_after(seeds["j"][seeds["step"] == s], len(end), "+.3f") for s in steps]
        lines.append([title(policy), *way, mean(end["j"], "+.3f"), mean(end["attained"], "+.0%")])
    for name in ("reference", "optimum"):  # one for each seed, whatever the policy
        lines.append([name, *[""] * len(steps), mean(last[name], "+.3f"), ""])
    headings = [f"J, step {step:g}" for step in steps]
    write(["", *headings, "J, end", "share of the optimum's lead over the reference"], lines)


def road() -> None:
    """The map of part 4: reward / KL by loss, beta and learning rate; means over seeds.

    Bold is within 0.05 reward of the best. Of a run that stopped, the policy before is judged.
    """
    cells = {}
    for row in measured("sentiment_second/road/road.csv"):
        cell = NONE
        if row["reward"] != "":
            cell = f"{row['reward']:.2f} / {row['kl']:.2f}"
            cell = f"**{cell}**" if row["near_best"] == "True" else cell
            cell += "" if row["finite"] == "True" else ", stopped"
        cells[title(f"{row['form']}:{row['beta']}"), row["rate"]] = cell
    pivoted("reward / KL (nats)", "learning rate {:g}", cells)


def shares() -> None:
    """The shares of part 4's arms, by loss."""
    columns = {
        "loss": "{title}",
        "finite in all seeds (%)": "{finite:.0%}",
        "within 0.05 reward of the best (%)": "{near_best:.0%}",
    }
    rows = measured("sentiment_second/road/shares.csv")
    listed(({**row, "title": title(row["form"])} for row in rows), columns)


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
