"""What a part says: CSV files, pictures, and a summary on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import record
from benchmarks.studies.evaluation import win_rate
from benchmarks.studies.figures import draw_frontier, draw_margins, save
from benchmarks.studies.foundation import MEASURES
from benchmarks.studies.results import Results, Tables

PACKAGES = ("torch", "numpy", "spoloss", "transformers", "vaderSentiment")
SHOWN = (
    *("win_rate_vs_reference", "reward", "kl", *MEASURES),
    *("train_x_mean", "train_x_sd", "held_out_x_mean", "grad_norm_max"),
)
"""Columns of policies.csv in the summary."""


def report(parts: Sequence[Results], folder: Path, model: str, further: Tables) -> None:
    """Writes and prints what parts of an experiment have found.

    Args:
      parts: those that share the folder; the pictures are of the first.
      folder: where the files go.
      model: what was trained.
      further: further CSV files.
    """
    first, *others = parts
    seeds = f"{len(first.part.seeds)} seed{'s' * (len(first.part.seeds) > 1)}"
    title = f"{record.machine(*PACKAGES)}; {seeds}; {model}"
    tables = {
        "policies": [
            *policy_rows(first),
            # That of a seed is the same in every part, and of the pilot's seed none is shown.
            *(row for each in others for row in policy_rows(each) if row["policy"] != "reference"),
        ],
        "pairs": pair_rows(first),
        **further,
        "margins": [row for results in parts for row in way_rows(results, "snapshots")],
        "judgements": [row for results in parts for row in way_rows(results, "judgements")],
    }
    print(f"\n{folder}: {title}")
    for name, rows in tables.items():
        if rows:
            record.write(folder / f"{name}.csv", title, rows)
    policies = pd.DataFrame(tables["policies"]).groupby(["stage", "policy"], sort=False)
    print(policies[[*SHOWN]].mean().to_string(float_format="{:.3g}".format, na_rep="-"))
    if "decided" in tables:
        decided = pd.DataFrame(tables["decided"])
        print(decided.to_string(index=False, float_format="{:.3f}".format))
    save(draw_frontier(first), folder / "frontier.png", title)
    if first.part.stage.snapshots:
        save(draw_margins(first), folder / "margins.png", title)


def policy_rows(results: Results) -> Iterator[dict[str, Any]]:
    """Everything measured of every policy, seed by seed."""
    training = ("grad_norm_median", "grad_norm_max", "steps", "stopped_at", "lowest_x")
    for policy, seeds in results.policies().items():
        both = zip(results.part.seeds, seeds, results.references, strict=True)
        for seed, found, reference in both:
            rewards = (np.array(each["rewards"]) for each in (found, reference))
            yield {
                "stage": results.part.name,
                "policy": policy,
                "seed": seed,
                "win_rate_vs_reference": win_rate(*rewards),
                **{key: found[key] for key in ("reward", "kl", *MEASURES)},
                **{key: found.get(key) for key in training},
                **{
                    f"{split}_{key}": value
                    for split in ("train", "held_out")
                    for key, value in found.get(split, {}).items()
                },
            }


def pair_rows(results: Results) -> list[dict[str, Any]]:
    """The pairs of each seed: how many, and by how much their rewards differ."""
    seeds = zip(results.part.seeds, results.references, strict=True)
    return [
        {"seed": seed, **{key: each[key] for key in ("pairs", "mean_gap")}} for seed, each in seeds
    ]


def way_rows(results: Results, kind: str) -> list[dict[str, Any]]:
    """The margins, or the judged completions' means, at the steps where training looked at them."""
    return [
        {"stage": results.part.name, "policy": str(arm), "seed": seed}
        | {key: value for key, value in seen.items() if not isinstance(value, list)}
        for arm, found in results.arms.items()
        for seed, each in zip(results.part.seeds, found, strict=True)
        for seen in each[kind]
    ]
