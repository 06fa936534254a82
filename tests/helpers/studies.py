"""What the tests of the studies share: the arms' losses by hand, and a policy that is a table."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.studies.arms import Arm
from benchmarks.studies.training import PairLoss, Pairs
from spoloss import log_ratio_margin


def loss_by_hand(arm: Arm, h: Tensor, gap: Tensor) -> Tensor:
    """The mean loss of pairs, typed from each form's formula."""

    def curve(x: Tensor, x0: float = -math.inf) -> Tensor:
        tangent = math.exp(-x0) * (-x0 + (x0 - 1) * (x - x0)) if math.isfinite(x0) else x
        return torch.where(x < x0, tangent, -x * torch.exp(-x))

    right, x = torch.sigmoid(gap), arm.beta * h
    return {
        "dpo": torch.log1p(torch.exp(-x)),
        "spo": curve(x),
        "spo-below-1": curve(x, -1.0),
        "squared": (h - 1 / arm.beta) ** 2,
        "dpo-soft": right * torch.log1p(torch.exp(-x)) + (1 - right) * torch.log1p(torch.exp(x)),
        "squared-gap": (h - gap / arm.beta) ** 2,
        "spo-gap-weighted-below0": gap**2 * curve(x / gap, 0.0),
        "dpo-weighted": gap * torch.log1p(torch.exp(-x)),
        "spo-weighted-below0": gap * curve(x, 0.0),
    }[arm.form].mean()


class TablePolicy:
    """A policy whose log-probabilities of so many answers are a log-softmax of scores."""

    def __init__(self, number: int) -> None:
        self.scores = Parameter(torch.zeros(number))

    def copy(self) -> TablePolicy:
        return copy.deepcopy(self)

    def trained(self) -> list[Parameter]:
        return [self.scores]

    def logps(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.scores.log_softmax(0)[inputs["answer"]]

    def pair_loss(self, arm: Arm, pairs: Pairs) -> PairLoss:
        h = log_ratio_margin(*self.logps(pairs.inputs).chunk(2), *pairs.references)
        return PairLoss(loss_by_hand(arm, h, pairs.gap), h.detach())


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, below its comment line."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    return list(csv.DictReader(lines))
