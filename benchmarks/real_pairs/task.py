"""The jobs of the study: the pairs read by the frozen blocks once, then every arm on every fold."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache, partial
from itertools import pairwise, starmap
from typing import Any

import torch
from safetensors.torch import load_file, save

from benchmarks.alignment.arms import Arm
from benchmarks.alignment.evaluation import measure_pairs
from benchmarks.alignment.protocol import arms
from benchmarks.alignment.runner import Job
from benchmarks.alignment.store import Store, write_atomically
from benchmarks.alignment.training import (
    Answers,
    Pairs,
    Stage,
    StepHook,
    pair_logps,
    train_on_pairs,
)
from benchmarks.real_pairs.material import FOLDS, LENGTH, ROWS, Material
from spoloss import log_ratio_margin

ALL_PAIRS = 1_000_000
STAGE = Stage(pairs=ALL_PAIRS, steps=90, batch=16, lr=1e-4)
ARMS = (
    *arms("dpo", "0.1", "0.4"),
    *arms("spo", "0.1"),
    *arms("spo-gap-weighted", "0.1"),
    # With gaps of 6 on average, 0.6 has the average target of SPO(0.1), 10 nats.
    *arms("spo-gap-weighted-below0", "0.1", "0.6"),
)
SLICES = 8
"""Files that the pairs are kept in, each made by a job of its own."""
MEASURED_PAIRS = 64
"""Training pairs that are measured after training."""


def settings_of(material: Material) -> dict[str, Any]:
    """All that the results depend on: the pairs and the model by what is in them."""
    return {
        "pairs": material.description,
        "model": material.base.description,
        "length": LENGTH,
        "folds": FOLDS,
        "stage": asdict(STAGE),
        "arms": [str(arm) for arm in ARMS],
    }


def jobs_of(material: Material, folds: int) -> list[Job]:
    """The jobs of the first so many folds, fold by fold."""
    bounds = [len(material.pairs) * number // SLICES for number in range(SLICES + 1)]
    slices = [
        Job(slice_name(number), -(-2 * len(span) // ROWS), partial(keep, material, number, span))
        for number, span in enumerate(starmap(range, pairwise(bounds)))
    ]
    needs = tuple(job.name for job in slices)
    return slices + [
        Job(result_name(arm, fold), STAGE.steps, partial(run_arm, material, arm, fold), needs)
        for fold in range(folds)
        for arm in ARMS
    ]


def result_name(arm: Arm, fold: int) -> str:
    """Under which the store keeps an arm."""
    return f"fold-{fold}/{arm}"


# ---------------------------------------------------------------------------- the pairs, kept


def slice_name(number: int) -> str:
    """Under which the store keeps a part of the pairs."""
    return f"pairs/{number}"


def keep(material: Material, number: int, span: range, store: Store, hook: StepHook) -> None:
    """Lets the frozen blocks and the reference read a part of the pairs."""
    answers = material.read_by_model(span, hook)
    tensors = {"rewards": answers.rewards, "reference": answers.reference, **answers.inputs}
    path = store.path(slice_name(number), ".safetensors")
    write_atomically(path, save({name: each.contiguous() for name, each in tensors.items()}))
    store.write(slice_name(number), {"pairs": len(span)})


@lru_cache(maxsize=1)
def load(store: Store) -> Pairs:
    """All pairs, in the order of the file."""
    slices = [load_file(store.path(slice_name(number), ".safetensors")) for number in range(SLICES)]
    tensors = {name: torch.cat([each.pop(name) for each in slices]) for name in list(slices[0])}
    answers = Answers(
        {name: tensors[name] for name in ("states", "labels")},
        tensors["rewards"],
        tensors["reference"],
    )
    chosen = torch.arange(0, len(answers), 2)
    return Pairs(answers, chosen, chosen + 1)


# ----------------------------------------------------------------------------------- the arms


def run_arm(material: Material, arm: Arm, fold: int, store: Store, hook: StepHook) -> None:
    """Trains one arm on all folds but one, and lets it put the pairs of that one in order."""
    pairs, held_out = load(store), material.fold_of_each == fold
    train = pairs[(~held_out).nonzero()[:, 0]]
    tested = pairs[held_out.nonzero()[:, 0]]
    trained = train_on_pairs(material.reference, train, arm, STAGE, fold, hook, lambda *_: None)
    margins = log_ratio_margin(*pair_logps(trained.policy, tested))
    store.write(
        result_name(arm, fold),
        {
            "margins": margins.tolist(),
            "train": measure_pairs(trained.policy, train[:MEASURED_PAIRS], arm.beta),
            "held_out": measure_pairs(trained.policy, tested, arm.beta),
            **trained.summary(),
        },
    )
