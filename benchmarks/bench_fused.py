"""Time and memory from hidden states to a preference loss and its gradients, way by way.

    python -m benchmarks.bench_fused                     the table and results/fused_cpu.csv
    python -m benchmarks.bench_fused --quick             one tiny shape, the table alone
    python -m benchmarks.bench_fused --device cuda       the head of Qwen2.5-7B in bfloat16
    python -m benchmarks.bench_fused --real-head FILE    a real head, results/fused_real_cpu.csv
    python -m benchmarks.figure_fused                    draws a result file

Each way has a process of its own, which warms up and then repeats forward and backward. The bare
matrix products, the floor, have one more, and the two take turns: floor, way, way, floor. So each
repetition gives a ratio to a repetition of the floor beside it, in which the drift of a shared
machine cancels. The median of at least five ratios is reported, with quartiles; the floor itself is
measured as a way as well, which shows the noise. Memory is the growth of a fresh process's peak
over what it held before the first full call, gradients included, as a median of several processes.
The error is the largest of loss and gradients against full logits in float64.

By default the CPU uses one thread, since processor time is disturbed the least by other processes.
With `--threads` the clock decides, so the machine must be quiet. Results of further shapes, heads
and ways are added to the file as long as machine and versions are the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.apart import Apart
from benchmarks.csv_file import update
from benchmarks.fused_table import KEY, Found, Row, Turn, make_rows, print_table, title_of
from benchmarks.fused_ways import FLOOR, IGNORING_WAYS, WAYS, UnavailableError
from benchmarks.fused_worker import Cell, error, growth_mib, set_up, timed
from benchmarks.machine import describe
from benchmarks.real_head import RealHead

RESULTS = Path(__file__).parent / "results"
PEERS = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "spoloss")
IGNORED_SHARE = 0.6
LEAST_ROUNDS = 5
PROCESSES = 3
CHECK_FLOP = {"cpu": 3e11, "cuda": 1e15}
"""Up to this many floating-point operations, a solution is checked against float64."""


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds of turns, fresh processes for memory, threads of the CPU."""

    rounds: int
    processes: int
    threads: int


# ------------------------------------------------------------------------------------ measuring


def measure_group(cells: Sequence[Cell], effort: Effort) -> list[Row]:
    """Measure cells that share a shape and a head, each beside the same floor."""
    beside = replace(cells[0], way=FLOOR)
    found: dict[Cell, Found] = {}
    with Apart() as floor:
        floor.call(set_up, beside, effort.threads)
        floor.call(timed)
        for cell in cells:
            found[cell] = _measured(cell, floor, effort)
            what = found[cell].missing or f"{found[cell].of_floor():.3f} x floor"
            print(f"{title_of(cell)}: {cell.way}: {what}", file=sys.stderr, flush=True)
    return make_rows(found, beside)


def _measured(cell: Cell, floor: Apart, effort: Effort) -> Found:
    """What a cell gives; a peer that fails in whatever way leaves a row that says so."""
    try:
        return _measure(cell, floor, effort)
    except UnavailableError as problem:
        return Found(missing=f"cannot run here: {problem}")
    except ModuleNotFoundError as problem:
        return Found(missing=f"not installed: {problem}")
    except BrokenProcessPool:
        return Found(missing="its process died")
    except Exception as problem:
        return Found(missing=f"failed: {str(problem).splitlines()[0][:200]}")


def _measure(cell: Cell, floor: Apart, effort: Effort) -> Found:
    memory, turns = [], []
    for last in [*[False] * (effort.processes - 1), True]:
        with Apart() as way:
            note = way.call(set_up, cell, effort.threads)
            memory.append(way.call(growth_mib))  # warms up as well
            if not last:
                continue
            for turn in range(effort.rounds):
                order = (floor, way) if turn % 2 == 0 else (way, floor)
                took = {process: process.call(timed) for process in order}
                turns.append(Turn(took[way], took[floor]))
            flop = 16 * cell.pairs * cell.tokens * cell.width * cell.vocab
            check = cell.way != FLOOR and flop <= CHECK_FLOP[cell.device]
            wrong = way.call(error) if check else None
    return Found(turns, [mib for mib in memory if mib is not None], wrong, note)


# ----------------------------------------------------------------------------------- what to run


@dataclass(frozen=True)
class Scale:
    """A set of shapes, P x T, with the model's width and vocabulary; `ignoring` runs masked too."""

    width: int
    vocab: int
    dtype: str
    shapes: tuple[str, ...]
    ignoring: str


SCALES = {
    "cpu": Scale(512, 32_000, "float32", ("16x64", "4x256", "2x1024", "1x4096"), "2x1024"),
    "cuda": Scale(3_584, 152_064, "bfloat16", ("4x2048",), "4x2048"),
    "quick": Scale(64, 1_000, "float32", ("4x64",), "4x64"),
}


def make_groups(options: argparse.Namespace) -> list[list[Cell]]:
    """The cells to measure; a group is what shares a problem but for ignored labels, and a head."""
    heads = [head == "frozen" for head in options.heads]
    if options.real_head is not None:
        return [_real_cells(options.real_head, frozen, options) for frozen in heads]
    scale = SCALES["quick" if options.quick else options.device]
    return [
        _random_cells(scale, shape, frozen, options)
        for shape in options.shapes or scale.shapes
        for frozen in heads
    ]


def _real_cells(path: Path, frozen: bool, options: argparse.Namespace) -> list[Cell]:
    head = RealHead.load(path)
    (rows, tokens), (vocab, width) = head.labels.shape, head.weight().shape
    size = (rows // 2, tokens, width, vocab, "float32", options.device, frozen, head.ignored)
    return [Cell(way, *size, str(path.resolve())) for way in options.ways]


def _random_cells(
    scale: Scale, shape: str, frozen: bool, options: argparse.Namespace
) -> list[Cell]:
    try:
        pairs, tokens = map(int, shape.split("x"))
    except ValueError:
        raise SystemExit(f"--shapes: expected pairs x tokens such as 4x256, got {shape}") from None
    size = (pairs, tokens, scale.width, scale.vocab, scale.dtype, options.device, frozen)
    cells = [Cell(way, *size) for way in options.ways]
    if shape == scale.ignoring:
        cells += [
            Cell(way, *size, ignored=IGNORED_SHARE) for way in options.ways if way in IGNORING_WAYS
        ]
    return cells


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one tiny shape, one round; no file without --output")
    add("--shapes", nargs="+", metavar="PxT", help="pairs x tokens, such as 4x256 2x1024")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    heads = ("trained", "frozen")
    add("--heads", nargs="+", choices=heads, default=heads, help="default: both")
    add("--real-head", type=Path, metavar="FILE", help="a file of benchmarks.real_head")
    add("--rounds", type=int, help=f"default: {LEAST_ROUNDS}")
    add("--processes", type=int, help=f"fresh ones for memory; default: {PROCESSES}")
    add("--threads", type=int, default=1, help="of the CPU; default: 1")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--output", type=Path, help=f"a folder for the CSV; default: {RESULTS.name} beside this")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (1 if options.quick else LEAST_ROUNDS)
    options.processes = options.processes or (1 if options.quick else PROCESSES)
    for name in ("rounds", "processes", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, got none")
    if options.output is None and not options.quick:
        options.output = RESULTS
    return options


def machine_of(options: argparse.Namespace) -> str:
    """The first line of a result file."""
    parts = [describe(*PEERS)]
    if options.device == "cuda":
        parts.insert(0, torch.cuda.get_device_name())
    else:
        parts.append("1 thread" if options.threads == 1 else f"{options.threads} threads")
    if options.real_head is not None:
        parts.append(f"head of {RealHead.load(options.real_head).name}")
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure group after group; each is printed and written as soon as it is complete."""
    options = parse_options(argv)
    effort = Effort(options.rounds, options.processes, options.threads)
    machine = machine_of(options)
    print(machine)
    for cells in make_groups(options):
        rows = measure_group(cells, effort)
        print_table(rows)
        if options.output is not None:
            name = "fused" if options.real_head is None else "fused_real"
            path = options.output / f"{name}_{options.device}.csv"
            update(path, machine, [row.as_dict() for row in rows], KEY)


if __name__ == "__main__":
    main()
