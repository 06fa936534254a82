"""The site builds without a warning, needs nothing from elsewhere, and has every public name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from helpers.interpreter import run_python
from helpers.pages import ROOT

LOADED = re.compile(
    r"""(<link[^>]*\shref|<script[^>]*\ssrc|<img[^>]*\ssrc|@import|url\()[=\s"']*(https?:)?//"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    built = run_python("-m", "sphinx", "-W", "--keep-going", "-q", ROOT / "docs", target)
    assert built.returncode == 0, built.stderr
    return target


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        assert not LOADED.search(path.read_text()), path.relative_to(site)


def test_the_reference_has_every_public_name(site: Path) -> None:
    for module in ("spoloss", "spoloss.torch", "spoloss.jax"):
        ids = set(re.findall(r'id="([^"]+)"', (site / "api" / f"{module}.html").read_text()))
        assert {f"{module}.{name}" for name in importlib.import_module(module).__all__} <= ids


def test_links_of_plain_html_lead_to_pages(site: Path) -> None:
    # Sphinx follows the links of Markdown alone.
    targets = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text())
    targets += re.findall(r'href="(explorer[^"#]*)', (site / "index.html").read_text())
    explorer = (site / "explorer" / "index.html").read_text()
    targets += [f"explorer/{target}" for target in re.findall(r'href="(\.\./[^"]+)', explorer)]
    assert len(targets) > 10
    for target in targets:
        assert (site / target).exists(), target
