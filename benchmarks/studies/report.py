"""What a run says: CSV files, pictures, and a summary on the screen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import pandas as pd

from benchmarks import record
from benchmarks.studies.figures import draw_frontier, draw_margins, save
from benchmarks.studies.results import (
    Policy,
    Results,
    Row,
    rewards_win_rate,
    verdict,
    win_interval,
)

PACKAGES = ("torch", "numpy", "spoloss")
SHOWN = ("reward", "kl", "train_x_mean", "train_x_sd", "held_out_x_mean", "grad_norm_max")
"""Columns of policies.csv in the summary, beside the win rate and the task's measures."""


def title_of(seeds: int, *packages: str) -> str:
    """Where and with what a run was made, in one line."""
    return f"{record.machine(*PACKAGES, *packages)}; {seeds} seed{'s' * (seeds > 1)}"


def report(
    parts: Sequence[Results],
    folder: Path,
    title: str,
    *,
    memorised: Results | None = None,
    further: Mapping[str, list[Row]] | None = None,
) -> None:
    """Writes and prints what parts of an experiment have found.

    Args:
      parts: those that share the folder; win rates and the frontier are of the first.
      folder: where the files go.
      title: the line above every CSV file and picture.
      memorised: the part whose margins are drawn.
      further: rows of further CSV files.
    """
    first, tables = parts[0], tables_of(parts) | (further or {})
    print(f"\n{folder}: {title}")
    for name, rows in tables.items():
        if rows:
            record.write(folder / f"{name}.csv", title, rows)
    print_summary(first, tables)
    save(draw_frontier(first), folder / "frontier.png", title)
    if memorised is not None:
        save(draw_margins(memorised), folder / "margins.png", title)


def tables_of(parts: Sequence[Results]) -> dict[str, list[Row]]:
    """The rows of the CSV files that every experiment has, by name."""
    first = parts[0]
    return {
        "win_rates": win_rows(first),
        # The reference is the same in every part, so it is listed with the first.
        "policies": [
            *policy_rows(first, None),
            *(row for each in parts for arm in each.arms for row in policy_rows(each, arm)),
        ],
        "comparisons": comparison_rows(first),
        "pairs": [pair_row(first)],
        "margins": [row for results in parts for row in margin_rows(results)],
        "limits": [
            {"seed": seed, **limit}
            for seed, found in zip(first.part.all_seeds, first.references, strict=True)
            for limit in found["limits"]
        ],
        "texts": [
            {"policy": first.name(policy), "text": text}
            for policy in (None, *first.arms)
            for text in first.of(policy)[0]["texts"]
        ],
    }


def print_summary(results: Results, tables: Mapping[str, list[Row]]) -> None:
    """Means over seeds of every policy, then the comparisons."""
    policies = pd.DataFrame(tables["policies"])
    wins = f"win_rate_vs_{results.name(None)}"
    shown = [wins, *SHOWN[:2], *results.foundation.measures, *SHOWN[2:]]
    means = policies.groupby(["stage", "policy"], sort=False)[shown].mean()
    print(means.to_string(float_format="{:.3g}".format, na_rep="-"))
    for name in ("comparisons", "decided", "gains"):
        if tables.get(name):
            rows = pd.DataFrame(tables[name])
            print(f"\n{name}\n{rows.to_string(index=False, float_format='{:.3f}'.format)}")


def win_rows(results: Results) -> list[Row]:
    """All win rates, over all kinds of labels."""
    policies: list[Policy] = [None, *results.arms]
    return [
        {
            "row": results.name(a),
            "column": results.name(b),
            "win_rate": wins.mean,
            "standard_error": wins.error,
            **{
                f"seed_{seed}": value
                for seed, value in zip(results.part.all_seeds, wins.values, strict=True)
            },
        }
        for a in policies
        for b in policies
        if a != b
        for wins in [results.wins(a, b)]
    ]


def policy_rows(results: Results, policy: Policy) -> Iterator[Row]:
    """Everything measured of a policy, seed by seed."""
    keys = ("reward", "kl", *results.foundation.measures, "grad_norm_median", "grad_norm_max")
    seeds = zip(results.part.all_seeds, results.of(policy), results.references, strict=True)
    for seed, found, reference in seeds:
        row: Row = {"stage": results.part.name, "policy": results.name(policy), "seed": seed}
        row[f"win_rate_vs_{results.name(None)}"] = rewards_win_rate(found, reference)
        row |= {key: found.get(key) for key in (*keys, "steps", "stopped_at", "lowest_x")}
        for split in ("train", "held_out"):
            row |= {f"{split}_{key}": value for key, value in found.get(split, {}).items()}
        yield row


def comparison_rows(results: Results) -> list[Row]:
    """SPO(beta) against DPO(beta) and DPO(4 beta), with intervals for each alone and for all."""
    number = len(results.comparisons)
    rows = []
    for each in results.comparisons:
        row: Row = {"spo": str(each.ours), "dpo": str(each.theirs)}
        row |= {"win_rate": each.wins.mean, "standard_error": each.wins.error}
        if not math.isnan(each.wins.error):
            row |= dict(zip(("low_alone", "high_alone"), win_interval(each.wins, 1), strict=True))
            low, high = win_interval(each.wins, number)
            row |= {"low": low, "high": high, "verdict": verdict((low, high))}
        rows.append(row)
    return rows


def pair_row(results: Results) -> Row:
    """The pairs of the seeds: how many, by how much their rewards differ, how noisy labels are."""
    pairs = [found["pairs"] for found in results.references]
    mean = {
        key: fmean(found[key] for found in results.references)
        for key in ("mean_gap", "wrong_labels")
    }
    return {"seeds": len(pairs), "least_pairs": min(pairs), "most_pairs": max(pairs), **mean}


def margin_rows(results: Results) -> list[Row]:
    """Margins over training."""
    return [
        {"stage": results.part.name, "policy": str(arm), "seed": seed, **snapshot}
        for arm, found in results.arms.items()
        for seed, each in zip(results.part.all_seeds, found, strict=True)
        for snapshot in each["snapshots"]
    ]
