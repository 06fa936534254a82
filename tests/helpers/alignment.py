"""The alignment experiment at a size for tests."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from benchmarks.studies import seeds
from benchmarks.studies.arms import parse_arm
from benchmarks.studies.experiment import Part
from benchmarks.studies.language_model import Policy
from benchmarks.studies.language_task import LanguageFoundation
from benchmarks.studies.training import Stage

TINY = LanguageFoundation(
    fine_tuning=Stage(pairs=300, steps=12, batch=16, lr=2e-3, clip=None),
    pairs=48,
    held_out_pairs=32,
    answers=4,
    limit_answers=16,
)
TINY_PARTS = (
    Part(
        "preference",
        arms=tuple(map(parse_arm, ("dpo:0.1", "spo:0.1", "dpo:0.4", "spo:0.1@noisy"))),
        stage=Stage(pairs=48, steps=4, batch=8, snapshots=2),
        seeds=2,
    ),
    Part(
        "memorised",
        arms=(parse_arm("spo:0.25"),),
        stage=Stage(pairs=8, steps=4, batch=4, lr_end=1.0, snapshots=2),
        seeds=1,
        prefix="memorised-",
    ),
)


def policy_of(name: str) -> Policy:
    """A new policy, the same for the same name."""
    torch.manual_seed(seeds.number(name))
    return Policy()


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, below its comment line."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    return list(csv.DictReader(lines))
