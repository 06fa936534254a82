"""Draws a result file of bench_fused: every other way over spoloss, in time and in memory.

python -m benchmarks.figure_fused                       # benchmarks/results/fused_cpu.csv
python -m benchmarks.figure_fused FILE                  # another file of whole answers
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
OURS = "spoloss"
PEERS = {  # from the top of the figure
    "full_logits": "full logits",
    "trl": "TRL, chunked",
    "liger": "Liger, eager",
    "liger_compiled": "Liger, compiled",
    "torch_linear_ce": "F.linear_cross_entropy",
    "cut_cross_entropy": "cut-cross-entropy",
}
LOOKS = {
    False: {"marker": "o", "color": "#1f63b5", "label": "head trained"},
    True: {"marker": "D", "color": "#c2362b", "fillstyle": "none", "label": "head frozen"},
}
STYLE = {"font.size": 14, "lines.markersize": 8, "lines.linestyle": "", "svg.hashsalt": "spoloss"}

Ratios = dict[tuple[str, bool], list[float]]


def read(path: Path) -> list[dict[str, str]]:
    """The measurements without ignored labels."""
    with path.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [row for row in rows if float(row["ignored"]) == 0.0]


def ratios(rows: list[dict[str, str]], column: str) -> Ratios:
    """Peer over spoloss, one number per shape of the batch, by (way, frozen)."""

    def shape(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in ("pairs", "tokens", "width", "vocab", "dtype", "frozen"))

    ours = {shape(row): float(row[column]) for row in rows if row["way"] == OURS}
    found: Ratios = {}
    for row in rows:
        if row["way"] in PEERS and row[column]:
            key = (row["way"], row["frozen"] == "True")
            found.setdefault(key, []).append(float(row[column]) / ours[shape(row)])
    return found


def draw(path: Path, target: Path) -> None:
    """Two panels, time and memory; a dot is a shape of the batch."""
    rows = read(path)
    measured = [way for way in PEERS if any(row["way"] == way and row["seconds"] for row in rows)]
    with mpl.rc_context(STYLE):
        size = (10.0, 1.5 + 0.6 * len(measured))
        figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
        for axes, column, title in zip(
            panels, ("of_floor", "memory_mib"), ("time", "growth of peak memory"), strict=True
        ):
            _draw_panel(axes, ratios(rows, column), measured, title)
        panels[1].legend(loc="lower right")
        figure.supxlabel("as a multiple of linear_dpo_loss (the line at 1)", fontsize=14)
        figure.savefig(target, metadata={"Date": None})
        plt.close(figure)


def _draw_panel(axes: Axes, found: Ratios, measured: list[str], title: str) -> None:
    for frozen, look in LOOKS.items():
        points = [
            (ratio, place - 0.12 + 0.24 * frozen)
            for place, way in enumerate(measured)
            for ratio in found.get((way, frozen), [])
        ]
        axes.plot(*zip(*points, strict=True), gid=f"{title} {frozen}", **look)
    axes.set_xscale("log")
    axes.axvline(1.0, color="0.2", linewidth=1.5, linestyle="-")
    axes.grid(axis="x", which="both", color="0.9")
    axes.minorticks_off()
    low, high = axes.get_xlim()
    ticks = (0.5, 1, 2, 3, 5) if high / low < 20 else (0.1, 0.3, 1, 3, 10, 30, 100)
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks(range(len(measured)), [PEERS[way] for way in measured])
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.set_title(title, fontsize=15)


def main() -> None:
    """Draw next to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS / "fused_cpu.csv")
    path = parser.parse_args().results
    draw(path, path.with_suffix(".svg"))
    print(f"wrote {path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
