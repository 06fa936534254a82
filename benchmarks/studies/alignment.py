"""The paper's protocol on a made-up language: SFT, then DPO and SPO, judged by the true reward.

    python -m benchmarks.studies alignment --quick    1 seed, 3 arms: 90 seconds on two cores
    python -m benchmarks.studies alignment --full     5 seeds, 31 arms: within half an hour
    python -m benchmarks.studies alignment --full --arms dpo:0.4 spo:0.1 spo:0.1@noisy --seeds 8

Writes CSV files and figures, and prints a summary. A run that was interrupted goes on when the
same command is given again. The study `sentiment` is the same on a pretrained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.record import RESULTS
from benchmarks.studies import arms as grammar
from benchmarks.studies.arms import arms, parse_arm
from benchmarks.studies.decided import decided_rows
from benchmarks.studies.experiment import Part, jobs_of, settings_of
from benchmarks.studies.language_task import LanguageFoundation
from benchmarks.studies.report import report, title_of
from benchmarks.studies.results import Results
from benchmarks.studies.runner import at_least_one, command_line, run_jobs
from benchmarks.studies.store import open_store
from benchmarks.studies.training import Stage

QUICK_FOUNDATION = LanguageFoundation(
    fine_tuning=Stage(pairs=10_000, steps=600, batch=64, lr=2e-3, clip=None),
    pairs=2000,
    held_out_pairs=512,
    answers=64,
    limit_answers=400,
)
QUICK_PARTS = (
    Part(
        "preference",
        arms=(*arms("dpo", "0.1", "0.4"), *arms("spo", "0.1")),
        stage=Stage(pairs=2000, steps=200, snapshots=5),
        seeds=1,
    ),
    Part(
        "memorised",
        arms=(*arms("dpo", "0.25"), *arms("spo", "0.25")),
        stage=Stage(pairs=64, steps=300, lr_end=1.0, snapshots=10),
        seeds=1,
        prefix="memorised-",
    ),
)
FULL_FOUNDATION = replace(
    QUICK_FOUNDATION,
    fine_tuning=replace(QUICK_FOUNDATION.fine_tuning, steps=1000),
    pairs=3000,
)
FULL_PARTS = (
    Part(
        "preference",
        arms=(
            *arms("dpo", "0.025", "0.05", "0.1", "0.2", "0.25", "0.4", "1", "4"),
            *arms("spo", "0.025", "0.05", "0.1", "0.25", "1"),
            *arms("spo-below0", "0.1"),
            *arms("squared", "0.1", "0.2"),
            *arms("dpo-soft", "0.25"),
            *arms("squared-gap", "0.25"),
            *arms("spo-gap", "0.25"),
            *arms("spo-gap-floor", "0.25"),
            *arms("spo-gap-weighted", "0.25"),
            *arms("spo-gap-weighted-below0", "0.25"),
            *arms("dpo", "0.025@noisy", "0.1@noisy", "0.25@noisy", "0.4@noisy", "1@noisy"),
            *arms("spo", "0.025@noisy", "0.1@noisy", "0.25@noisy"),
            *arms("spo-below0", "0.1@noisy"),
        ),
        stage=Stage(pairs=3000, steps=300, snapshots=5),
        seeds=5,
    ),
    Part(
        "memorised",
        arms=(*arms("dpo", "0.1", "1"), *arms("spo", "0.1", "1")),
        stage=Stage(pairs=300, steps=1500, lr_end=1.0, snapshots=30),
        seeds=1,
        prefix="memorised-",
    ),
)
SIZES = {
    "quick": (QUICK_FOUNDATION, QUICK_PARTS, Path("runs/alignment-quick")),
    "full": (FULL_FOUNDATION, FULL_PARTS, RESULTS / "alignment" / "full"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment.

    Raises:
      InputError: an arm or the results folder cannot be used.
    """
    outputs = " or ".join(str(output) for *_, output in SIZES.values())
    parser = command_line("alignment", f"{__doc__}\n{grammar.__doc__}", outputs)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", dest="size", action="store_const", const="quick")
    size.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="instead of the size's own")
    parser.add_argument("--seeds", type=at_least_one, metavar="N", help="instead of the size's own")
    options = parser.parse_args(argv)
    foundation, (first, memorised), output = SIZES[options.size]
    if options.arms is not None:
        first = replace(first, arms=tuple(dict.fromkeys(map(parse_arm, options.arms))))
    if options.seeds is not None:
        first = replace(first, seeds=options.seeds)
    parts = (first, memorised)
    store = open_store(options.output or output, settings_of(foundation, parts))
    run_jobs(jobs_of(foundation, parts), store, options.workers)
    results = [Results(foundation, part, store) for part in parts]
    further = {"decided": decided_rows(results[0])}
    report(results, store.folder, title_of(first.seeds), memorised=results[1], further=further)
