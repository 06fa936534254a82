"""The page about losses of your own: its code runs, its check can fail, its figures are right."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import more_losses as more
from helpers.mutants import CONSISTENT, mutants, passed
from helpers.pages import ROOT, table_below
from helpers.trl_losses import dpo_numbers, dpo_trainer
from spoloss import DPO, SPO, Squared

TEXT = (ROOT / "docs" / "your_own_loss.md").read_text()
RIGHT = [*more.GALLERY, SPO(), SPO(linear_below=-1.0), DPO(), DPO(label_smoothing=0.1), Squared()]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's script leaves."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.S)), names)
    return names


def test_the_page_runs(page) -> None:
    assert page["weight"].grad.isfinite().all()
    margin = np.linspace(-3.0, 3.0, 13)
    for method in ("value", "slope"):
        theirs = getattr(page["Hinge"](), method)(torch.tensor(margin), 0.5)
        np.testing.assert_allclose(theirs, getattr(more.Hinge(), method)(margin, 0.5))


@pytest.mark.parametrize("loss", RIGHT, ids=str)
def test_the_check_passes_what_is_right_and_fails_what_disagrees(page, loss) -> None:
    page["check"](loss)
    assert passed(page["check"], mutants(loss)) == list(CONSISTENT)
    assert passed(page["check"], {"a lost beta": page["Forgetful"]()}) == []


def test_the_check_sees_nan_at_infinity(page, monkeypatch) -> None:
    monkeypatch.setattr(more, "FAR", math.inf)
    losses = {str(loss): loss for loss in (more.DiscoPOP(), more.EXO())}
    assert passed(page["check"], losses) == []


def test_the_check_sees_a_gradient_that_is_wrong_at_0(page, monkeypatch) -> None:
    def split_by_sign(x: Any) -> Any:
        e = torch.exp(-abs(x))
        return torch.where(x < 0.0, e, 1.0) / (1.0 + e)

    monkeypatch.setattr(more, "sigmoid", split_by_sign)
    assert passed(page["check"], {"at 0": more.EXO()}) == []


def test_the_check_sees_another_dtype(page) -> None:
    class Widened(DPO):
        def slope(self, margin: Any, beta: Any) -> Any:
            return super().slope(margin, beta).double()

    assert passed(page["check"], {"widened": Widened()}) == []


def test_the_figures_of_the_table() -> None:
    columns, rows = table_below(TEXT, "## Five published losses")
    slopes = {name: row[columns.index("slope at x = 0, in beta")] for name, row in rows.items()}
    for loss, (name, stated) in zip(more.GALLERY, slopes.items(), strict=True):
        assert name.startswith(f"`{type(loss).__name__}(")
        assert eval(name.strip("`"), vars(more)) == loss
        slope = loss.slope(np.zeros(1), 0.5)[0] / 0.5
        assert float(stated.strip("*")) == pytest.approx(slope, abs=0.006)
    assert math.log((1 - 1e-3) / 1e-3) == pytest.approx(6.9, abs=0.05)
    assert "= 6.9 |" in TEXT


def test_where_discopop_goes_uphill() -> None:
    low, high = map(float, re.search(r"for x from (\S+) to (\S+), and", TEXT).groups())
    x = np.linspace(-1.0, 1.0, 20_001)
    uphill = x[more.DiscoPOP().slope(x, 1.0) > 0.0]
    assert (uphill.min(), uphill.max()) == pytest.approx((low, high), abs=0.0006)


# TRL 1.16 asks for gradient checkpointing by names that Transformers 5.23 will drop.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_.*)?` is:FutureWarning")
def test_apo_zero_is_trls(page, tmp_path) -> None:
    trainer = dpo_trainer(tmp_path, "apo_zero", beta=0.1)
    logps = tuple(torch.randn(4, 5, dtype=torch.float64) * 6.0 - 40.0)
    theirs = dpo_numbers(trainer, logps).losses.mean()
    torch.testing.assert_close(page["apo_zero"](*logps, beta=0.1), theirs)
