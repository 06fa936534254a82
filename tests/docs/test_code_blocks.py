"""The Python blocks of README and docs run, from the top of a page down, and print what they say.

A page starts with `policy`, `reference`, `optimizer` and `loader` at hand, and says what they are.
A comment behind a print is its output. A block below <!-- skip: next, "reason" --> does not run.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from helpers.pages import ROOT
from helpers.recipes_oracle import models, toy

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def evaluate(example: Example) -> None:
    """Run a block, compare what it prints, and see whether a training loop trains."""
    policy = example.namespace["policy"]
    before = [parameter.clone() for parameter in policy.parameters()]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        PythonEvaluator()(example)
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", example.parsed, re.MULTILINE)
    if promised:
        assert printed.getvalue().splitlines() == promised
    if "optimizer.step()" in example.parsed:
        after = list(policy.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def blocks(page: Path) -> list[Example]:
    parsers = [CodeBlockParser(language="python", evaluator=evaluate), SkipParser()]
    document = Sybil(parsers=parsers, path=str(page.parent), pattern=page.name).parse(page)
    policy, reference = models(dtype=torch.float32)
    document.namespace.update(
        policy=policy,
        reference=reference,
        optimizer=torch.optim.SGD(policy.parameters(), lr=1.0),
        loader=[toy.collate(toy.pairs(2))] * 3,
    )
    return list(document.examples())


WITH_BLOCKS = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")  # a page imports what lies there
    for block in blocks(page):
        block.evaluate()
