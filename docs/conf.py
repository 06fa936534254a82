"""Sphinx builds the site from this folder: python -m sphinx -W docs build/site.

The pages stay plain Markdown, readable on GitHub; what the site needs beyond it is added here.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

project = "spoloss"
author = copyright = "The spoloss authors"
version = release = importlib.metadata.version("spoloss")

extensions = ["myst_parser", "sphinx_copybutton"]
extensions += [f"sphinx.ext.{name}" for name in ("autodoc", "napoleon", "viewcode")]
exclude_patterns = ["README.md", "explorer"]  # index.rst includes the one, the other is HTML
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
default_role = "code"  # docstrings write `name`
highlight_language = "text"  # the formulas in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature's; napoleon has them from the docstring

html_theme = "furo"
html_title = f"spoloss {version}"
html_favicon = "favicon.svg"
html_math_renderer = "mathml"
html_copy_source = html_show_sphinx = False
html_extra_path = ["llms.txt"]
html_static_path = html_css_files = ["site.css"]
pygments_style, pygments_dark_style = "tango", "monokai"

DOCS = Path(__file__).parent
SHOWN = sorted(path for name in ("examples", "recipes") for path in (DOCS / name).glob("*.py"))
"""Python files that have a page with their source. Git ignores these pages."""


def write_source_pages(_app: Any) -> None:
    """Writes the page of each file in `SHOWN` beside it."""
    for page_of_another_build in DOCS.glob("[er]*/*.rst"):
        page_of_another_build.unlink()
    for path in SHOWN:
        title = f"{path.name}\n{'=' * len(path.name)}"
        page = f"{title}\n\n.. literalinclude:: {path.name}\n   :language: python\n"
        path.with_suffix(".rst").write_text(page)


def adapt(_app: Any, page: str, source: list[str]) -> None:
    """What GitHub shows by itself: cells in one piece (1.47 / 846, 88.0 ± 0.7), and sources."""
    unbroken = lambda row: re.sub(r"(?<=\d) (±|/|of) (?=-?\d)", "\xa0\\1\xa0", row[0])  # noqa: E731
    text = re.sub(r"(?m)^\|.*", unbroken, source[0])
    text = re.sub(r"\]\(((examples/|recipes/)?\w+)\.py\)", r"](\1.rst)", text)
    below = [path.stem for path in SHOWN if page == f"{path.parent.name}/README"]
    toctree = ["\n```{toctree}", ":hidden:", "", *below, "```\n"] if below else []
    source[0] = "\n".join([text, *toctree])


OPERATORS = (
    # A function's name has space around it: log 2, and not log2.
    (r"<mi>(log|max|exp|artanh)</mi>", r'<mo lspace=".17em" rspace=".17em">\1</mo>'),
    (r"<mi>&#x0007E;</mi>", r'<mo lspace=".28em" rspace=".28em">&#x0007E;</mo>'),  # \sim
    # A sign after "=", "(" or "," belongs to what follows it.
    (r"(<mo[^>]*>&#x000(?:3D|28|2C);</mo>)<mo>&#x02212;", r'\1<mo form="prefix">&#x02212;'),
    (r'<mo stretchy="false">&#x0007C;', r'<mo stretchy="false" lspace="0" rspace="0">&#x0007C;'),
)
"""Operators that latex2mathml writes as letters, or as standing between two terms."""


def mathml(display: str) -> tuple[Any, None]:
    """TeX as MathML, which browsers draw with a font of their own."""

    def visit(translator: Any, node: nodes.Element) -> None:
        drawn = convert(node.astext(), display=display)
        for pattern, operator in OPERATORS:
            drawn = re.sub(pattern, operator, drawn)
        translator.body.append(drawn)
        raise nodes.SkipNode

    return visit, None


def keep_as_typed(*event: Any) -> None:
    """Docstrings are text for help(): show their indented formulas and tables letter by letter."""
    lines: list[str] = event[-1]
    # The head of api/spoloss.rst defines the margin for the whole page.
    kept = (t for t in "\n".join(lines).split("\n\n") if not t.startswith("h = (log pi(y_w)"))
    lines[:] = "\n\n".join(map(_as_typed, kept)).split("\n")


def _as_typed(paragraph: str) -> str:
    if all(line.startswith(("    ", "|")) for line in paragraph.splitlines()):
        return "::\n\n" + textwrap.indent(textwrap.dedent(paragraph), "    ")
    return paragraph.replace("|", r"\|")


def copy_explorer(app: Any, _error: Exception | None) -> None:
    """The explorer is a page of its own, which works without the site as well."""
    shutil.copytree(DOCS / "explorer", Path(app.outdir) / "explorer", dirs_exist_ok=True)


def setup(app: Any) -> None:
    """Sphinx calls this once, before it reads a page."""
    app.add_html_math_renderer("mathml", mathml("inline"), mathml("block"))
    app.connect("builder-inited", write_source_pages)
    app.connect("source-read", adapt)
    app.connect("autodoc-process-docstring", keep_as_typed, priority=400)  # before napoleon
    app.connect("build-finished", copy_explorer)
