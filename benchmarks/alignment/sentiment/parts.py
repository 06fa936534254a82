"""The parts of the study: which arms, on which labels, trained how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.alignment.arms import Arm
from benchmarks.alignment.protocol import Part, Protocol, arms, jobs_of
from benchmarks.alignment.results import Results
from benchmarks.alignment.runner import Job
from benchmarks.alignment.sentiment.task import SentimentFoundation
from benchmarks.alignment.store import Store
from benchmarks.alignment.training import Stage

ALL_PAIRS = 10_000
STAGE = Stage(pairs=ALL_PAIRS, steps=64, batch=8, lr=3e-4)
QUICK = Part(
    "quick",
    arms=(*arms("dpo", "0.1", "0.4"), *arms("spo", "0.1")),
    stage=STAGE,
    seeds=1,
    prefix="quick-",
)
SWEEP = Part(
    "sweep",
    arms=(
        *arms("dpo", "0.0125", "0.05", "0.1", "0.2", "0.4", "1.6"),
        *arms("spo", "0.003125", "0.0125", "0.025", "0.05", "0.1", "0.4"),
        *arms("squared", "0.00625", "0.025", "0.05", "0.1", "0.2", "0.8"),
        *arms("spo-below0", "0.003125", "0.0125", "0.025", "0.05", "0.1", "0.4"),
    ),
    stage=STAGE,
    seeds=4,
    prefix="sweep-",
)
OVERTRAINING = Part(
    "overtraining",
    arms=(*arms("dpo", "0.4", "1.6"), *arms("spo", "0.1", "0.4")),
    stage=replace(STAGE, pairs=48, steps=240, lr_end=1.0, snapshots=6, judgements=6),
    seeds=3,
    prefix="overtraining-",
)
FLIPS = Part(
    "flips",
    arms=tuple(
        arm
        for labels in ("flip20", "flip40")
        for form, betas in (
            ("dpo", ("0.1", "0.4", "1.6")),
            ("spo", ("0.025", "0.1", "0.4")),
            ("spo-below0", ("0.1",)),
            ("squared", ("0.1", "0.4")),
        )
        for arm in arms(form, *(f"{beta}@{labels}" for beta in betas))
    ),
    stage=STAGE,
    seeds=3,
    prefix="flips-",
)
GAPS = Part(
    "gaps",
    arms=(
        *arms("dpo", "0.1", "0.4"),
        *arms("spo", "0.025", "0.1"),
        *arms("squared", "0.1", "0.2"),
        # Gaps are below 1 here, 0.45 on average: these betas have the average targets of the above.
        *arms("spo-gap", "0.0125", "0.05"),
        *arms("spo-gap-weighted-below0", "0.0125", "0.05"),
        *arms("squared-gap", "0.05", "0.1"),
    ),
    stage=STAGE,
    seeds=4,
    prefix=SWEEP.prefix,  # trained as in the sweep, so the arms of both are trained once
)
MATCHED = Part(  # of the second study: docs/second_study.md, part 1
    "matched",
    arms=(
        *arms("dpo", "0.0125", "0.05", "0.1", "0.4"),
        *arms("spo", "0.003125", "0.0125", "0.025", "0.1"),
    ),
    stage=STAGE,
    seeds=8,
    first_seed=10,
    prefix="matched-",
)
FIRST_FORMS = ("dpo", "spo")
PARTS = {part.name: part for part in (SWEEP, OVERTRAINING, FLIPS, GAPS)}


def jobs_in_order(foundation: SentimentFoundation, parts: Sequence[Part]) -> list[Job]:
    """DPO and SPO of all seeds, then the other losses: what is cut short has these complete."""
    found: dict[str, Job] = {}
    for first in (True, False):
        for part in parts:
            chosen = tuple(arm for arm in part.arms if (arm.form in FIRST_FORMS) == first)
            jobs = jobs_of(foundation, [replace(part, arms=chosen)])
            found |= {job.name: job for job in jobs if job.name not in found}
    return list(found.values())


def finished_results(foundation: SentimentFoundation, part: Part, store: Store) -> Results | None:
    """The results of a part as far as they go.

    They are of the seeds whose every DPO and SPO is finished, and have the arms of other losses
    that are finished for all of these. None without a seed.
    """

    def is_finished(arm: Arm, seed: int) -> bool:
        return store.has(part.result_name(arm, seed))

    first = [arm for arm in part.arms if arm.form in FIRST_FORMS]
    seeds = 0
    while seeds < part.seeds and all(is_finished(arm, part.first_seed + seeds) for arm in first):
        seeds += 1
    if seeds == 0:
        return None
    finished = part.all_seeds[:seeds]
    arms = [arm for arm in part.arms if all(is_finished(arm, seed) for seed in finished)]
    return Results(foundation, replace(part, arms=tuple(arms), seeds=seeds), store)


def quick_protocol(model: str) -> Protocol:
    """A run of a few minutes: one seed, three arms, fewer reviews."""
    foundation = SentimentFoundation(
        model, held_out_openings=18, pair_answers=10, held_out_pair_answers=4, limit_answers=8
    )
    return Protocol(foundation, (QUICK,))


def second_protocol(model: str) -> Protocol:
    """The second study, with five times as many answers."""
    return Protocol(SentimentFoundation(model, answers=50), (MATCHED,))


def full_protocol(model: str) -> Protocol:
    """The whole study."""
    return Protocol(SentimentFoundation(model), tuple(PARTS.values()))
