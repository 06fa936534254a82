"""Reports the accuracy of each arm on held-out pairs, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.alignment.arms import Arm
from benchmarks.alignment.report import PACKAGES, Row, markdown, publish
from benchmarks.alignment.store import Store
from benchmarks.real_pairs.material import FOLDS, LENGTH, Material
from benchmarks.real_pairs.task import ARMS, MEASURED_PAIRS, STAGE, result_name
from benchmarks.record import machine as describe

BASELINE = Arm("dpo", 0.4)
"""The arm that all others are compared with."""


@dataclass(frozen=True)
class PairMean:
    """A mean over pairs, and its standard error.

    The answers to one prompt are alike, so the error is that of prompts drawn at random: a prompt
    counts as a whole. It leaves out the variation from one training run to another.
    """

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: np.ndarray, prompts: Sequence[str]) -> PairMean:
        """The mean of values [N] of pairs, whose prompts are given."""
        mean = float(values.mean())
        sums = dict.fromkeys(prompts, 0.0)
        for prompt, value in zip(prompts, values, strict=True):
            sums[prompt] += float(value) - mean
        error = math.sqrt(sum(each * each for each in sums.values())) / len(values)
        return cls(mean, error)

    def percent(self, sign: str = "") -> str:
        """The mean ± its standard error, in percent."""
        return f"{100 * self.mean:{sign}.1f} ± {100 * self.standard_error:.1f}"


@dataclass(frozen=True)
class Finished:
    """The folds of which every arm is finished.

    Attributes:
      material: the pairs.
      folds: what each arm has left, fold by fold.
    """

    material: Material
    folds: list[dict[Arm, dict[str, Any]]]

    @classmethod
    def read(cls, material: Material, store: Store) -> Finished:
        """Reads the finished folds, up to the first unfinished one."""
        folds = []
        while len(folds) < FOLDS:
            names = {arm: result_name(arm, len(folds)) for arm in ARMS}
            if not all(map(store.has, names.values())):
                break
            folds.append({arm: store.read(name) for arm, name in names.items()})
        return cls(material, folds)

    @cached_property
    def held_out(self) -> list[int]:
        """The rows of all held-out pairs, fold by fold."""
        fold_of_each = self.material.fold_of_each
        return [
            row
            for fold in range(len(self.folds))
            for row in (fold_of_each == fold).nonzero()[:, 0].tolist()
        ]

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts of the held-out pairs."""
        return [self.material.pairs[row].prompt for row in self.held_out]

    def margins(self, arm: Arm) -> np.ndarray:
        """The log-ratio margins h of the held-out pairs, nats."""
        return np.concatenate([fold[arm]["margins"] for fold in self.folds])

    def accuracy(self, arm: Arm) -> PairMean:
        """The share of held-out pairs with h > 0."""
        return PairMean.of(self.margins(arm) > 0.0, self.prompts)

    def lead(self, arm: Arm, other: Arm) -> PairMean:
        """By how much the accuracy is above another arm's, pair by pair."""
        right, theirs = ((self.margins(each) > 0.0).astype(float) for each in (arm, other))
        return PairMean.of(right - theirs, self.prompts)

    def longer(self) -> PairMean:
        """How often the chosen answer is the longer text, before any is cut; a tie counts half."""
        pairs = [self.material.pairs[row] for row in self.held_out]
        lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
        chosen, rejected = lengths.T
        return PairMean.of((chosen > rejected) + 0.5 * (chosen == rejected), self.prompts)

    def cut(self) -> float:
        """The share of all pairs of which a text is cut."""
        pairs = self.material.tokens_of(range(len(self.material.pairs)))
        return float(np.mean([pair.truncated for pair in pairs]))

    def largest_norm(self, arm: Arm) -> float:
        """The largest gradient norm of any step, before clipping."""
        return max(float(fold[arm]["grad_norm_max"]) for fold in self.folds)

    def stopped(self, arm: Arm) -> int:
        """The number of folds in which a loss or gradient that is not finite stopped training."""
        return sum(fold[arm]["stopped_at"] is not None for fold in self.folds)

    def mean(self, arm: Arm, key: str, split: str = "held_out") -> float:
        """The mean over the pairs of all folds of what was measured on a split."""
        sizes = [len(fold[arm]["margins"]) for fold in self.folds]
        return float(np.average([fold[arm][split][key] for fold in self.folds], weights=sizes))


def report(material: Material, store: Store) -> str:
    """Writes the tables of what is finished to the results folder, and returns them."""
    finished = Finished.read(material, store)
    if not finished.folds:
        return "No fold is finished."
    header = f"{describe(*PACKAGES, 'transformers')}; {material.base.description}"
    text = "\n\n".join([header, *sentences(finished), table(finished)])
    publish(store.folder, text, {"arms": rows(finished)}, header)
    return text


def sentences(finished: Finished) -> list[str]:
    """What was trained on what."""
    material, pairs = finished.material, len(finished.held_out)
    passes = STAGE.steps * STAGE.batch / (len(material.pairs) * (1 - 1 / FOLDS))
    return [
        f"{material.description}. Texts are cut at {LENGTH} tokens: a text of "
        f"{100 * finished.cut():.0f} % of the pairs.",
        f"{len(finished.folds)} of {FOLDS} folds: {pairs} held-out pairs of "
        f"{len(set(finished.prompts))} prompts. {STAGE.steps} steps of {STAGE.batch} pairs "
        f"({passes:.1f} passes), AdamW, learning rate {STAGE.lr:g} falling to 0, clipped at "
        f"{STAGE.clip:g}. Standard errors are over held-out prompts and leave out "
        "the variation between training runs.",
        "The chosen answer is the longer text, before any text is cut, in "
        f"{finished.longer().percent()} % of the held-out pairs.",
    ]


def table(finished: Finished) -> str:
    """The arms, and how they end."""
    columns = ["", "held-out accuracy (%)", f"minus {BASELINE.title} (points)", "h (nats)", "x"]
    columns += ["Δlogp chosen (nats)", "rejected", f"x, {MEASURED_PAIRS} trained pairs"]
    columns += ["gradient norm, max", "stopped"]
    lines = []
    for arm in ARMS:
        lead = "-" if arm == BASELINE else finished.lead(arm, BASELINE).percent("+")
        h = finished.margins(arm).mean()
        means = [
            f"{h:.2f}",
            f"{arm.beta * h:.2f}",
            f"{finished.mean(arm, 'dlogp_chosen'):.2f}",
            f"{finished.mean(arm, 'dlogp_rejected'):.2f}",
            f"{finished.mean(arm, 'x_mean', 'train'):.2f}",
        ]
        line = [arm.title, finished.accuracy(arm).percent(), lead, *means]
        lines.append([*line, f"{finished.largest_norm(arm):.2g}", str(finished.stopped(arm))])
    return markdown("Real pairs", columns, lines)


def rows(finished: Finished) -> list[Row]:
    """Returns the rows of arms.csv."""
    found: list[Row] = []
    for arm in ARMS:
        accuracy, lead = finished.accuracy(arm), finished.lead(arm, BASELINE)
        row: Row = {"arm": str(arm), "folds": len(finished.folds), "pairs": len(finished.held_out)}
        row |= {"accuracy": accuracy.mean, "accuracy_error": accuracy.standard_error}
        row |= {"lead": lead.mean, "lead_error": lead.standard_error}
        row |= {"h": float(finished.margins(arm).mean())}
        row |= {"grad_norm_max": finished.largest_norm(arm), "stopped": finished.stopped(arm)}
        for split in ("train", "held_out"):
            keys = [key for key in finished.folds[0][arm][split] if key != "accuracy"]
            row |= {f"{split}_{key}": finished.mean(arm, key, split) for key in keys}
        found.append(row)
    return found
