"""The curves in the committed picture are those of the losses, and its script draws them again."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import figure_fused
from helpers.pages import ROOT
from spoloss import DPO, SPO, MarginLoss, Squared

SVG = "{http://www.w3.org/2000/svg}"
LOSSES: dict[str, MarginLoss] = {
    "dpo": DPO(),
    "spo": SPO(),
    "guarded": SPO(linear_below=0.0),
    "squared": Squared(),
}


def drawn(picture: Path, gid: str) -> tuple[np.ndarray, np.ndarray]:
    """A line of the picture, in its pixels."""
    tree = ElementTree.parse(picture)
    (line,) = (group for group in tree.iter(f"{SVG}g") if group.get("id") == gid)
    points = re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", line.find(f"{SVG}path").get("d"))
    x, y = np.array(points, dtype=float).T
    return x, y


def check_picture(picture: Path, what: str) -> None:
    """DPO's line, whose ends are known, gives the scales; every line then has to fit its loss."""
    x, y = drawn(picture, f"{what}-dpo")
    to_x = np.polynomial.Polynomial.fit(x[[0, -1]], [-2.5, 5.0], 1)
    to_y = np.polynomial.Polynomial.fit(y, getattr(DPO(), what)(to_x(x), 1.0), 1)
    assert to_x.convert().coef[1] > 0.0 > to_y.convert().coef[1]  # to the right, and upwards
    for name, loss in LOSSES.items():
        x, y = drawn(picture, f"{what}-{name}")
        assert len(x) > 100
        np.testing.assert_allclose(to_y(y), getattr(loss, what)(to_x(x), 1.0), atol=5e-3)


@pytest.mark.parametrize("what", ["value", "slope"])
def test_the_lines_of_the_committed_picture_are_the_losses(what: str) -> None:
    check_picture(ROOT / "docs" / "curves.svg", what)


@pytest.mark.parametrize("what", ["value", "slope"])
def test_the_script_draws_them_again(tmp_path: Path, what: str) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "draw_curves.py"))
    script["main"](tmp_path / "curves.svg")
    check_picture(tmp_path / "curves.svg", what)


@pytest.mark.parametrize("wrong", ["missing", "flipped", "moved"])
def test_a_wrong_picture_is_found(tmp_path: Path, wrong: str) -> None:
    picture = tmp_path / "curves.svg"
    text = (ROOT / "docs" / "curves.svg").read_text()
    line = re.search(r'<g id="value-spo">\s*<path d="([^"]*)"', text)
    if wrong == "missing":
        picture.write_text(text.replace('id="value-spo"', ""))
    elif wrong == "flipped":  # SPO's minimum becomes a maximum
        points = re.sub(
            r"([ML]) ([\d.-]+) ([\d.-]+)", lambda m: f"{m[1]} {m[2]} {400 - float(m[3])}", line[1]
        )
        picture.write_text(text.replace(line[1], points))
    else:
        points = re.sub(r"([ML]) ([\d.-]+)", lambda m: f"{m[1]} {float(m[2]) + 2}", line[1])
        picture.write_text(text.replace(line[1], points))
    with pytest.raises((AssertionError, ValueError)):
        check_picture(picture, "value")


def test_the_fused_figure_shows_every_peer_at_its_ratio() -> None:
    rows = figure_fused.read(figure_fused.RESULTS / "fused_cpu.csv")
    times = figure_fused.ratios(rows, "of_floor")
    measured_ways = {row["way"] for row in rows if row["seconds"]} & set(figure_fused.PEERS)
    assert {way for way, _ in times} == measured_ways
    peer = next(row for row in rows if row["way"] == "trl" and row["frozen"] == "True")
    ours = next(
        row
        for row in rows
        if row["way"] == "spoloss"
        and all(row[name] == peer[name] for name in ("pairs", "tokens", "frozen", "dtype"))
    )
    assert float(peer["of_floor"]) / float(ours["of_floor"]) in times["trl", True]


def test_the_fused_figure_has_a_dot_for_every_ratio(tmp_path: Path) -> None:
    results = figure_fused.RESULTS / "fused_cpu.csv"
    figure_fused.draw(results, tmp_path / "figure.svg")
    tree = ElementTree.parse(tmp_path / "figure.svg")
    groups = {group.get("id"): group for group in tree.iter(f"{SVG}g")}
    found = figure_fused.ratios(figure_fused.read(results), "memory_mib")
    for frozen in (False, True):
        dots = groups[f"growth of peak memory {frozen}"].iter(f"{SVG}use")
        drawn_at = np.sort([float(dot.get("x")) for dot in dots])
        logs = np.sort(
            np.log([r for key, list_ in found.items() if key[1] == frozen for r in list_])
        )
        scale = np.polynomial.Polynomial.fit(logs, drawn_at, 1)
        np.testing.assert_allclose(scale(logs), drawn_at, atol=0.01)
