"""The paper's protocol at desk scale: SFT, then DPO and SPO from it, judged by the true reward.

    python -m benchmarks.alignment --quick       1 seed, 3 arms: 90 seconds on two cores
    python -m benchmarks.alignment --full        5 seeds, 31 arms: within half an hour
    python -m benchmarks.alignment --full --arms dpo:0.4 spo:0.1 spo:0.1@noisy --seeds 8

The language is made up; benchmarks.alignment.sentiment is the same on a pretrained model.
Prints win rates in the form of the paper's tables, and writes them to the results folder with CSV
files and figures. A run that was interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.alignment import arms
from benchmarks.alignment.command import Plan, at_least_one, carry_out, command_line
from benchmarks.alignment.language_protocols import FULL, QUICK
from benchmarks.alignment.report import report

PROGRAM = "python -m benchmarks.alignment"
OUTPUTS = {"quick": Path("runs/alignment-quick"), "full": Path("runs/alignment-full")}


def plan(argv: Sequence[str] | None) -> Plan:
    """Reads the command line.

    Raises:
      InputError: an option is unknown or out of range.
    """
    description = f"{__doc__}\n{arms.__doc__}"
    parser = command_line(PROGRAM, description, " or ".join(map(str, OUTPUTS.values())))
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", dest="size", action="store_const", const="quick")
    size.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="instead of the size's own")
    parser.add_argument("--seeds", type=int, metavar="N", help="instead of the size's own")
    options = parser.parse_args(argv)
    protocol = {"quick": QUICK, "full": FULL}[options.size]
    if options.arms is not None:
        chosen = dict.fromkeys(arms.parse_arm(text) for text in options.arms)
        protocol = protocol.with_first_part(arms=tuple(chosen))
    if options.seeds is not None:
        protocol = protocol.with_first_part(seeds=at_least_one("--seeds", options.seeds))
    return Plan(
        protocol.settings(),
        protocol.jobs(),
        partial(report, protocol),
        options.output or OUTPUTS[options.size],
        at_least_one("--workers", options.workers),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment and returns its exit code."""
    return carry_out(PROGRAM, partial(plan, argv))


if __name__ == "__main__":
    sys.exit(main())
