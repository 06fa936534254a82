"""The pictures of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure

from benchmarks.studies.arms import FORMS, Arm
from benchmarks.studies.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = dict(zip(FORMS, TABLEAU_COLORS, strict=False))
"""The same for a form in every picture."""


def save(figure: Figure, path: Path, header: str) -> None:
    """Writes a figure as PNG, under a line that says where it comes from."""
    figure.suptitle(textwrap.fill(header, 110), fontsize=7)
    figure.savefig(path)


def draw_frontier(results: Results) -> Figure:
    """True reward against divergence."""
    figure = Figure(figsize=(7.0, 5.5), layout="constrained", dpi=90)
    axes = figure.subplots()
    for form, rate in dict.fromkeys((arm.form, arm.rate) for arm in results.arms):
        draw_family(axes, results, [a for a in results.sorted_arms(form) if a.rate == rate])
    axes.set(xscale="log", xlabel="KL(π ‖ π_ref), nats", ylabel="reward")
    axes.set_xlim(left=0.05)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_family(axes: Axes, results: Results, arms: Sequence[Arm]) -> None:
    """One loss at its betas and one learning rate, with standard errors."""
    form, rate = arms[0].form, arms[0].rate
    kl, reward = (
        pd.DataFrame({arm: results.values(arm, key) for arm in arms}) for key in ("kl", "reward")
    )
    x, y = kl.mean(skipna=False), reward.mean(skipna=False)
    axes.errorbar(
        x,
        y,
        yerr=reward.sem(skipna=False),
        xerr=kl.sem(skipna=False),
        fmt="D" if len(arms) == 1 else "o-" if rate is None else "o:",
        color=COLOURS[form],
        markersize=4,
        linewidth=1,
        label=form if rate is None else f"{form}, rate {rate:g}",
    )
    for arm in arms:
        offset = {"fontsize": 7, "xytext": (3, 3), "textcoords": "offset points"}
        axes.annotate(f"{arm.beta:g}", (x[arm], y[arm]), **offset)


def draw_margins(results: Results) -> Figure:
    """Implicit reward margins x = beta * h on memorised and on held-out pairs, over training."""
    figure = Figure(figsize=(12, 4.8), layout="constrained", dpi=90)
    titles = {"train": "memorised pairs", "held_out": "held-out pairs"}
    greatest = max(arm.beta for arm in results.arms)
    for axes, (split, heading) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for arm, found in results.arms.items():
            # A run that stopped early has few snapshots, or none.
            seen = [each for each in found[0]["snapshots"] if each["split"] == split]
            steps, low, median, high = (
                [each[key] for each in seen] for key in ("step", "x_q10", "x_q50", "x_q90")
            )
            style = "-" if arm.beta == greatest else "--"
            axes.plot(steps, median, style, color=COLOURS[arm.form], label=arm.title)
            axes.fill_between(steps, low, high, color=COLOURS[arm.form], alpha=0.15)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(f"{heading} (seed {results.part.seeds[0]}): median, 10 to 90 %")
        axes.set(xlabel="step", ylabel="x = β·h")
        axes.legend(fontsize=8)
    return figure
