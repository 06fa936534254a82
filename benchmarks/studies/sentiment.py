"""The paper's protocol on a pretrained language model, judged by a published sentiment tool.

    python -m benchmarks.studies smollm2 FOLDER                                    the model, once
    python -m benchmarks.studies sentiment --model FOLDER --quick
    python -m benchmarks.studies sentiment --model FOLDER --parts sweep
    python -m benchmarks.studies sentiment --model FOLDER --parts sweep overtraining flips gaps
    python -m benchmarks.studies sentiment --model FOLDER --parts     reports what is finished
    python -m benchmarks.studies sentiment --model FOLDER --second    docs/second_study.md

The model, SmolLM2-135M-Instruct for the committed results, continues openings such as "To be
honest, the hotel was". The reward of an answer is VADER's compound score. Pairs are two answers of
the model; the last two blocks are trained, all else is frozen. Every part goes on where it was
interrupted when the same command is given again, and the parts of a folder share their pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.record import RESULTS
from benchmarks.studies.arms import Arm, arms
from benchmarks.studies.decided import decided_rows, gains
from benchmarks.studies.experiment import Part, jobs_of, settings_of
from benchmarks.studies.report import report, title_of
from benchmarks.studies.results import Results, Row
from benchmarks.studies.runner import Job, command_line, run_jobs
from benchmarks.studies.sentiment_task import SentimentFoundation
from benchmarks.studies.store import Store, open_store
from benchmarks.studies.training import Stage

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
            for job in jobs_of(foundation, [replace(part, arms=chosen)]):
                found.setdefault(job.name, job)
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
    complete = tuple(arm for arm in part.arms if all(is_finished(arm, each) for each in finished))
    return Results(foundation, replace(part, arms=complete, seeds=seeds), store)


def report_part(results: Results, store: Store, model: str) -> None:
    """Writes what is finished of a part to a folder of its own."""
    part = results.part
    title = f"{title_of(part.seeds, 'transformers', 'vaderSentiment')}; {model}"
    further = {
        "decided": decided_rows(results),
        "gains": gains(results),
        "judgements": judgement_rows(results),
    }
    memorised = results if part.name == OVERTRAINING.name else None
    report([results], store.folder / part.name, title, memorised=memorised, further=further)


def judgement_rows(results: Results) -> list[Row]:
    """What the answers on the way were, where training looked at them."""
    keys = ("step", "reward", "kl", *results.foundation.measures)
    return [
        {"policy": str(arm), "seed": seed, **{key: judged[key] for key in keys}}
        for arm, found in results.arms.items()
        for seed, each in zip(results.part.all_seeds, found, strict=True)
        for judged in each["judgements"]
    ]


@dataclass(frozen=True)
class Study:
    """A whole run: what its arms start from, its parts, and where its results go."""

    foundation: SentimentFoundation
    parts: tuple[Part, ...]
    output: Path


def studies(model: str) -> dict[str, Study]:
    """The quick run of a few minutes, the first study, and the second with more answers."""
    first = SentimentFoundation(model)
    fewer = {"held_out_openings": 18, "pair_answers": 10, "held_out_pair_answers": 4}
    quick = replace(first, **fewer, limit_answers=8)
    return {
        "quick": Study(quick, (QUICK,), Path("runs/sentiment-quick")),
        "first": Study(first, tuple(PARTS.values()), RESULTS / "sentiment"),
        "second": Study(replace(first, answers=50), (MATCHED,), RESULTS / "sentiment_second"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs parts of a study, and reports all that are finished.

    Raises:
      InputError: the model or the results folder cannot be used.
    """
    outputs = " or ".join(str(study.output) for study in studies("").values())
    parser = command_line("sentiment", __doc__, outputs)
    parser.add_argument(
        "--model", required=True, help="a Transformers folder, or a name on the Hugging Face Hub"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true", help="one seed, three arms")
    what.add_argument("--parts", nargs="*", choices=PARTS, help="of the first study; none: report")
    what.add_argument("--second", action="store_true", help="the second study")
    options = parser.parse_args(argv)
    name = "quick" if options.quick else "second" if options.second else "first"
    study = studies(options.model)[name]
    wanted = [part for part in study.parts if name != "first" or part.name in options.parts]
    settings = settings_of(study.foundation, study.parts)
    store = open_store(options.output or study.output, settings)
    run_jobs(jobs_in_order(study.foundation, wanted), store, options.workers)
    for part in study.parts:
        results = finished_results(study.foundation, part, store)
        if results is None:
            print(f"{part.name}: no seed is finished")
        else:
            report_part(results, store, settings["foundation"]["model"])
