"""The plots of the preference stage: loss, rewards, margins and log-probabilities."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from arguments import Options

Columns = dict[str, list[float]]


def draw_curves(output: Path, options: Options) -> None:
    """Plots the CSV files of a run in curves.png in the same folder."""
    batches = read_columns(output / "steps.csv", "preference")
    held_out = read_columns(output / "held_out.csv")
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(f"Preference training: {options.loss}, beta = {options.beta:g}")
    loss, margins, rewards, logps = figure.subplots(2, 2).flat
    draw_panel(loss, f"{options.loss} loss", ["loss"], batches, held_out)
    draw_panel(margins, "reward margin x (nats)", ["rewards/margins"], batches, held_out)
    sides = ["rewards/chosen", "rewards/rejected"]
    draw_panel(rewards, "reward (nats)", sides, batches, held_out)
    sides = ["logps/chosen", "logps/rejected"]
    draw_panel(logps, "log-probability (nats)", sides, batches, held_out)
    if options.loss != "dpo" and not options.reward_gap:
        margins.axhline(1, color="grey", linestyle=":", label="target of the loss")
        margins.legend()
    FigureCanvasAgg(figure).print_png(output / "curves.png")


def draw_panel(
    axes: Axes, label: str, names: list[str], batches: Columns, held_out: Columns
) -> None:
    """Draws metrics over the preference steps: of each batch, and of the held-out pairs."""
    for name, color in zip(names, ("tab:blue", "tab:orange"), strict=False):
        side = name.rpartition("/")[2]
        axes.plot(batches["step"], batches[name], color, alpha=0.4, label=f"{side}, batch")
        axes.plot(held_out["step"], held_out[name], color, marker="o", label=f"{side}, held out")
    axes.set_xlabel("preference step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()


def read_columns(path: Path, stage: str | None = None) -> Columns:
    """Reads the columns of numbers of a CSV file, of one stage if it has several."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.pop("stage", None) == stage]
    return {name: [float(row[name]) for row in rows] for name in rows[0]}
