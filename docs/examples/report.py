"""What a run leaves: CSV files, a table and the curves."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, float]


class Log:
    """Rows of numbers. Each is written to a CSV file as it comes, and kept for the curves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Appends a row. All rows have the same columns."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row)
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)

    def column(self, name: str) -> list[float]:
        """Returns the numbers of one column."""
        return [row[name] for row in self.rows]


def print_table(held_out: Log) -> None:
    """Prints the first and the last evaluation of the held-out pairs."""
    before, after = held_out.rows[0], held_out.rows[-1]
    steps = f"step {after['step']}"
    print(f"\n{'held-out pairs':<26}{'reference':>11}{steps:>11}{'change':>11}")
    for name in [name for name in before if name != "step"]:
        change = after[name] - before[name]
        print(f"{name:<26}{before[name]:>11.3f}{after[name]:>11.3f}{change:>+11.3f}")


def draw_curves(path: Path, title: str, train: Log, held_out: Log) -> None:
    """Draws loss, margins, rewards and log-probabilities over the steps, as a PNG file."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    panels = {
        "loss": ["loss"],
        "reward margin": ["rewards/margins"],
        "implicit reward": ["rewards/chosen", "rewards/rejected"],
        "log-probability (nats)": ["logps/chosen", "logps/rejected"],
    }
    for axes, (label, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        draw_panel(axes, names, train, held_out)
        axes.set(xlabel="step", ylabel=label)
    figure.savefig(path)


def draw_panel(axes: Axes, names: list[str], train: Log, held_out: Log) -> None:
    """Draws some columns, pale for the batches and dark for the held-out pairs."""
    for name, color in zip(names, ("tab:blue", "tab:orange"), strict=False):
        side = name.rpartition("/")[2]
        axes.plot(train.column("step"), train.column(name), color, alpha=0.35)
        steps, values = held_out.column("step"), held_out.column(name)
        axes.plot(steps, values, color, marker="o", label=f"{side}, held out (pale: batches)")
    axes.grid(alpha=0.3)
    axes.legend()
