"""SPO and DPO on a pretrained language model, judged by a published sentiment tool.

    python -m benchmarks.studies smollm2 FOLDER                                    the model, once
    python -m benchmarks.studies sentiment --model FOLDER --quick             the second study, tiny
    python -m benchmarks.studies sentiment --model FOLDER --parts sweep overtraining flips gaps
    python -m benchmarks.studies sentiment --model FOLDER --second 1 2 3 4     docs/second_study.md

The model, SmolLM2-135M-Instruct for the committed results, continues openings such as "To be
honest, the hotel was". The reward of an answer is VADER's compound score. Pairs are two answers of
the model; the last two blocks are trained, all else is frozen. Every part goes on where it was
interrupted when the same command is given again, and the parts of a folder share their pairs. A
part is reported once all of it is finished; the command of a finished part reports it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.record import RESULTS
from benchmarks.studies.arms import arms
from benchmarks.studies.decided import decided_rows, gains
from benchmarks.studies.experiment import Part, settings_of
from benchmarks.studies.plan import Plan, run_plan
from benchmarks.studies.results import Results, Row
from benchmarks.studies.runner import command_line
from benchmarks.studies.second import STAGE, second_study, tiny
from benchmarks.studies.sentiment_task import SentimentFoundation
from benchmarks.studies.store import open_store

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
PARTS = {part.name: part for part in (SWEEP, OVERTRAINING, FLIPS, GAPS)}


def tables(results: Results) -> dict[str, list[Row]]:
    """What the first study says of a part beside the tables of every study."""
    return {"decided": decided_rows(results), "gains": gains(results)}


@dataclass(frozen=True)
class Study:
    """A whole run: what its arms start from, its parts by name, and where its results go."""

    foundation: SentimentFoundation
    plans: Mapping[str, Plan]
    output: Path


def studies(model: str) -> dict[str, Study]:
    """The first study, the second with more answers, and the second in a few minutes."""
    first = SentimentFoundation(model)
    fewer = {"held_out_openings": 12, "pair_answers": 4, "held_out_pair_answers": 2}
    parts = {name: Plan((part,), tables) for name, part in PARTS.items()}
    return {
        "first": Study(first, parts, RESULTS / "sentiment"),
        "second": Study(replace(first, answers=50), second_study(), RESULTS / "sentiment_second"),
        "quick": Study(
            replace(first, **fewer, answers=2, limit_answers=4),
            second_study(tiny),
            Path("runs/sentiment-quick"),
        ),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs parts of a study, and reports each of them.

    Raises:
      InputError: the model or the results folder cannot be used.
    """
    named = studies("")
    outputs = " or ".join(str(study.output) for study in named.values())
    parser = command_line("sentiment", __doc__, outputs)
    parser.add_argument(
        "--model", required=True, help="a Transformers folder, or a name on the Hugging Face Hub"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true", help="the second study, with tiny numbers")
    for name, flag in (("first", "--parts"), ("second", "--second")):
        what.add_argument(
            flag, dest=name, nargs="+", choices=named[name].plans, help=f"of the {name} study"
        )
    options = parser.parse_args(argv)
    name = "quick" if options.quick else "first" if options.first else "second"
    study = studies(options.model)[name]
    names = study.plans if options.quick else getattr(options, name)
    wanted = [study.plans[each] for each in names]
    settings = settings_of(study.foundation, [part for plan in wanted for part in plan.parts])
    store = open_store(options.output or study.output, settings)
    for plan in wanted:
        run_plan(plan, study.foundation, store, options.workers)
