"""What the study says: how many held-out pairs each arm has in the right order, and how sure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.alignment.arms import Arm
from benchmarks.alignment.report import Row, header_of, markdown, publish
from benchmarks.alignment.store import Store
from benchmarks.real_pairs.material import FOLDS, LENGTH, Material
from benchmarks.real_pairs.task import ARMS, STAGE, result_name

BASELINE = ARMS[1]
"""DPO(0.4), to which all other arms are compared."""


@dataclass(frozen=True)
class Share:
    """A mean over pairs, and its standard error.

    The answers to one prompt are alike, so the error is that of prompts drawn at random: a prompt
    counts as a whole.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values: np.ndarray, prompts: Sequence[str]) -> Share:
        """The mean of values [N] of pairs, whose prompts are given."""
        mean = float(values.mean())
        sums = dict.fromkeys(prompts, 0.0)
        for prompt, value in zip(prompts, values, strict=True):
            sums[prompt] += float(value) - mean
        error = math.sqrt(sum(each * each for each in sums.values())) / len(values)
        return cls(mean, error)

    def text(self, sign: str = "") -> str:
        """In percent."""
        return f"{100 * self.mean:{sign}.1f} ± {100 * self.error:.1f}"


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
        """What is in the store."""
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
        """H of the held-out pairs, nats."""
        return np.concatenate([fold[arm]["margins"] for fold in self.folds])

    def accuracy(self, arm: Arm) -> Share:
        """How many held-out pairs are in the right order."""
        return Share.of(self.margins(arm) > 0.0, self.prompts)

    def lead(self, arm: Arm, other: Arm) -> Share:
        """By how much the accuracy is above another arm's, pair by pair."""
        right, theirs = ((self.margins(each) > 0.0).astype(float) for each in (arm, other))
        return Share.of(right - theirs, self.prompts)

    def longer(self) -> Share:
        """How often the chosen answer is the longer text."""
        pairs = [self.material.pairs[row] for row in self.held_out]
        lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
        chosen, rejected = lengths.T
        return Share.of((chosen > rejected) + 0.5 * (chosen == rejected), self.prompts)

    def mean(self, arm: Arm, key: str, split: str = "held_out") -> float:
        """The mean over folds of what was measured on the pairs of a split."""
        return float(np.mean([fold[arm][split][key] for fold in self.folds]))


def report(material: Material, store: Store) -> str:
    """Writes the tables of what is finished to the results folder, and returns them."""
    finished = Finished.read(material, store)
    if not finished.folds:
        return "No fold is finished."
    header = header_of(1, "transformers").rpartition(";")[0]
    text = "\n\n".join([header, *sentences(finished), table(finished)])
    publish(store.folder, text, {"arms": rows(finished)}, header)
    return text


def sentences(finished: Finished) -> list[str]:
    """What was trained on what."""
    material, pairs = finished.material, len(finished.held_out)
    passes = STAGE.steps * STAGE.batch / (len(material.pairs) * (1 - 1 / FOLDS))
    return [
        f"{material.description}; {material.base.description}; texts of at most {LENGTH} tokens.",
        f"{len(finished.folds)} of {FOLDS} folds: {pairs} held-out pairs of "
        f"{len(set(finished.prompts))} prompts. {STAGE.steps} steps of {STAGE.batch} pairs "
        f"({passes:.1f} passes), AdamW, learning rate {STAGE.lr:g} falling to 0, clipped at "
        f"{STAGE.clip:g}. Standard errors are over prompts.",
        f"The chosen answer is the longer text in {finished.longer().text()} % of these pairs.",
    ]


def table(finished: Finished) -> str:
    """The arms, and how they end."""
    columns = ["", "held-out accuracy (%)", f"above {BASELINE.title} (%)", "h (nats)", "x"]
    columns += ["Δlogp chosen", "rejected", "trained: x mean", "gradient norm, max", "stopped"]
    lines = []
    for arm in ARMS:
        lead = "-" if arm == BASELINE else finished.lead(arm, BASELINE).text("+")
        means = [
            f"{finished.margins(arm).mean():.2f}",
            *(f"{finished.mean(arm, key):.2f}" for key in ("x_mean", "dlogp_chosen")),
            f"{finished.mean(arm, 'dlogp_rejected'):.2f}",
            f"{finished.mean(arm, 'x_mean', 'train'):.2f}",
        ]
        norm = max(fold[arm]["grad_norm_max"] for fold in finished.folds)
        stopped = sum(fold[arm]["stopped_at"] is not None for fold in finished.folds)
        line = [arm.title, finished.accuracy(arm).text(), lead, *means, f"{norm:.2g}"]
        lines.append([*line, str(stopped)])
    return markdown("Real pairs", columns, lines)


def rows(finished: Finished) -> list[Row]:
    """The rows of arms.csv."""
    found: list[Row] = []
    for arm in ARMS:
        accuracy, lead = finished.accuracy(arm), finished.lead(arm, BASELINE)
        row: Row = {"arm": str(arm), "folds": len(finished.folds), "pairs": len(finished.held_out)}
        row |= {"accuracy": accuracy.mean, "accuracy_error": accuracy.error}
        row |= {"lead": lead.mean, "lead_error": lead.error}
        for split in ("train", "held_out"):
            keys = finished.folds[0][arm][split]
            row |= {f"{split}_{key}": finished.mean(arm, key, split) for key in keys}
        found.append(row)
    return found
