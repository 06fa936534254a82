"""Time and memory from hidden states to a preference loss and its gradients, way by way.

    python -m benchmarks.fused                    results/fused_cpu.csv and .svg
    python -m benchmarks.fused --model FOLDER     a real head: results/fused_real_cpu.csv
    python -m benchmarks.fused --device cuda      the head of Llama-3.1-8B in bfloat16
    python -m benchmarks.fused --quick            one tiny shape; the table alone

Each way has a process of its own, which warms up and then repeats forward and backward. The bare
matrix products, the floor, have one more, and the two take turns: floor, way, way, floor. So each
repetition gives a ratio to a repetition of the floor beside it, in which the drift of a shared
machine cancels. The median of at least 15 ratios is reported, with quartiles; the floor itself is
measured as a way as well, which shows the noise. Memory is the growth of a fresh process's peak
over what it held before the first full call, gradients included, as a median of several processes.
The error is the largest of loss and gradients against full logits in float64.

By default the CPU uses one thread, since processor time is disturbed the least by other processes.
With `--threads` the clock decides. A row is written as soon as it is complete, if other processes
took less than a tenth of the cores. The same command skips the rows that the file has already.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.figure import draw
from benchmarks.fused_problem import Shape, write_states
from benchmarks.fused_ways import FLOOR, WAYS, UnavailableError
from benchmarks.fused_worker import Apart, Cell, Timed, error, growth_mib, set_up, timed
from benchmarks.record import RESULTS, Table, machine

PEERS = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "spoloss")
PAIRS = Path(__file__).parents[1] / "docs" / "examples" / "pairs.jsonl"
REAL_PAIRS = 16
HEADS = {"trained": False, "frozen": True}
CPU_SIZE, CPU_SHAPES = (512, 32_000, "float32", "cpu"), ("16x64", "4x256", "2x1024", "1x4096")
CUDA_SIZE, CUDA_SHAPES = (4_096, 128_256, "bfloat16", "cuda"), ("8x2048",)
QUICK_SIZE, QUICK_SHAPES = (64, 1_000, "float32", "cpu"), ("4x64",)
ROUNDS, PROCESSES = 15, 3
CHECK_FLOP = {"cpu": 3e11, "cuda": 1e15}
"""Up to this many floating-point operations, a solution is checked against float64."""


# -------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Effort:
    """How a cell is measured.

    Attributes:
      rounds: turns of the way and of the floor beside it.
      processes: fresh ones, for memory.
      threads: of the CPU.
      states: a file of a real head and its hidden states; None for random numbers.
    """

    rounds: int
    processes: int
    threads: int
    states: Path | None = None


def run(cells: Sequence[Cell], table: Table, effort: Effort, ignored: float) -> None:
    """Measure what the table lacks; the ways of one problem and head share the floor beside.

    Args:
      cells: what to measure.
      table: where the rows go.
      effort: how.
      ignored: the share of the labels that are ignored, for the table.
    """
    for beside, group in groupby(table.todo(cells), key=lambda cell: replace(cell, way=FLOOR)):
        with Apart() as floor:
            floor.call(set_up, beside, effort.threads, effort.states)
            floor.call(timed)
            for cell in group:
                table.add(cell, ignored=ignored, **measure(cell, floor, effort))


def measure(cell: Cell, floor: Apart, effort: Effort) -> dict[str, Any]:
    """The columns of a cell's row; a peer that fails in whatever way has a note that says so."""
    try:
        return _measure(cell, floor, effort)
    except UnavailableError as problem:
        note = f"cannot run here: {problem}"
    except ModuleNotFoundError as problem:
        note = f"not installed: {problem}"
    except BrokenProcessPool:
        note = "its process died"
    except Exception as problem:
        note = f"failed: {str(problem).splitlines()[0][:200]}"
    return {"note": note}


def _measure(cell: Cell, floor: Apart, effort: Effort) -> dict[str, Any]:
    memory: list[float | None] = []
    for _ in range(effort.processes - 1):
        with Apart() as way:
            way.call(set_up, cell, effort.threads, effort.states)
            memory.append(way.call(growth_mib))
    with Apart() as way:
        note = way.call(set_up, cell, effort.threads, effort.states)
        memory.append(way.call(growth_mib))  # warms up as well
        turns = []
        for turn in range(effort.rounds):
            order = (floor, way) if turn % 2 == 0 else (way, floor)
            took = {process: process.call(timed) for process in order}
            turns.append((took[way], took[floor]))
        flop = 16 * cell.pairs * cell.tokens * cell.width * cell.vocab
        checked = cell.way != FLOOR and flop <= CHECK_FLOP[cell.device]
        wrong = way.call(error) if checked else None
    return summary(turns, memory) | {"max_error": wrong, "note": note}


def summary(
    turns: Sequence[tuple[Timed, Timed]], memory: Sequence[float | None]
) -> dict[str, float | None]:
    """Medians and quartiles.

    Args:
      turns: the way's repetition and the floor's beside it, round by round.
      memory: growth of peak memory in each process, MiB; None where the system keeps none.
    """
    ratios = [way.seconds / floor.seconds for way, floor in turns]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {
        "seconds": statistics.median(way.seconds for way, _ in turns),
        "of_floor": middle,
        "of_floor_low": low,
        "of_floor_high": high,
        "memory_mib": None if None in memory else statistics.median(memory),
        "rounds": len(turns),
        "others": statistics.fmean(each.others for turn in turns for each in turn),
    }


# ------------------------------------------------------------------------------------ what to run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one tiny shape, one round; no file")
    add("--shapes", nargs="+", metavar="PxT", help="pairs x tokens, such as 4x256 2x1024")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    add("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="default: both")
    add("--model", help="take the head of this Transformers folder or name, and real text")
    add("--pairs", type=Path, default=PAIRS, help=f"the text; default: {PAIRS.name}")
    add("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    add("--threads", type=int, default=1, help="of the CPU; default: 1")
    add("--device", choices=CHECK_FLOP, default="cpu", help="default: cpu")
    add("--output", type=Path, default=RESULTS, help=f"a folder; default: {RESULTS.name}")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, got none")
    if options.rounds < 1 or options.threads < 1:
        parser.error("expected at least 1 for --rounds and --threads")
    return options


def random_cells(options: argparse.Namespace) -> list[Cell]:
    """Every way on random problems, shape by shape and head by head."""
    size, shapes = (
        (QUICK_SIZE, QUICK_SHAPES)
        if options.quick
        else {"cpu": (CPU_SIZE, CPU_SHAPES), "cuda": (CUDA_SIZE, CUDA_SHAPES)}[options.device]
    )
    try:
        wanted = [tuple(map(int, shape.split("x"))) for shape in options.shapes or shapes]
        return [
            Cell(way, pairs, tokens, *size, frozen=HEADS[head])
            for (pairs, tokens), head, way in product(wanted, options.heads, options.ways)
        ]
    except ValueError:
        raise SystemExit("--shapes: expected pairs x tokens such as 4x256") from None


def real_cells(shape: Shape, options: argparse.Namespace) -> list[Cell]:
    """Every way on a model's head and its hidden states of real text."""
    return [
        Cell(way, *shape.size, "float32", options.device, HEADS[head])
        for head, way in product(options.heads, options.ways)
    ]


def title_of(options: argparse.Namespace) -> str:
    """The first line of a result file."""
    parts = [machine(*PEERS)]
    if options.device == "cuda":
        parts.insert(0, torch.cuda.get_device_name())
    else:
        parts.append("1 thread" if options.threads == 1 else f"{options.threads} threads")
    if options.model is not None:
        parts.append(f"head of {Path(options.model).name}")
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure cell after cell; each is printed and written as soon as it is complete."""
    options = parse(argv)
    name = "fused" if options.model is None else "fused_real"
    path = None if options.quick else options.output / f"{name}_{options.device}.csv"
    table = Table(path, title_of(options), Cell)
    effort = Effort(options.rounds, PROCESSES, options.threads)
    if options.quick:
        effort = replace(effort, rounds=1, processes=1)
    if options.model is None:
        run(random_cells(options), table, effort, ignored=0.0)
    else:
        with tempfile.TemporaryDirectory() as folder:
            states = Path(folder) / "states.safetensors"
            with Apart() as process:
                given = options.model, options.pairs, REAL_PAIRS, states
                shape = process.call(write_states, *given)
            run(real_cells(shape, options), table, replace(effort, states=states), shape.ignored)
    if path is not None and options.model is None:
        draw(path, "memory_mib")


if __name__ == "__main__":
    main()
