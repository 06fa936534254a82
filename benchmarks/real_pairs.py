"""The example's training run on preference pairs of your own, loss against loss.

    python -m benchmarks.real_pairs --pairs judged.jsonl.gz              5 minutes per arm and seed
    python -m benchmarks.real_pairs --pairs judged.jsonl.gz --seeds 2    goes on where it stopped
    python -m benchmarks.real_pairs --pairs judged.jsonl.gz --model FOLDER

Each arm is one run of docs/examples/train.py. With --model it is preference training of all weights
of that model, which has been instruction-tuned already; benchmarks/smollm2.py makes such a folder.
Without it, it is a small new Qwen2, SFT on the chosen answers, then preference training. Within a
seed all arms share data order and starting weights, and therefore the reference. The pairs file is
the example's, with `reward_gap` or `p_chosen` on every line for the arms that know the gap. A
finished run's row is kept in the results, and is not run again.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results"
EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "train.py"
NEW_MODEL_CSV = "real_pairs.csv"
PRETRAINED_CSV = "real_pairs_pretrained.csv"
NEW_MODEL = "--max-length 384 --sft-steps 150 --steps 80 --lr 3e-5"
PRETRAINED = (
    "--max-length 160 --sft-steps 0 --steps 40 --batch-size 4 --lr 3e-6 --fused "
    "--held-out 64 --evaluations 1"
)


@dataclass(frozen=True)
class Arm:
    """One way to train on the pairs: the flags that set it apart, and those that all arms share."""

    name: str
    loss: str
    beta: float
    flags: str = ""
    model: str | None = None

    @property
    def shared(self) -> str:
        """The flags that all arms of a model share."""
        return NEW_MODEL if self.model is None else PRETRAINED

    def command(self, seed: int, pairs: Path, output: Path) -> list[str]:
        """The example's command line."""
        own = f"--loss {self.loss} --beta {self.beta} {self.flags} --seed {seed} {self.shared}"
        places = ["--pairs", str(pairs), "--output", str(output)]
        places += [] if self.model is None else ["--model", self.model]
        return [sys.executable, str(EXAMPLE), *own.split(), *places]


ARMS = (
    Arm("DPO(0.1)", "dpo", 0.1),
    Arm("DPO(0.4)", "dpo", 0.4),
    Arm("SPO(0.1)", "spo", 0.1),
    Arm("SPO(0.1), known gap", "spo", 0.1, "--reward-gap"),
    Arm("SPO(0.1), known gap, linear below 0", "spo", 0.1, "--reward-gap --linear-below 0"),
    # With gaps of 6 on average this beta has the average target of SPO(0.1), 10 nats.
    Arm("SPO(0.6), known gap, linear below 0", "spo", 0.6, "--reward-gap --linear-below 0"),
)


@dataclass(frozen=True)
class Row:
    """One run: the held-out pairs after training, and the policy's way from the reference.

    x and h are means over the held-out pairs, h and the log-probabilities in nats. A run that
    diverged has the step at which it did, and nan for the rest.
    """

    arm: str
    seed: int
    settings: str
    held_out: int
    accuracy: float
    accuracy_error: float
    x: float
    h: float
    chosen_change: float
    rejected_change: float
    largest_grad_norm: float
    steps: int
    seconds: float


class ArmError(Exception):
    """The example refused its command line or its pairs; the message is its own."""


def run_arm(arm: Arm, seed: int, pairs: Path) -> Row:
    """Train one arm and read what the run leaves behind."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        command = arm.command(seed, pairs.resolve(), output)
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=folder, env=environment
        )
        diverged = done.returncode == 1 and "error: preference step" in done.stderr
        if done.returncode != 0 and not diverged:
            raise ArmError(done.stderr.strip().rpartition("\n")[2])
        seconds = time.monotonic() - start
        held_out = int(done.stdout.partition(" held out")[0].rpartition(" ")[2])
        return summarise(arm, seed, output, held_out, seconds, diverged=diverged)


def summarise(
    arm: Arm, seed: int, output: Path, held_out: int, seconds: float, *, diverged: bool
) -> Row:
    """Turn a run's CSV files into a row."""
    steps = [row for row in read_rows(output / "steps.csv") if row["stage"] == "preference"]
    evaluations = read_rows(output / "held_out.csv")
    before, after = evaluations[0], evaluations[-1]

    def change(side: str) -> float:
        return float(after[f"logps/{side}"]) - float(before[f"logps/{side}"])

    accuracy, x = float(after["rewards/accuracies"]), float(after["rewards/margins"])
    numbers = (
        accuracy,
        math.sqrt(accuracy * (1.0 - accuracy) / held_out),
        x,
        x / arm.beta,
        change("chosen"),
        change("rejected"),
        max((float(row["grad_norm"]) for row in steps), default=math.nan),
    )
    shown = [math.nan] * len(numbers) if diverged else [round(n, 4) for n in numbers]
    return Row(arm.name, seed, settings_of(arm), held_out, *shown, len(steps), round(seconds))


def settings_of(arm: Arm) -> str:
    """What the run was told, so that a row of other settings is not taken for this one."""
    model = "" if arm.model is None else f"--model {Path(arm.model).name}"
    return " ".join(f"{arm.flags} {arm.shared} {model}".split())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, comment lines left out; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def finished(path: Path) -> list[Row]:
    """The rows that the results already hold."""
    kinds = {"arm": str, "settings": str, "seed": int, "held_out": int, "steps": int}
    return [
        Row(**{name: kinds.get(name, float)(value) for name, value in row.items()})
        for row in read_rows(path)
    ]


def write(rows: list[Row], path: Path) -> None:
    """Write all rows in the order of arms and seeds."""
    order = {arm.name: i for i, arm in enumerate(ARMS)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {describe('torch', 'transformers', 'spoloss')}, one thread\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        rows = sorted(rows, key=lambda row: (order.get(row.arm, len(order)), row.arm, row.seed))
        writer.writerows(asdict(row) for row in rows)


def run_missing(rows: list[Row], arguments: argparse.Namespace) -> Iterator[Row]:
    """Run what the results lack, seed by seed, and yield the rows as they come."""
    known = {(row.arm, row.seed, row.settings) for row in rows}
    arms = [replace(arm, model=arguments.model) for arm in ARMS]
    wanted = [(arm, seed) for seed in range(arguments.seeds) for arm in arms]
    missing = [(a, seed) for a, seed in wanted if (a.name, seed, settings_of(a)) not in known]
    print(f"{len(missing)} of {len(wanted)} runs to do")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        calls = [pool.submit(partial(run_arm, a, seed, arguments.pairs)) for a, seed in missing]
        try:
            yield from (call.result() for call in calls)
        finally:
            pool.shutdown(cancel_futures=True)


def model_name(text: str) -> str:
    """A model as the example is told of it, which runs in a folder of its own."""
    return str(Path(text).resolve()) if Path(text).exists() else text


def show(row: Row) -> str:
    """One line of the printed table."""
    accuracy = f"{row.accuracy:.3f} ± {row.accuracy_error:.3f}"
    changes = f"{row.chosen_change:+10.2f}{row.rejected_change:+10.2f}"
    return (
        f"{row.arm:38}{row.seed:>5}{accuracy:>16}{row.x:8.3f}{row.h:8.2f}{changes}"
        f"{row.largest_grad_norm:12.3g}{row.seconds:6.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run all arms, print a line for each and keep its row; 2 where the example refuses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, required=True, help="JSON lines, plain or .gz")
    parser.add_argument(
        "--seeds", type=int, choices=range(1, 11), default=1, help="0, 1, ...; default: 1"
    )
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="runs at a time")
    parser.add_argument("--model", type=model_name, help="a folder, or a name on the Hub")
    parser.add_argument("--output", type=Path, help="the CSV of results; default: a committed one")
    arguments = parser.parse_args(argv)
    committed = NEW_MODEL_CSV if arguments.model is None else PRETRAINED_CSV
    arguments.output = arguments.output or RESULTS / committed
    rows = finished(arguments.output)
    changes = "Δ log-probability of chosen and rejected"
    print(f"{'':38}{'seed':>5}{'accuracy':>16}{'x':>8}{'h':>8}  {changes}, largest gradient norm")
    for row in rows:
        print(show(row))
    try:
        for row in run_missing(rows, arguments):
            rows.append(row)
            write(rows, arguments.output)
            print(show(row), flush=True)
    except ArmError as error:
        print(f"real_pairs: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
