"""The pictures of a run."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.studies.arms import Arm
from benchmarks.studies.results import Estimate, Results
from benchmarks.studies.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "dpo": "tab:blue",
    "spo": "tab:red",
    "spo-below-1": "tab:orange",
    "squared": "tab:green",
    "dpo-soft": "tab:cyan",
    "squared-gap": "tab:olive",
    "spo-gap-weighted-below0": "tab:purple",
    "dpo-weighted": "navy",
    "spo-weighted-below0": "magenta",
}


def save(figure: Figure, path: Path, header: str) -> None:
    """Writes a figure as PNG, under a line that says where it comes from."""
    figure.suptitle(textwrap.fill(header, 110), fontsize=7)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(path, buffer.getvalue())


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
    kl = [results.estimate(arm, "kl") for arm in arms]
    reward = [results.estimate(arm, "reward") for arm in arms]
    axes.errorbar(
        means(kl),
        means(reward),
        yerr=errors(reward),
        xerr=errors(kl),
        fmt="D" if len(arms) == 1 else "o-" if rate is None else "o:",
        color=COLOURS[form],
        markersize=4,
        linewidth=1,
        label=form if rate is None else f"{form}, rate {rate:g}",
    )
    for arm, x, y in zip(arms, means(kl), means(reward), strict=True):
        axes.annotate(
            f"{arm.beta:g}", (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points"
        )


def means(estimates: Sequence[Estimate]) -> list[float]:
    """The means of estimates."""
    return [estimate.mean for estimate in estimates]


def errors(estimates: Sequence[Estimate]) -> list[float]:
    """Their standard errors, 0 where there is but one seed."""
    return [0.0 if math.isnan(estimate.error) else estimate.error for estimate in estimates]


def draw_margins(results: Results) -> Figure:
    """Implicit reward margins x = beta * h on memorised and on held-out pairs, over training."""
    figure = Figure(figsize=(12, 4.8), layout="constrained", dpi=90)
    titles = {"train": "memorised pairs", "held_out": "held-out pairs"}
    greatest = max(arm.beta for arm in results.arms)
    for axes, (split, heading) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for arm, found in results.arms.items():
            seen = [each for each in found[0]["snapshots"] if each["split"] == split]
            steps = [each["step"] for each in seen]
            low, middle, high = ([each[f"x_q{q}"] for each in seen] for q in (10, 50, 90))
            style = "-" if arm.beta == greatest else "--"
            axes.plot(steps, middle, style, color=COLOURS[arm.form], label=arm.title)
            axes.fill_between(steps, low, high, color=COLOURS[arm.form], alpha=0.15)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(f"{heading} (seed {results.part.seeds[0]}): median, 10 to 90 %")
        axes.set_xlabel("step")
        axes.set_ylabel("x = β·h")
        axes.legend(fontsize=8)
    return figure
