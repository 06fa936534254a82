"""What a release needs: one version everywhere, and a README that PyPI can show."""

from __future__ import annotations

import re
import runpy

import yaml

import spoloss
from helpers.pages import ROOT

ADDRESS = "https://example.org/someone/spoloss"


def test_the_version_is_stated_once_or_alike() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == spoloss.__version__
    assert f"## {spoloss.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


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
