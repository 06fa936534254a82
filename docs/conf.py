"""Sphinx builds the site from the Markdown of this folder: python -m sphinx -W docs build/site.

The pages stay plain Markdown, readable on GitHub. What a site needs beyond it (navigation, the
sources of the recipes, files of the repository's root) is added here while they are read.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import textwrap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from latex2mathml.converter import convert

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

project = "spoloss"
author = copyright = "The spoloss authors"
version = release = importlib.metadata.version("spoloss")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
highlight_language = "text"  # the formulas in docstrings
html_theme = "furo"
html_title = "spoloss"
html_math_renderer = "mathml"
pygments_style = "tango"
pygments_dark_style = "monokai"
html_copy_source = False
html_show_sphinx = False
html_extra_path = ["llms.txt"]
html_static_path = ["site.css"]
html_css_files = ["site.css"]
exclude_patterns = ["explorer"]

default_role = "code"  # docstrings write `name`
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature's; napoleon has them from the docstring
napoleon_numpy_docstring = False

DOCS = Path(__file__).parent
NAVIGATION = {
    "Start": ["from_dpo", "losses", "gradients", "choosing", "troubleshooting"],
    "Use": ["examples/README", "fused", "jax", "recipes/README", "distributed", "your_own_loss"],
    "Evidence": [
        "claims",
        "real_model",
        "second_study",
        "performance",
        "numerics",
        "transforms",
        "testing",
    ],
    "Reference": ["api/spoloss", "api/spoloss.torch", "api/spoloss.jax"],
    "Project": ["contributing", "changelog"],
}
OF_THE_ROOT = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}


def add_to_page(_app: Sphinx, page: str, source: list[str]) -> None:
    """The pages as Sphinx reads them: Markdown in, Markdown with directives out."""
    source[0] = re.sub(r"\]\(([^):#]+\.md)(#[^)]*)?\)", partial(_link, page), source[0])
    source[0] = re.sub(r"^\|.*$", _unbroken, source[0], flags=re.MULTILINE)
    if page == "index":
        source[0] += "\n\n".join(_toctree(caption, pages) for caption, pages in NAVIGATION.items())
    elif page == "recipes/README":
        source[0] += "\n\n".join(_listing(path) for path in sorted((DOCS / "recipes").glob("*.py")))
    elif page in OF_THE_ROOT:
        source[0] = f"```{{include}} ../{OF_THE_ROOT[page]}\n:relative-docs: docs/\n```"


def _link(page: str, link: re.Match[str]) -> str:
    # Markdown files outside this folder are no pages of the site: such a link downloads the file.
    inside = ((DOCS / page).parent / link[1]).resolve().is_relative_to(DOCS)
    return link[0] if inside else f"](path:{link[1]})"


def _unbroken(row: re.Match[str]) -> str:
    # No line break within "88.0 ± 0.7", "1.47 / 846" or "0 of 36".
    return re.sub(r"(?<=\d) (±|/|of) (?=-?\d)", "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", row[0])


def _toctree(caption: str, pages: list[str]) -> str:
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```"


def _listing(path: Path) -> str:
    return f"## {path.name}\n\n```{{literalinclude}} {path.name}\n:language: python\n```"


def write_math(translator: HTML5Translator, node: nodes.math) -> None:
    """Inline TeX as MathML, which browsers draw with a font of their own."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def write_display_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    """The same for a formula on a line of its own."""
    translator.body.append(convert(node.astext(), display="block"))
    raise nodes.SkipNode


def keep_as_typed(*event: Any) -> None:
    """Docstrings are text for help(): show their indented formulas and tables letter by letter."""
    lines: list[str] = event[-1]
    paragraphs = "\n".join(lines).split("\n\n")
    lines[:] = "\n\n".join(map(_as_typed, paragraphs)).split("\n")


def _as_typed(paragraph: str) -> str:
    if all(line.startswith(("    ", "|")) for line in paragraph.splitlines()):
        return "::\n\n" + textwrap.indent(textwrap.dedent(paragraph), "    ")
    return paragraph.replace("|", r"\|")


def copy_explorer(app: Sphinx, _error: Exception | None) -> None:
    """The explorer is a page of its own, which works without the site as well."""
    shutil.copytree(DOCS / "explorer", Path(app.outdir) / "explorer", dirs_exist_ok=True)


def setup(app: Sphinx) -> None:
    """Sphinx calls this once, before it reads a page."""
    app.add_html_math_renderer("mathml", (write_math, None), (write_display_math, None))
    app.connect("source-read", add_to_page)
    app.connect("autodoc-process-docstring", keep_as_typed, priority=400)  # before napoleon
    app.connect("build-finished", copy_explorer)
