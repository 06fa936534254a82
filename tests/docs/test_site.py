"""The site builds without a warning, is complete, and needs nothing from elsewhere."""

from __future__ import annotations

import importlib
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from helpers.interpreter import run_python
from helpers.pages import ROOT

DOCS = ROOT / "docs"
LOADING = {("link", "href"), ("script", "src"), ("img", "src"), ("source", "srcset")}


class Page(HTMLParser):
    """The addresses in a page, by (element, attribute), and the names that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[tuple[str, str, str]] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src", "srcset"):
                self.addresses.append((tag, name, value))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    built = run_python("-m", "sphinx", "-W", "--keep-going", "-q", DOCS, target)
    assert built.returncode == 0, built.stderr
    return target


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for _, _, address in page.addresses:
            url = urlsplit(address)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert target.exists(), (path.relative_to(site), address)
            # The explorer keeps its settings in the fragment.
            if url.fragment and target.suffix == ".html" and target.parent.name != "explorer":
                assert unquote(url.fragment) in pages[target].ids, (path.name, address)


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for tag, name, address in page.addresses:
            if (tag, name) in LOADING:
                assert not address.startswith(("http:", "https:", "//")), (path.name, address)
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style.name


@pytest.mark.slow
def test_home_is_one_click_from_the_one_line_replacement(site: Path) -> None:
    (row,) = re.findall(r"<tr.*?train with DPO.*?</tr>", (site / "index.html").read_text(), re.S)
    (target,) = re.findall(r'href="([^"]*)"', row)
    text = (site / target).read_text()
    assert "you replace one line" in text
    assert "spo_loss" in text


@pytest.mark.slow
def test_every_formula_is_mathml(pages: dict[Path, Page]) -> None:
    formulas = 0
    for path in pages:
        text = path.read_text()
        formulas += text.count("<math")
        assert not re.search(r"\\(frac|log|beta|mathrm)\b", text), path.name
    assert formulas > 50


@pytest.mark.slow
@pytest.mark.parametrize("module", ["spoloss", "spoloss.torch", "spoloss.jax"])
def test_the_reference_has_every_public_name(pages: dict[Path, Page], module: str) -> None:
    (reference,) = (page for path, page in pages.items() if path.name == f"{module}.html")
    public = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    assert public <= reference.ids


@pytest.mark.slow
def test_llms_txt_leads_to_pages(site: Path) -> None:
    text = (site / "llms.txt").read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 10
    for target in targets:
        assert (site / target).exists(), target
