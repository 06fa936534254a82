"""The jobs of the study: the pairs read by the frozen blocks once, then every arm on every fold."""

from __future__ import annotations

import math
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
    # At 0.6 the mean target on the judged pairs (mean gap 6.0) is 10 nats, as for SPO(0.1).
    *arms("spo-gap-weighted-below0", "0.1", "0.6"),
)
SLICES = 8
"""Files that hold the pairs; each is the result of a job."""
MEASURED_PAIRS = 64
"""Training pairs that are measured after training."""


def settings_of(material: Material) -> dict[str, Any]:
    """What the results depend on: the pairs and the model by their content, not their place."""
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
        Job(
            slice_name(number),
            math.ceil(2 * len(rows) / ROWS),
            partial(store_slice, material, number, rows),
        )
        for number, rows in enumerate(starmap(range, pairwise(bounds)))
    ]
    needs = tuple(job.name for job in slices)
    return slices + [
        Job(result_name(arm, fold), STAGE.steps, partial(run_arm, material, arm, fold), needs)
        for fold in range(folds)
        for arm in ARMS
    ]


def result_name(arm: Arm, fold: int) -> str:
    """Returns the name of an arm's result in the store."""
    return f"fold-{fold}/{arm}"


# ---------------------------------------------------------------------------- the pairs, kept


def slice_name(number: int) -> str:
    """Returns the name of a slice of the pairs in the store."""
    return f"pairs/{number}"


def store_slice(material: Material, number: int, rows: range, store: Store, hook: StepHook) -> None:
    """Computes states and reference log-probabilities of a slice of the pairs, and stores them."""
    answers = material.encode(rows, hook)
    tensors = {"rewards": answers.rewards, "reference": answers.reference, **answers.inputs}
    path = store.path(slice_name(number), ".safetensors")
    write_atomically(path, save({name: each.contiguous() for name, each in tensors.items()}))
    store.write(slice_name(number), {"pairs": len(rows)})


@lru_cache(maxsize=1)
def load_pairs(store: Store) -> Pairs:
    """Reads all pairs from the store, in the order of the file."""
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
    """Trains one arm on the other folds, and measures it on the pairs of this one."""
    pairs, held_out = load_pairs(store), material.fold_of_each == fold
    train = pairs[(~held_out).nonzero()[:, 0]]
    tested = pairs[held_out.nonzero()[:, 0]]
    trained = train_on_pairs(
        material.reference, train, arm, STAGE, seed=fold, hook=hook, look=lambda *_: None
    )
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
