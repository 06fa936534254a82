"""Time and peak memory of a training step in TRL's DPOTrainer, loss by loss.

    pip install -c constraints.txt ".[test]" liger-kernel
    python -m benchmarks.smollm2 FOLDER                             a model of 135M parameters
    python -m benchmarks.bench_trainers --model FOLDER              results/trainers_cpu.csv

A step is TRL's: hidden states of policy and reference, the loss, the backward pass through all
weights, AdamW. Every measurement is a fresh process: one step warms up (and compiles Liger's
kernel), then the fastest of the others counts. The ways take turns, and odd rounds run backwards.
The table gives medians over the rounds. Time is the processor's, on one thread, so that it does not
depend on what else the machine is doing. Memory is the growth of the process's peak over what it
held between two steps: models and AdamW's states are not in it, gradients are. Tokens are random,
all sequences have one length, and prompts are masked.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig

from benchmarks.gauges import HostGauge
from benchmarks.machine import describe
from benchmarks.trainer_ways import WAYS

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "trainers_cpu.csv"
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "spoloss")
BASIS = "trl"


@dataclass(frozen=True)
class Cell:
    """One measurement: a way on a model, and the shape of its batches."""

    way: str
    model: str
    pairs: int
    tokens: int
    prompt: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """Processor seconds of the fastest step, growth of peak memory, the last loss."""

    seconds: float
    memory_mib: float
    loss: float


# ------------------------------------------------------------------------------ inside the process


class StepGauge(TrainerCallback):
    """Times every step after the first, and takes the peak of memory over them."""

    def __init__(self) -> None:
        self.gauge = HostGauge()
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Forgets the peak of the step that warmed up, and starts the clock."""
        if state.global_step == 1:
            self.gauge.reset()
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Stops the clock; the optimiser has stepped."""
        if state.global_step > 1:
            self.seconds.append(time.process_time() - self.start)


def make_pairs(cell: Cell, vocabulary: int) -> Dataset:
    """Pairs of random tokens as TRL has them once they are tokenised."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    return Dataset.from_list(
        [
            {
                "prompt_ids": tokens(cell.prompt),
                "chosen_ids": tokens(cell.tokens - cell.prompt),
                "rejected_ids": tokens(cell.tokens - cell.prompt),
            }
            for _ in range(cell.pairs * cell.steps)
        ]
    )


def run_cell(cell: Cell) -> Measured:
    """Train some steps one way in this process."""
    torch.set_num_threads(1)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(cell.model, dtype=torch.float32) for _ in range(2)
    )
    gauge = StepGauge()
    with tempfile.TemporaryDirectory() as folder:
        trainer = WAYS[cell.way].load()(
            policy,
            reference,
            DPOConfig(
                folder,
                beta=0.1,
                per_device_train_batch_size=cell.pairs,
                max_steps=cell.steps,
                max_length=cell.tokens,
                learning_rate=1e-6,
                activation_checkpointing=False,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
            processing_class=AutoTokenizer.from_pretrained(cell.model),
            callbacks=[gauge],
        )
        # TRL would tokenise text anew, to lengths of its own; so the tokens come after that.
        trainer.train_dataset = make_pairs(cell, policy.config.vocab_size)
        trainer.train()
    growth = gauge.gauge.growth_mib()
    assert growth is not None, "the kernel keeps no peak of this process's memory"
    return Measured(min(gauge.seconds), growth, trainer.state.log_history[-2]["loss"])


# ------------------------------------------------------------------------ from processes to a file


def run_apart(cell: Cell) -> Measured:
    """Measure a cell in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_trainers",
        "--cell",
        json.dumps(asdict(cell)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{cell.way}: {done.stderr.strip()}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def run_rounds(cells: Sequence[Cell], rounds: int) -> dict[Cell, list[Measured]]:
    """Measure all cells in turn, round after round."""
    found: dict[Cell, list[Measured]] = {cell: [] for cell in cells}
    for turn in range(rounds):
        for cell in cells[:: -1 if turn % 2 else 1]:
            measured = run_apart(cell)
            found[cell].append(measured)
            print(f"round {turn + 1}/{rounds}: {cell.way}: {measured}", file=sys.stderr)
    return found


def rows(found: dict[Cell, list[Measured]]) -> list[dict[str, Any]]:
    """Medians over the rounds; ratios are of neighbours in time, by round."""
    basis = next(measured for cell, measured in found.items() if cell.way == BASIS)

    def median(name: str, cell: Cell) -> float:
        return statistics.median(getattr(measured, name) for measured in found[cell])

    def ratio(name: str, cell: Cell) -> float:
        both = zip(found[cell], basis, strict=True)
        return statistics.median(getattr(ours, name) / getattr(other, name) for ours, other in both)

    return [
        {
            "way": cell.way,
            "pairs": cell.pairs,
            "tokens": cell.tokens,
            "prompt": cell.prompt,
            "rounds": len(found[cell]),
            "seconds": f"{median('seconds', cell):.3f}",
            "of_trl": f"{ratio('seconds', cell):.3f}",
            "memory_mib": f"{median('memory_mib', cell):.0f}",
            "memory_of_trl": f"{ratio('memory_mib', cell):.3f}",
        }
        for cell in found
    ]


def write_csv(table: Sequence[dict[str, Any]], machine: str, path: Path) -> None:
    """Write the rows after a comment that says where they were measured."""
    with path.open("w", newline="") as file:
        file.write(f"# {machine}\n")
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", help="a folder or a name that Transformers loads")
    add("--pairs", type=int, default=2, help="pairs of a batch; default: %(default)s")
    add("--tokens", type=int, default=256, help="tokens of a sequence; default: %(default)s")
    add("--prompt", type=int, default=64, help="of which prompt; default: %(default)s")
    add("--steps", type=int, default=3, help="of a process, the first not timed; default: 3")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    add("--output", type=Path, default=RESULT, help=f"default: {RESULT.relative_to(ROOT)}")
    add("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.cell is None and options.model is None:
        parser.error("--model is required")
    if BASIS not in options.ways:
        parser.error(f"--ways: expected {BASIS} among them, which the others are compared with")
    if options.steps < 2 or options.rounds < 1:
        parser.error("expected at least 2 --steps and 1 of --rounds")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the table, or run one cell of it."""
    options = parse_options(argv)
    if options.cell is not None:
        print(json.dumps(asdict(run_cell(Cell(**json.loads(options.cell))))))
        return
    shape = options.model, options.pairs, options.tokens, options.prompt, options.steps
    found = run_rounds([Cell(way, *shape) for way in options.ways], options.rounds)
    machine = f"{Path(options.model).name}, float32, {describe(*PACKAGES)}"
    write_csv(rows(found), machine, options.output)
    print(options.output.read_text(), end="")


if __name__ == "__main__":
    main()
