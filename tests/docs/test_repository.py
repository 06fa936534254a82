"""What a release needs: one version everywhere, links that lead somewhere, a README for PyPI."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.version import Version

import spoloss
from helpers.pages import ROOT

WINGS = ("torch", "jax", "mlx")
FLOOR = re.compile(r"(?P<name>[\w-]+)(\[.*?\])?>=(?P<floor>[\d.]+)")
ADDRESS = "https://example.org/someone/spoloss"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]


def test_the_version_is_stated_once_or_alike() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == spoloss.__version__
    assert f"## {spoloss.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_oldest_versions_are_the_floors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(one for name in WINGS for one in extras[name])]
    floors = {
        one["name"]: one["floor"] for one in map(FLOOR.match, [*asked, *extras["test"]]) if one
    }
    assert {"numpy", "torch", "jax", "mlx"} < floors.keys()
    pins = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), re.M)
    )
    for name in {"numpy", *WINGS} | pins.keys() & floors.keys():
        assert Version(pins[name]) == Version(floors[name]), name


def test_links_become_absolute_for_pypi() -> None:
    absolute = runpy.run_path(str(ROOT / ".github" / "absolute_links.py"))["absolute"]
    before = (ROOT / "README.md").read_text()
    after = absolute(before, ADDRESS, "v1.0")
    targets = re.findall(r"\]\(([^)]+)\)", after)
    assert len(targets) == len(re.findall(r"\]\(([^)]+)\)", before)) > 5
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert f"]({ADDRESS}/raw/v1.0/docs/curves.svg)" in after
    assert f"]({ADDRESS}/blob/v1.0/docs/claims.md)" in after
    assert absolute("[a](#b) [c](https://d)", ADDRESS, "v1") == "[a](#b) [c](https://d)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'href="([^"]+)"', text)
    for link in links:
        path, _, fragment = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if fragment and target.suffix == ".md":
            assert fragment in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
