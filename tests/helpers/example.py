"""The example's modules, and what its tests share."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SFT_STEPS, STEPS = 12, 4
"""Of the run that several tests look at."""

# `python docs/examples/train.py` puts the script's folder first, and train.py imports from it.
sys.path.insert(0, str(EXAMPLES))


@dataclass(frozen=True)
class Finished:
    """A run of the script that has ended, and what it left."""

    cwd: Path
    output: Path
    stdout: str
    steps: list[dict[str, str]]
    held_out: list[dict[str, str]]


def pair(**changes: object) -> dict[str, object]:
    """A line of a pairs file."""
    return {"prompt": "How long?", "chosen": "An hour.", "rejected": "Ages.", **changes}


def json_lines(*records: object) -> bytes:
    """A pairs file."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def run_script(*argv: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs train.py as people do; its models are so small that a second thread only waits."""
    command = [sys.executable, str(EXAMPLES / "train.py"), *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
