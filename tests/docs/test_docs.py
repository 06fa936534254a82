"""What README and docs show runs, and their picture is what its script draws."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


class TinyModel(torch.nn.Module):
    """Calls and attributes of a Transformers causal LM, as far as README uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = self.backbone
        self.embedding = torch.nn.Embedding(20, 8)
        self.lm_head = torch.nn.Linear(8, 20, bias=False)

    def backbone(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        states = self.embedding(ids) * attention_mask[..., None]
        return SimpleNamespace(last_hidden_state=states)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        states = self.backbone(ids, attention_mask).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(states))


def surroundings() -> dict[str, object]:
    torch.manual_seed(0)
    policy = TinyModel()
    ids = torch.randint(0, 20, (4, 6))
    return {
        "policy": policy,
        "reference": TinyModel(),
        "optimizer": torch.optim.SGD(policy.parameters(), lr=0.1),
        "loader": [(ids, torch.ones_like(ids), ids)] * 3,
    }


def test_the_python_of_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        names = surroundings()
        before = [parameter.clone() for parameter in names["policy"].parameters()]
        exec(block, names)
        after = list(names["policy"].parameters())
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert all(moved)


def test_readme_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_picture_is_what_its_script_draws(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "draw_curves.py"))
    target = tmp_path / "curves.png"
    script["main"].__globals__["TARGET"] = target
    script["main"]()
    drawn = matplotlib.image.imread(target)
    kept = matplotlib.image.imread(ROOT / "docs" / "curves.png")
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < 0.01
