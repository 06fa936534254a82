"""SPO and DPO on preference pairs of your own, with a pretrained language model.

    python -m benchmarks.smollm2 FOLDER                               the model, once
    python -m benchmarks.real_pairs --pairs FILE --model FOLDER       two of the five folds
    python -m benchmarks.real_pairs --pairs FILE --model FOLDER --folds 5
    python -m benchmarks.real_pairs --pairs FILE --model FOLDER --report

Each line of the pairs file is a JSON object with prompt, chosen, rejected, and reward_gap or
p_chosen. The last two blocks of the model are trained, all else is frozen. Each fold holds out a
fifth of the prompts. All arms are trained on the others, and then tell which answers of the
held-out pairs are the better ones. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.alignment.command import Plan, at_least_one, carry_out, command_line
from benchmarks.alignment.errors import InputError
from benchmarks.real_pairs.material import FOLDS, Material
from benchmarks.real_pairs.report import report
from benchmarks.real_pairs.task import jobs_of, settings_of

PROGRAM = "python -m benchmarks.real_pairs"
OUTPUT = Path("runs/real-pairs")


def plan(argv: Sequence[str] | None) -> Plan:
    """Reads the command line and the pairs.

    Raises:
      InputError: an option is out of range, or the pairs or the model cannot be read.
    """
    parser = command_line(PROGRAM, __doc__, str(OUTPUT))
    parser.add_argument("--pairs", type=Path, required=True, help="JSON lines, plain or .gz")
    parser.add_argument(
        "--model", required=True, help="a Transformers folder, or a name on the Hugging Face Hub"
    )
    parser.add_argument(
        "--folds", type=int, default=2, help=f"to hold out in turn, of {FOLDS}; default: 2"
    )
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    options = parser.parse_args(argv)
    if options.folds not in range(1, FOLDS + 1):
        raise InputError(f"--folds: expected 1 to {FOLDS}, got {options.folds}")
    material = Material(options.pairs, options.model)
    return Plan(
        settings_of(material),
        [] if options.report else jobs_of(material, options.folds),
        partial(report, material),
        options.output or OUTPUT,
        at_least_one("--workers", options.workers),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing and returns the exit code."""
    return carry_out(PROGRAM, partial(plan, argv))


if __name__ == "__main__":
    sys.exit(main())
