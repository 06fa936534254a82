"""What a part says: CSV files, pictures, and a summary on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import record
from benchmarks.studies.evaluation import win_rate
from benchmarks.studies.figures import draw_frontier, draw_margins, save
from benchmarks.studies.foundation import MEASURES
from benchmarks.studies.results import Policy, Results, Row, name_of

PACKAGES = ("torch", "numpy", "spoloss", "transformers")
SHOWN = (
    *("win_rate_vs_reference", "reward", "kl", *MEASURES),
    *("train_x_mean", "train_x_sd", "held_out_x_mean", "grad_norm_max"),
)
"""Columns of policies.csv in the summary."""


def report(
    parts: Sequence[Results], folder: Path, model: str, further: Mapping[str, list[Row]]
) -> None:
    """Writes and prints what parts of an experiment have found.

    Args:
      parts: those that share the folder; the pictures are of the first.
      folder: where the files go.
      model: what was trained.
      further: rows of further CSV files.
    """
    first = parts[0]
    seeds = f"{len(first.part.seeds)} seed{'s' * (len(first.part.seeds) > 1)}"
    title = f"{record.machine(*PACKAGES, 'vaderSentiment')}; {seeds}; {model}"
    policies = [*policy_rows(first, None)]  # the same in every part
    policies += [row for each in parts for arm in each.arms for row in policy_rows(each, arm)]
    tables = {"policies": policies, "pairs": pair_rows(first), **further}
    for name, kind in (("margins", "snapshots"), ("judgements", "judgements")):
        tables[name] = [row for results in parts for row in way_rows(results, kind)]
    print(f"\n{folder}: {title}")
    for name, rows in tables.items():
        if rows:
            record.write(folder / f"{name}.csv", title, rows)
    means = pd.DataFrame(policies).groupby(["stage", "policy"], sort=False)[[*SHOWN]].mean()
    print(means.to_string(float_format="{:.3g}".format, na_rep="-"))
    if decided := tables.get("decided"):
        print(pd.DataFrame(decided).to_string(index=False, float_format="{:.3f}".format))
    save(draw_frontier(first), folder / "frontier.png", title)
    if first.part.stage.snapshots:
        save(draw_margins(first), folder / "margins.png", title)


def policy_rows(results: Results, policy: Policy) -> Iterator[Row]:
    """Everything measured of a policy, seed by seed."""
    keys = ("reward", "kl", *MEASURES, "grad_norm_median", "grad_norm_max")
    seeds = zip(results.part.seeds, results.of(policy), results.references, strict=True)
    for seed, found, reference in seeds:
        row: Row = {"stage": results.part.name, "policy": name_of(policy), "seed": seed}
        rewards = (np.array(each["rewards"]) for each in (found, reference))
        row["win_rate_vs_reference"] = win_rate(*rewards)
        row |= {key: found.get(key) for key in (*keys, "steps", "stopped_at", "lowest_x")}
        for split in ("train", "held_out"):
            row |= {f"{split}_{key}": value for key, value in found.get(split, {}).items()}
        yield row


def pair_rows(results: Results) -> list[Row]:
    """The pairs of each seed: how many, and by how much their rewards differ."""
    seeds = zip(results.part.seeds, results.references, strict=True)
    return [
        {"seed": seed, **{key: each[key] for key in ("pairs", "mean_gap")}} for seed, each in seeds
    ]


def way_rows(results: Results, kind: str) -> list[Row]:
    """The margins, or the judged completions' means, at the steps where training looked at them."""
    return [
        {"stage": results.part.name, "policy": str(arm), "seed": seed}
        | {key: value for key, value in seen.items() if not isinstance(value, list)}
        for arm, found in results.arms.items()
        for seed, each in zip(results.part.seeds, found, strict=True)
        for seen in each[kind]
    ]
