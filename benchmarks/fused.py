"""Time and memory from hidden states to a preference loss and its gradients, way by way.

    python -m benchmarks.fused                    results/fused_cpu.csv and .svg
    python -m benchmarks.fused --model FOLDER     a real head: results/fused_real_cpu.csv
    python -m benchmarks.fused --device cuda      the head of Llama-3.1-8B in bfloat16
    python -m benchmarks.fused --quick            one tiny shape; the table alone

Each way of a shape and head has a process of its own, and the bare matrix products, the floor, have
one more. They take turns: floor, way, floor, next way, floor, ..., odd rounds backwards. So each
repetition of a way gives a ratio to either repetition of the floor beside it, in which the drift of
a shared machine cancels. The median of at least 15 ratios is reported, with quartiles; the row of
the floor has those of each of its repetitions to the next, which shows the noise. Memory is the
growth of the process's peak in its first full repetition, gradients included. The error is the
largest of loss and gradients against full logits in float64.

By default the CPU uses one thread, since processor time is disturbed the least by other processes.
With `--threads` the clock decides. The rows of a shape and head are written as soon as they are
complete, if other processes took less than a tenth of the cores. The same command skips the rows
that the file has already.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.figure import draw
from benchmarks.fused_problem import Shape, write_states
from benchmarks.fused_ways import CPU_WAYS, WAYS, UnavailableError
from benchmarks.fused_worker import Apart, Cell, error, growth_mib, set_up, timed
from benchmarks.record import RESULTS, Table, machine
from benchmarks.turns import (
    CHECK_FLOP,
    FLOOR,
    HEADS,
    ROUNDS,
    SHAPES,
    check_flop,
    paced,
    sizes,
    summaries,
    take_turns,
    together,
)

PEERS = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "spoloss")
PAIRS = Path(__file__).parents[1] / "docs" / "examples" / "pairs.jsonl"
REAL_PAIRS = 16


class Setting(NamedTuple):
    """What is measured by default.

    Attributes:
      shapes: pairs x tokens.
      size: hidden width, vocabulary, dtype, device.
      ways: of `WAYS`.
    """

    shapes: Sequence[str]
    size: tuple[int, int, str, str]
    ways: Sequence[str]


SETTINGS = {
    "cpu": Setting(SHAPES, (512, 32_000, "float32", "cpu"), CPU_WAYS),
    "cuda": Setting(("8x2048",), (4_096, 128_256, "bfloat16", "cuda"), tuple(WAYS)),
}
QUICK = Setting(("4x64",), (64, 1_000, "float32", "cpu"), CPU_WAYS)


# -------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Effort:
    """How a problem is measured.

    Attributes:
      rounds: turns of each way.
      threads: of the CPU.
      states: a file of a real head and its hidden states; None for random numbers.
    """

    rounds: int
    threads: int
    states: Path | None = None


def run(cells: Sequence[Cell], table: Table, effort: Effort, ignored: float) -> None:
    """Measure what the table lacks, the ways of one problem and head together.

    Args:
      cells: what to measure.
      table: where the rows go.
      effort: how.
      ignored: the share of the labels that are ignored, for the table.
    """
    for floor, group in paced(together(table.missing(cells))):
        found = measure(floor, [cell for cell in group if cell != floor], effort)
        for cell in group:
            table.add(cell, ignored=ignored, **found[cell.way])


def measure(floor: Cell, cells: Sequence[Cell], effort: Effort) -> dict[str, dict[str, Any]]:
    """The columns of the rows of one problem and head, by way.

    Args:
      floor: the floor's cell.
      cells: the other ways'.
      effort: how.
    """
    with ExitStack() as stack:

        def start(cell: Cell) -> tuple[Apart, Future[str]]:
            process = stack.enter_context(Apart())
            return process, process.start(set_up, cell, effort.threads, effort.states)

        products, ready = start(floor)
        found = {FLOOR: warm_up(products, ready)}  # nothing disturbs its choice of the tiles
        started = {cell.way: start(cell) for cell in cells}
        found |= {way: warm_up(*process) for way, process in started.items()}
        able = {way: process for way, (process, _) in started.items() if "memory_mib" in found[way]}
        repeat = {way: partial(process.call, timed) for way, process in able.items()}
        if repeat:
            turns = take_turns(partial(products.call, timed), repeat, effort.rounds)
            for way, columns in summaries(turns).items():
                found[way] |= columns
        size = floor.pairs, floor.tokens, floor.width, floor.vocab
        if check_flop(*size) <= CHECK_FLOP[floor.device]:
            for way, process in able.items():
                found[way]["max_error"] = process.call(error)
    return found


def warm_up(process: Apart, ready: Future[str]) -> dict[str, Any]:
    """Note and memory of a first repetition; a peer that fails has a note that says how."""
    try:
        return {"note": ready.result(), "memory_mib": process.call(growth_mib)}
    except UnavailableError as problem:
        note = f"cannot run here: {problem}"
    except ModuleNotFoundError as problem:
        note = f"not installed: {problem}"
    except BrokenProcessPool:
        note = "its process died"
    except Exception as problem:
        note = f"failed: {str(problem).splitlines()[0][:200]}"
    return {"note": note}


# ------------------------------------------------------------------------------------ what to run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one tiny shape, one round; no file")
    add("--shapes", nargs="+", metavar="PxT", help="pairs x tokens, such as 4x256 2x1024")
    add("--ways", nargs="+", choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    add("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="default: both")
    add("--model", help="take the head of this Transformers folder or name, and real text")
    add("--pairs", type=Path, default=PAIRS, help=f"the text; default: {PAIRS.name}")
    add("--rounds", type=int, default=ROUNDS, help=f"two ratios each; default: {ROUNDS}")
    add("--threads", type=int, default=1, help="of the CPU; default: 1")
    add("--device", choices=SETTINGS, default="cpu", help="default: cpu")
    add("--output", type=Path, default=RESULTS, help=f"a folder; default: {RESULTS.name}")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, got none")
    if options.rounds < 1 or options.threads < 1:
        parser.error("expected at least 1 for --rounds and --threads")
    return options


def random_cells(setting: Setting, options: argparse.Namespace) -> Iterator[Cell]:
    """Every way on random problems, shape by shape and head by head."""
    shapes, ways = options.shapes or setting.shapes, options.ways or setting.ways
    for shape, head, way in product(shapes, options.heads, ways):
        yield Cell(way, *sizes(shape), *setting.size, frozen=HEADS[head])


def real_cells(shape: Shape, setting: Setting, options: argparse.Namespace) -> Iterator[Cell]:
    """Every way on a model's head and its hidden states of real text."""
    for head, way in product(options.heads, options.ways or setting.ways):
        yield Cell(way, *shape.size, "float32", options.device, frozen=HEADS[head])


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
    """Measure shape by shape; rows are printed and written as soon as these are complete."""
    options = parse(argv)
    name = "fused" if options.model is None else "fused_real"
    path = None if options.quick else options.output / f"{name}_{options.device}.csv"
    table = Table(path, title_of(options), Cell)
    setting = QUICK if options.quick else SETTINGS[options.device]
    effort = Effort(1 if options.quick else options.rounds, options.threads)
    if options.model is None:
        run(list(random_cells(setting, options)), table, effort, ignored=0.0)
    else:
        with tempfile.TemporaryDirectory() as folder:
            states = Path(folder) / "states.safetensors"
            with Apart() as process:
                given = options.model, options.pairs, REAL_PAIRS, states
                shape = process.call(write_states, *given)
            cells = list(real_cells(shape, setting, options))
            run(cells, table, replace(effort, states=states), shape.ignored)
    if path is not None and options.model is None:
        draw(path, "memory_mib")


if __name__ == "__main__":
    main()
