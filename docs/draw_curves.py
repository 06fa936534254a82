"""Draws docs/curves.svg: value and slope of the losses around the reference (x = 0).

python docs/draw_curves.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from spoloss import DPO, SPO, MarginLoss, Squared

TARGET = Path(__file__).with_name("curves.svg")
X = np.linspace(-2.5, 5.0, 301)


@dataclass(frozen=True)
class Curve:
    """A loss at beta = 1, where x = h, and how it is drawn."""

    gid: str
    title: str
    loss: MarginLoss
    colour: str
    style: str


CURVES = (
    Curve("squared", "squared", Squared(), "#2a7d3f", ":"),
    Curve("dpo", "DPO", DPO(), "#1f63b5", "--"),
    Curve("guarded", "SPO, linear_below=0", SPO(linear_below=0.0), "#b26a00", "-."),
    Curve("spo", "SPO", SPO(), "#c2362b", "-"),
)
INK, GRID, PAPER = "#24292f", "#d0d7de", "#ffffff"
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
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "lines.linewidth": 2.6,
    "path.simplify": False,
    "svg.hashsalt": "spoloss",
}


def main(target: Path = TARGET) -> None:
    """Draw values and slopes, in the colour scheme that the reader prefers."""
    with mpl.rc_context(STYLE):
        figure, (values, slopes) = plt.subplots(1, 2, figsize=(9.4, 4.2), layout="constrained")
        for curve in CURVES:
            look = {"color": curve.colour, "linestyle": curve.style, "label": curve.title}
            values.plot(X, curve.loss.value(X, 1.0), gid=f"value-{curve.gid}", **look)
            slopes.plot(X, curve.loss.slope(X, 1.0), gid=f"slope-{curve.gid}", **look)
        _finish(values, "loss", (-0.8, 5.0))
        _finish(slopes, "slope by x", (-5.0, 1.6))
        slopes.legend(loc="lower right", labelcolor="linecolor", frameon=False, handlelength=1.5)
        figure.savefig(target, format="svg", metadata={"Date": None})
        plt.close(figure)
    _follow_the_colour_scheme(target)


def _finish(axes: Axes, title: str, limits: tuple[float, float]) -> None:
    axes.set_title(title, fontsize=16)
    axes.set_xlabel("x = β·h")
    axes.set_xlim(X[0], X[-1])
    axes.set_ylim(*limits)
    axes.grid(color=GRID, linewidth=0.8)
    axes.axhline(0.0, color=INK, linewidth=0.9)
    axes.axvline(0.0, color=INK, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _follow_the_colour_scheme(target: Path) -> None:
    rules = [
        f'[style*="{part}: {light}"] {{ {part}: {dark} !important }}'
        for light, dark in IN_THE_DARK.items()
        for part in ("fill", "stroke")
    ]
    style = f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"
    svg = target.read_text()
    target.write_text(svg.replace("<defs>", f"{style}\n <defs>", 1))


if __name__ == "__main__":
    main()
    print(f"wrote {TARGET.name}")
