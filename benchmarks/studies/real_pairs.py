"""SPO and DPO on preference pairs of your own, with a pretrained language model.

    python -m benchmarks.studies smollm2 FOLDER                               the model, once
    python -m benchmarks.studies real_pairs --pairs FILE --model FOLDER       two of the five folds
    python -m benchmarks.studies real_pairs --pairs FILE --model FOLDER --folds 5

FILE has JSON lines with prompt, chosen, rejected and either reward_gap or p_chosen; a .gz is fine.
The last two blocks of the model are trained, all else is frozen. Each fold holds out a fifth of the
prompts. All arms are trained on the others, and then tell which answers of the held-out pairs are
the better ones. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from benchmarks import record
from benchmarks.studies.arms import Arm, arms
from benchmarks.studies.evaluation import measure_pairs
from benchmarks.studies.judged_pairs import FOLDS, LENGTH, Material, Pair, Text
from benchmarks.studies.pretrained import IGNORED, Base
from benchmarks.studies.report import PACKAGES
from benchmarks.studies.results import Row
from benchmarks.studies.runner import Job, at_least_one, command_line, run_jobs
from benchmarks.studies.store import Store, open_store, write_atomically
from benchmarks.studies.training import (
    Answers,
    Pairs,
    Stage,
    fixed_batches,
    pair_logps,
    score,
    train_on_pairs,
)
from spoloss import log_ratio_margin

OUTPUT = record.RESULTS / "real_pairs"
ROWS = 16
"""Texts that the frozen blocks read side by side."""
ALL_PAIRS = 1_000_000
STAGE = Stage(pairs=ALL_PAIRS, steps=90, batch=16, lr=1e-4)
ARMS = (
    *arms("dpo", 0.1, 0.4),
    *arms("spo", 0.1),
    *arms("spo-gap-weighted", 0.1),
    # At 0.6 the mean target on the judged pairs (mean gap 6.0) is 10 nats, as for SPO(0.1).
    *arms("spo-gap-weighted-below0", 0.1, 0.6),
)
BASELINE = Arm("dpo", 0.4)
"""The arm that all others are compared with."""
SLICES = 8
"""Files that hold the pairs; each is the result of a job."""
MEASURED_PAIRS = 64
"""Training pairs that are measured after training."""


# ---------------------------------------------------------------------------------------- the jobs


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
    """The frozen blocks read the pairs once; then every arm on the first so many folds."""
    bounds = [len(material.pairs) * number // SLICES for number in range(SLICES + 1)]
    slices = [
        Job(slice_name(number), partial(store_slice, material, number, rows))
        for number, rows in enumerate(starmap(range, pairwise(bounds)))
    ]
    needs = tuple(job.name for job in slices)
    return slices + [
        Job(result_name(arm, fold), partial(run_arm, material, arm, fold), needs)
        for fold in range(folds)
        for arm in ARMS
    ]


def result_name(arm: Arm, fold: int) -> str:
    """The name of an arm's result in the store."""
    return f"fold-{fold}/{arm}"


def slice_name(number: int) -> str:
    """The name of a slice of the pairs in the store."""
    return f"pairs/{number}"


def store_slice(material: Material, number: int, rows: range, store: Store) -> None:
    """Computes states and reference log-probabilities of a slice of the pairs, and stores them."""
    texts = material.texts(rows)
    chunks = [texts[start : start + ROWS] for start in range(0, len(texts), ROWS)]
    made = [frozen_states(material.base, chunk) for chunk in chunks]
    states, labels = map(torch.cat, zip(*made, strict=True))
    inputs = {"states": states, "labels": labels}
    # Only the difference of two rewards is ever used, and that is the known gap.
    gaps = [pair.reward_gap for pair in material.pairs[rows.start : rows.stop]]
    rewards = torch.tensor([reward for gap in gaps for reward in (gap, 0.0)])
    tensors = {"rewards": rewards, "reference": score(material.reference, inputs), **inputs}
    path = store.path(slice_name(number), ".safetensors")
    write_atomically(path, save({name: each.contiguous() for name, each in tensors.items()}))
    store.write(slice_name(number), {"pairs": len(rows)})


@torch.no_grad()
def frozen_states(base: Base, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Runs the frozen blocks on M texts.

    Returns:
      The states [M, LENGTH - 1, D], and for each state the label of the next token,
      [M, LENGTH - 1].
    """
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    labels = torch.full((len(texts), LENGTH), IGNORED)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        labels[row, : len(text.labels)] = torch.tensor(text.labels)
    # Padding on the right needs no mask: no earlier token attends to it, and it has no labels.
    embedded = base.lower.embed_tokens(ids[:, :-1])
    states = base.lower(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return states, labels[:, 1:]


@lru_cache(maxsize=1)
def load_pairs(store: Store) -> Pairs:
    """Reads all pairs from the store, in the order of the file."""
    slices = [load_file(store.path(slice_name(number), ".safetensors")) for number in range(SLICES)]
    tensors = {name: torch.cat([each.pop(name) for each in slices]) for name in list(slices[0])}
    inputs = {name: tensors[name] for name in ("states", "labels")}
    answers = Answers(inputs, tensors["rewards"], tensors["reference"])
    chosen = torch.arange(0, len(answers), 2)
    return Pairs(answers, chosen, chosen + 1)


def run_arm(material: Material, arm: Arm, fold: int, store: Store) -> None:
    """Trains one arm on the other folds, and measures it on the pairs of this one."""
    pairs, held_out = load_pairs(store), material.fold_of_each == fold
    train = pairs[(~held_out).nonzero()[:, 0]]
    tested = pairs[held_out.nonzero()[:, 0]]
    trained = train_on_pairs(
        material.reference, lambda _: fixed_batches(train, STAGE, fold), arm, STAGE
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


# -------------------------------------------------------------------------------------- the report


class PairMean(NamedTuple):
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
        sums = pd.Series(values - mean).groupby(list(prompts)).sum()
        return cls(mean, math.sqrt((sums**2).sum()) / len(values))


Fold = dict[Arm, dict[str, Any]]
"""What every arm has left in a fold."""


def finished_folds(store: Store) -> list[Fold]:
    """The folds of which every arm is finished, up to the first unfinished one."""
    folds: list[Fold] = []
    while len(folds) < FOLDS:
        names = {arm: result_name(arm, len(folds)) for arm in ARMS}
        if not all(map(store.has, names.values())):
            break
        folds.append({arm: store.read(name) for arm, name in names.items()})
    return folds


def arm_rows(folds: Sequence[Fold], prompts: Sequence[str]) -> list[Row]:
    """The rows of arms.csv; `prompts` are those of the held-out pairs, fold by fold."""
    margins = {arm: np.concatenate([fold[arm]["margins"] for fold in folds]) for arm in ARMS}
    right = {arm: (margins[arm] > 0.0).astype(float) for arm in ARMS}
    sizes = [len(fold[BASELINE]["margins"]) for fold in folds]
    rows = []
    for arm in ARMS:
        found = [fold[arm] for fold in folds]
        accuracy = PairMean.of(right[arm], prompts)
        lead = PairMean.of(right[arm] - right[BASELINE], prompts)
        row: Row = {"arm": str(arm), "folds": len(folds), "pairs": len(prompts)}
        row |= {"accuracy": accuracy.mean, "accuracy_error": accuracy.standard_error}
        row |= {"lead": lead.mean, "lead_error": lead.standard_error}
        row |= {"h": float(margins[arm].mean())}
        row |= {"grad_norm_max": max(each["grad_norm_max"] for each in found)}
        row |= {"stopped": sum(each["stopped_at"] is not None for each in found)}
        for split in ("train", "held_out"):
            for key in (key for key in found[0][split] if key != "accuracy"):
                values = [each[split][key] for each in found]
                row[f"{split}_{key}"] = float(np.average(values, weights=sizes))
        rows.append(row)
    return rows


def pair_row(material: Material, held_out: Sequence[Pair], folds: int) -> Row:
    """The row of pairs.csv: what all arms are judged on.

    `chosen_is_longer` is how often the chosen answer is the longer text, before any is cut; a tie
    counts half.
    """
    prompts = [pair.prompt for pair in held_out]
    chosen, rejected = np.array([(len(p.chosen), len(p.rejected)) for p in held_out]).T
    longer = PairMean.of((chosen > rejected) + 0.5 * (chosen == rejected), prompts)
    return {
        "folds": folds,
        "pairs": len(held_out),
        "prompts": len(set(prompts)),
        "cut": material.cut(),
        "chosen_is_longer": longer.mean,
        "chosen_is_longer_error": longer.standard_error,
    }


def report(material: Material, store: Store) -> None:
    """Writes and prints what is finished."""
    folds = finished_folds(store)
    if not folds:
        print("no fold is finished")
        return
    order = material.fold_of_each.argsort(stable=True).tolist()
    held_out = [material.pairs[row] for row in order if material.fold_of_each[row] < len(folds)]
    tables = {
        "arms": arm_rows(folds, [pair.prompt for pair in held_out]),
        "pairs": [pair_row(material, held_out, len(folds))],
    }
    title = f"{record.machine(*PACKAGES)}; {material.base.description}"
    for name, rows in tables.items():
        record.write(store.folder / f"{name}.csv", title, rows)
        print(f"\n{name}\n{pd.DataFrame(rows).T.to_string(header=False)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, and reports what is finished.

    Raises:
      InputError: the pairs, the model or the results folder cannot be used.
    """
    parser = command_line("real_pairs", __doc__, str(OUTPUT))
    parser.add_argument("--pairs", type=Path, required=True, help="JSON lines, plain or .gz")
    parser.add_argument(
        "--model", required=True, help="a Transformers folder, or a name on the Hugging Face Hub"
    )
    parser.add_argument(
        "--folds", type=at_least_one, default=2, help=f"to hold out in turn, of {FOLDS}; default: 2"
    )
    options = parser.parse_args(argv)
    material = Material(options.pairs, options.model)
    store = open_store(options.output or OUTPUT, settings_of(material))
    run_jobs(jobs_of(material, min(options.folds, FOLDS)), store, options.workers)
    report(material, store)
