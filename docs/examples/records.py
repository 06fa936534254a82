"""The output of a run: its folder, the CSV files and the printed table."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from arguments import Options
from errors import InputError

# Readable names of the preference metrics. x = beta * margin, the reward of chosen over rejected.
METRICS = {
    "rewards/chosen": "reward of chosen (nats)",
    "rewards/rejected": "reward of rejected (nats)",
    "rewards/margins": "reward margin x (nats)",
    "rewards/accuracies": "share of pairs with x > 0",
    "rewards/margins_below_0": "share of pairs with x < 0",
    "rewards/margins_above_1": "share of pairs with x > 1 or its gap",
    "logps/chosen": "log-probability of chosen (nats)",
    "logps/rejected": "log-probability of rejected (nats)",
}
STEP_COLUMNS = ("stage", "step", "loss", "lr", "grad_norm", *METRICS)
HELD_OUT_COLUMNS = ("step", "loss", *METRICS)


def create_output(options: Options) -> Path:
    """Creates the output folder: --output, or the first free runs/<loss>-<n>."""
    free = (Path("runs", f"{options.loss}-{number}") for number in itertools.count(1))
    output = options.output or next(folder for folder in free if not folder.exists())
    try:
        output.mkdir(parents=True, exist_ok=options.output is not None)
    except OSError as error:
        raise InputError(f"{output}: expected a folder to write to, got: {error}") from error
    return output


class Records:
    """The CSV files of a run. Rows are written immediately, so a run that stops keeps its rows."""

    def __init__(self, output: Path) -> None:
        """Sets the paths. The first row creates a file."""
        self.steps = output / "steps.csv"
        self.held_out = output / "held_out.csv"

    def add_step(self, row: dict[str, str | float]) -> None:
        """Appends a training step of either stage."""
        append_row(self.steps, STEP_COLUMNS, row)

    def add_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Appends the held-out metrics after a number of preference steps."""
        append_row(self.held_out, HELD_OUT_COLUMNS, {"step": step, **metrics})


def append_row(path: Path, columns: Sequence[str], row: dict[str, str | float]) -> None:
    """Appends a row to a CSV file, after a header if the file is new."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)


def print_table(before: dict[str, float], after: dict[str, float], pairs: int) -> None:
    """Prints the held-out metrics before and after preference training."""
    title = f"{pairs} held-out pairs"
    print(f"\n{title:<36}{'before':>10}{'after':>10}{'change':>10}")
    for name, label in {"loss": "loss", **METRICS}.items():
        change = after[name] - before[name]
        print(f"{label:<36}{before[name]:>10.3f}{after[name]:>10.3f}{change:>+10.3f}")
    print("Before, the policy is the reference and every x is 0; a coin wins half of the pairs.\n")


def peak_memory() -> str:
    """Returns the peak memory of the run so far, of the GPU or of the process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the card"
    try:
        import resource
    except ImportError:  # Windows
        return "not known on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB"
