"""Draws docs/curves.png: the three losses and their slopes around the reference (x = 0).

python docs/draw_curves.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from spoloss import DPO, SPO, MarginLoss, Squared

TARGET = Path(__file__).with_name("curves.png")
CURVES: list[tuple[str, MarginLoss, str, str]] = [
    ("SPO", SPO(), "tab:red", "-"),
    ("SPO, linear_below=-1", SPO(linear_below=-1.0), "tab:red", ":"),
    ("SPO, linear_below=0", SPO(linear_below=0.0), "tab:orange", ":"),
    ("DPO", DPO(), "tab:blue", "-"),
    ("squared", Squared(), "tab:green", "-"),
]


def main() -> None:
    """Draw values on the left and slopes on the right, at beta = 1 so that x = h."""
    figure, (values, slopes) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    x = np.linspace(-2.5, 6.0, 600)
    for name, loss, colour, style in CURVES:
        values.plot(x, loss.value(x, 1.0), style, color=colour, label=name)
        slopes.plot(x, loss.slope(x, 1.0), style, color=colour, label=name)
    _finish(values, "loss", (-0.8, 8.0))
    _finish(slopes, "slope by x", (-8.0, 1.5))
    slopes.legend(loc="lower right")
    values.annotate("-1/e", (1.0, -np.exp(-1.0)), (2.4, 1.2), arrowprops={"arrowstyle": "->"})
    figure.savefig(TARGET, dpi=110)
    print(f"wrote {TARGET.name}")


def _finish(axes: Axes, ylabel: str, limits: tuple[float, float]) -> None:
    axes.set_xlabel("x = beta * h   (0: the policy is the reference; 1: SPO's target)")
    axes.set_ylabel(ylabel)
    axes.set_ylim(*limits)
    axes.axhline(0.0, color="0.7", linewidth=0.8)
    axes.axvline(0.0, color="0.7", linewidth=0.8)
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    main()
