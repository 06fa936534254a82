"""Draws docs/curves.svg: value and slope of the losses around the reference (x = 0).

python docs/draw_curves.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from spoloss import DPO, SPO, Squared

TARGET = Path(__file__).with_name("curves.svg")
X = np.linspace(-2.5, 5.0, 301)  # at beta = 1, where x = h
INK, GRID, PAPER = "#24292f", "#d0d7de", "#ffffff"
CURVES = {
    "squared": (Squared(), {"color": "#2a7d3f", "linestyle": ":"}),
    "DPO": (DPO(), {"color": "#1f63b5", "linestyle": "--"}),
    "SPO, linear_below=0": (SPO(linear_below=0.0), {"color": "#b26a00", "linestyle": "-."}),
    "SPO": (SPO(), {"color": "#c2362b", "linestyle": "-"}),
}
IN_THE_DARK = {
    INK: "#d1d7e0",
    GRID: "#3d444d",
    PAPER: "#14181e",
    "#2a7d3f": "#74cf8c",
    "#1f63b5": "#74b1ff",
    "#b26a00": "#f0b056",
    "#c2362b": "#ff8173",
}
STYLE = {
    "font.size": 15,
    "lines.linewidth": 2.6,
    "path.simplify": False,
    "svg.hashsalt": "spoloss",
    "axes.edgecolor": GRID,
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAPER),
}


def main() -> None:
    """Draw values and slopes, in the colour scheme that the reader prefers."""
    with mpl.rc_context(STYLE):
        figure, (values, slopes) = plt.subplots(1, 2, figsize=(9.4, 4.2), layout="constrained")
        for title, (loss, look) in CURVES.items():
            values.plot(X, loss.value(X, 1.0), label=title, **look)
            slopes.plot(X, loss.slope(X, 1.0), label=title, **look)
        finish(values, "loss", (-0.8, 5.0))
        finish(slopes, "slope with respect to x", (-5.0, 1.6))
        slopes.legend(loc="lower right", labelcolor="linecolor", frameon=False, handlelength=1.5)
        figure.savefig(TARGET, metadata={"Date": None})
    rules = [
        f'[style*="{part}: {light}"] {{ {part}: {dark} !important }}'
        for light, dark in IN_THE_DARK.items()
        for part in ("fill", "stroke")
    ]
    style = f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"
    TARGET.write_text(TARGET.read_text().replace("<defs>", f"{style}\n <defs>", 1))


def finish(axes: Axes, title: str, limits: tuple[float, float]) -> None:
    """Titles, limits and the lines through zero."""
    axes.set(xlabel="x = β·h", xlim=(X[0], X[-1]), ylim=limits, axisbelow=True)
    axes.set_title(title, fontsize=16)
    axes.grid(color=GRID, linewidth=0.8)
    axes.axhline(0.0, color=INK, linewidth=0.9)
    axes.axvline(0.0, color=INK, linewidth=0.9)
    axes.tick_params(length=0)


if __name__ == "__main__":
    main()
