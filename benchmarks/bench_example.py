"""The example's two documented commands, timed: minutes, memory, and what the policy has learnt.

    python -m benchmarks.bench_example                          the small new model, a minute
    python -m benchmarks.bench_example --model FOLDER           and SmolLM2-135M-Instruct, 8 minutes

FOLDER is what `python -m benchmarks.smollm2 FOLDER` writes, or the name on the Hugging Face Hub.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.machine import describe

ROOT = Path(__file__).parents[1]
SCRIPT = "docs/examples/train.py"
RESULTS = Path(__file__).parent / "results" / "example.csv"
NEW_MODEL, SMOLLM2 = "a small new Qwen2", "SmolLM2-135M-Instruct"
FLAGS = {
    NEW_MODEL: "",
    SMOLLM2: (
        "--fused --sft-steps 0 --steps 20 --batch-size 8 --lr 2e-5 --linear-below 0 --evaluations 2"
    ),
}


@dataclass(frozen=True)
class Row:
    """One run on the pairs that ship with the example.

    Attributes:
      model: a key of `FLAGS`.
      flags: the options of the command, without the model's place.
      seconds: wall time of the whole command.
      first_step_seconds: wall time until the first training step, of either stage, is done.
      peak_mib: the most memory of the process, as the run prints it.
      held_out: the number of held-out pairs.
      accuracy: the share of them whose chosen answer has the greater implicit reward.
    """

    model: str
    flags: str
    seconds: float
    first_step_seconds: float
    peak_mib: int
    held_out: int
    accuracy: float


class ExampleError(Exception):
    """The example failed; the message is its own."""


def measure(name: str, model: str | None) -> Row:
    """Runs the command of a key of `FLAGS`.

    Args:
      name: the key.
      model: what to load, a folder or a name; None for the new model.

    Raises:
      ExampleError: the example ends with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        flags = FLAGS[name].split() + (["--model", model] if model else [])
        command = [sys.executable, str(ROOT / SCRIPT), *flags, "--output", str(output)]
        start, first_step = time.monotonic(), 0.0
        with (
            Path(folder, "log").open("w+", encoding="utf-8") as log,
            subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process,
        ):
            while process.poll() is None:
                if not first_step and (output / "steps.csv").exists():
                    first_step = time.monotonic() - start
                time.sleep(0.05)
            seconds = time.monotonic() - start
            log.seek(0)
            printed = log.read()
        if process.returncode != 0:
            raise ExampleError(printed.strip().rpartition("\n")[2])
        with (output / "held_out.csv").open(newline="", encoding="utf-8") as file:
            *_, last = csv.DictReader(file)
        peak = int(re.search(r"Peak memory .*: (\d+) MiB", printed)[1])
        held_out = int(re.search(r"(\d+) held out", printed)[1])
        accuracy = round(float(last["rewards/accuracies"]), 4)
        times = round(seconds, 1), round(first_step, 1)
        return Row(name, FLAGS[name], *times, peak, held_out, accuracy)


def main(argv: Sequence[str] | None = None) -> int:
    """Times the commands and writes their rows; 2 where the example fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help=f"{SMOLLM2}: a folder, or a name on the Hub")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the CSV of results")
    arguments = parser.parse_args(argv)
    models = {NEW_MODEL: None} | ({SMOLLM2: arguments.model} if arguments.model else {})
    try:
        rows = [measure(name, model) for name, model in models.items()]
    except ExampleError as error:
        print(f"bench_example: {error}", file=sys.stderr)
        return 2
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {describe('torch', 'transformers', 'spoloss')}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
