"""The paper's protocol on a pretrained language model, judged by a published sentiment tool.

    python -m benchmarks.smollm2 FOLDER                                     the model, once
    python -m benchmarks.alignment.sentiment --model FOLDER --quick
    python -m benchmarks.alignment.sentiment --model FOLDER --parts sweep
    python -m benchmarks.alignment.sentiment --model FOLDER --parts sweep overtraining flips gaps
    python -m benchmarks.alignment.sentiment --model FOLDER --report        what is finished so far
    python -m benchmarks.alignment.sentiment --model FOLDER --second        docs/second_study.md

The model, SmolLM2-135M-Instruct for the committed results, continues openings such as "To be
honest, the hotel was". The reward of an answer is VADER's compound score. Pairs are two answers of
the model; the last two blocks are trained, all else is frozen. Every part goes on where it was
interrupted when the same command is given again, and the parts of a folder share their pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.alignment.command import Plan, at_least_one, carry_out, command_line
from benchmarks.alignment.sentiment.parts import (
    PARTS,
    full_protocol,
    jobs_in_order,
    quick_protocol,
    second_protocol,
)
from benchmarks.alignment.sentiment.report import report

PROGRAM = "python -m benchmarks.alignment.sentiment"
OUTPUTS = {
    name: Path(f"runs/sentiment{suffix}")
    for name, suffix in (("quick", "-quick"), ("second", "-second"), ("full", ""))
}


def plan(argv: Sequence[str] | None) -> Plan:
    """Reads the command line.

    Raises:
      InputError: an option is unknown or out of range, or the model cannot be read.
    """
    outputs = " or ".join(map(str, OUTPUTS.values()))
    parser = command_line(PROGRAM, __doc__, outputs)
    parser.add_argument(
        "--model", required=True, help="a Transformers folder, or a name on the Hugging Face Hub"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true", help="one seed, three arms")
    what.add_argument("--parts", nargs="+", choices=PARTS, help="of the whole study")
    what.add_argument("--second", action="store_true", help="the second study")
    what.add_argument("--report", action="store_true", help="of what is finished; trains nothing")
    options = parser.parse_args(argv)
    name = "quick" if options.quick else "second" if options.second else "full"
    protocols = {"quick": quick_protocol, "second": second_protocol, "full": full_protocol}
    protocol = protocols[name](options.model)
    chosen = {"quick", "matched"} if name != "full" else set(options.parts or ())
    parts = [part for part in protocol.parts if part.name in chosen]
    return Plan(
        protocol.settings(),
        jobs_in_order(protocol.foundation, parts),
        partial(report, protocol),
        options.output or OUTPUTS[name],
        at_least_one("--workers", options.workers),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs parts of the study and returns its exit code."""
    return carry_out(PROGRAM, partial(plan, argv))


if __name__ == "__main__":
    sys.exit(main())
