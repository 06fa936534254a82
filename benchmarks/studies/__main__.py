"""The experiments behind the pages on SPO and DPO: python -m benchmarks.studies STUDY --help.

sentiment    the protocol on a pretrained language model, judged by VADER
tabular      the distance to equation 1's optimal policy, where that is known exactly
smollm2      makes the pretrained model that the pages used
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from benchmarks.studies import InputError

STUDIES = ("sentiment", "tabular", "smollm2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study and return the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES, metavar="STUDY")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="those of the study")
    options = parser.parse_args(argv)
    study = importlib.import_module(f"benchmarks.studies.{options.study}")
    try:
        study.main(options.options)
    except InputError as error:
        print(f"{parser.prog} {options.study}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
