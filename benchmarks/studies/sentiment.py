"""SPO and DPO on a pretrained language model, judged by a published sentiment tool.

    python -m benchmarks.studies smollm2 FOLDER                                    the model, once
    python -m benchmarks.studies sentiment --model FOLDER --quick            all parts, tiny numbers
    python -m benchmarks.studies sentiment --model FOLDER --second 1 2 3 4     docs/second_study.md

The model, SmolLM2-135M-Instruct for the committed results, continues openings such as "To be
honest, the hotel was". The reward of an answer is VADER's compound score. Pairs are two answers of
the model; the last two blocks are trained, all else is frozen. Every part goes on where it was
interrupted when the same command is given again, and the parts of a folder share their pairs. A
part is reported once all of it is finished; the command of a finished part reports it again. The
committed results of both studies are of the tag second-study: another version needs an --output.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import RESULTS
from benchmarks.studies.foundation import Foundation
from benchmarks.studies.plan import run_plan
from benchmarks.studies.second import second_study, tiny
from benchmarks.studies.store import open_store

QUICK, OUTPUT = Path("runs/sentiment-quick"), RESULTS / "sentiment_second"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs parts of the study, and reports each of them.

    Raises:
      InputError: the model or the results folder cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies sentiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, help="a Transformers folder, or a name on the Hugging Face Hub"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true", help="all parts, with tiny numbers")
    what.add_argument("--second", nargs="+", choices=second_study(), help="parts of the study")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"default: {OUTPUT} or {QUICK}")
    parser.add_argument("--workers", type=int, default=2, help="processes at work; default: 2")
    options = parser.parse_args(argv)
    if options.quick:
        foundation = Foundation(
            options.model, held_out_openings=12, pair_answers=4, held_out_pair_answers=2, answers=2
        )
        wanted, output = list(second_study(tiny).values()), QUICK
    else:
        foundation, output = Foundation(options.model), OUTPUT
        wanted = [second_study()[part] for part in options.second]
    planned = {part.name: part.settings() for plan in wanted for part in plan.parts}
    settings = {"foundation": foundation.settings(), **planned}
    store = open_store(options.output or output, settings)
    for plan in wanted:
        run_plan(plan, foundation, store, options.workers)
