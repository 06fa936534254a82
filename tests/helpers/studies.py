"""What the tests of the studies share: rows of a CSV file, and a policy that is a table."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.studies.arms import Arm
from benchmarks.studies.training import PairLoss, Pairs
from spoloss import log_ratio_margin


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
        rows = (pairs.answers.inputs["answer"][side] for side in (pairs.chosen, pairs.rejected))
        logps = pairs.logps_given(*(self.logps({"answer": each}) for each in rows))
        return PairLoss(arm.loss(logps, pairs.gap), log_ratio_margin(*logps).detach())


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, below its comment line."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    return list(csv.DictReader(lines))
