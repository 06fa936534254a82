"""Draws a result file of the fused head: every other way over ours, in time and in memory.

python -m benchmarks.figure       redraws results/fused_cpu.svg and fused_jax_cpu.svg
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.record import RESULTS

OURS = "spoloss_spo"
PEERS = {  # from the top of the figure
    "full_logits": "full logits",
    "optax": "full logits, Optax",
    "trl": "TRL, chunked",
    "liger": "Liger, eager",
    "liger_compiled": "Liger, compiled",
    "torch_linear_ce": "F.linear_cross_entropy",
    "cut_cross_entropy": "cut-cross-entropy",
    "scan_checkpoint": "scan and checkpoint",
}
LOOKS = {
    False: {"marker": "o", "color": "#1f63b5", "label": "head trained"},
    True: {"marker": "D", "color": "#c2362b", "fillstyle": "none", "label": "head frozen"},
}
STYLE = {"font.size": 14, "lines.markersize": 8, "lines.linestyle": "", "svg.hashsalt": "spoloss"}
MEMORY = {"fused_cpu.csv": "memory_mib", "fused_jax_cpu.csv": "temp_mib"}

Ratios = dict[tuple[str, bool], list[float]]


def ratios(rows: list[dict[str, str]], column: str) -> Ratios:
    """Peer over ours, one number per shape of the batch, by (way, frozen)."""

    def shape(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in ("pairs", "tokens", "width", "vocab", "frozen"))

    ours = {shape(row): float(row[column]) for row in rows if row["way"] == OURS}
    found: Ratios = {}
    for row in rows:
        if row["way"] in PEERS and row[column] and shape(row) in ours:
            key = (row["way"], row["frozen"] == "True")
            found.setdefault(key, []).append(float(row[column]) / ours[shape(row)])
    return found


def draw(path: Path, memory: str) -> None:
    """Two panels, time and memory, in an SVG beside the file; a dot is a shape of the batch."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    panels = {"time": ratios(rows, "of_floor"), "growth of peak memory": ratios(rows, memory)}
    measured = [way for way in PEERS if any(way == key[0] for key in panels["time"])]
    if not measured:
        return
    with mpl.rc_context(STYLE):
        size = (10.0, 1.5 + 0.6 * len(measured))
        figure, both = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
        for axes, (title, found) in zip(both, panels.items(), strict=True):
            _draw_panel(axes, found, measured, title)
        both[1].legend(loc="lower right")
        figure.supxlabel("as a multiple of linear_spo_loss (the line at 1)", fontsize=14)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)


def _draw_panel(axes: Axes, found: Ratios, measured: list[str], title: str) -> None:
    for frozen, look in LOOKS.items():
        points = [
            (ratio, place - 0.12 + 0.24 * frozen)
            for place, way in enumerate(measured)
            for ratio in found.get((way, frozen), [])
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], **look)
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
    """Draw the committed results."""
    for name, memory in MEMORY.items():
        draw(RESULTS / name, memory)


if __name__ == "__main__":
    main()
