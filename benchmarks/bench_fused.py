"""Time and memory from hidden states to a preference loss and its gradients, way by way.

    python -m benchmarks.bench_fused                     the table, results/fused_cpu.csv and .png
    python -m benchmarks.bench_fused --quick             one tiny shape, the table alone
    python -m benchmarks.bench_fused --device cuda       the head of Qwen2.5-7B in bfloat16

Every measurement is a fresh process: it warms up, then times forward and backward together, three
times and for five seconds at least, and keeps the fastest repetition, as timeit does. The ways take
turns, and a round gives one ratio per way: medians over the rounds are quoted, since absolute times
drift on any shared machine. Memory is the growth of the process's peak over what it held before the
first full call, gradients included. The error is the largest of loss and gradients against full
logits in float64. A row says so where other processes were at work during a measurement: then
measure again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.fused_ways import (
    FLOOR,
    FLOOR_ROWS,
    FULL,
    IGNORING_WAYS,
    WAYS,
    Problem,
    Step,
    UnavailableError,
    floor,
    make_problem,
    max_error,
)
from benchmarks.machine import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PEERS = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "spoloss")
IGNORED_SHARE = 0.6
REPETITIONS, LEAST_SECONDS = 3, 5.0
CHECK_FLOP = {"cpu": 1e12, "cuda": 1e15}
"""Up to this many floating-point operations, a solution is checked against float64."""


@dataclass(frozen=True)
class Cell:
    """One measurement: a way, on a shape, with a trained or a frozen head."""

    way: str
    pairs: int
    tokens: int
    width: int
    vocab: int
    dtype: str
    device: str
    frozen: bool
    ignored: float = 0.0
    check: bool = False


@dataclass(frozen=True)
class Measured:
    """What a cell found.

    Attributes:
      seconds: of each repetition.
      memory_mib: growth of peak memory; None where nobody keeps it.
      error: against float64; None where that was not computed.
      others: the share of the processor that other processes took meanwhile.
      note: what its row in the table should say.
      missing: why nothing was found, where nothing was.
    """

    seconds: list[float] = field(default_factory=list)
    memory_mib: float | None = None
    error: float | None = None
    others: float = 0.0
    note: str = ""
    missing: str = ""

    @property
    def fastest(self) -> float:
        """Seconds of the fastest repetition."""
        return min(self.seconds)


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the rounds; None where there is nothing to say."""

    cell: Cell
    seconds: float | None
    of_floor: float | None
    of_full_logits: float | None
    of_nothing_ignored: float | None
    memory_mib: float | None
    memory_of_full_logits: float | None
    max_error: float | None
    note: str


# ------------------------------------------------------------------------------ inside the process


class HostGauge:
    """Time by the clock, memory by the peak that Linux keeps of a process."""

    def reset(self) -> None:
        """Forget the peak so far, so that growth counts from what is held now."""
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            # What the C library keeps of freed memory would hide that much growth.
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._status("VmRSS")

    def growth_mib(self) -> float | None:
        """The peak since the reset, less what was held then; None where nobody keeps it."""
        peak = self._status("VmHWM")
        return None if peak is None or self._before is None else (peak - self._before) / 1024

    def seconds(self, call: Callable[[], object]) -> float:
        """How long one call takes."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    @staticmethod
    def _status(name: str) -> int | None:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(name):
                    return int(line.split()[1])
        return None


class CardGauge:
    """Time by CUDA's events, memory by PyTorch's allocator."""

    def reset(self) -> None:
        """Forget the peak so far, so that growth counts from what is held now."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def growth_mib(self) -> float:
        """The peak since the reset, less what was held then."""
        return (torch.cuda.max_memory_allocated() - self._before) / 2**20

    def seconds(self, call: Callable[[], object]) -> float:
        """How long one call takes on the card."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def measure(step: Step, problem: Problem, gauge: HostGauge | CardGauge) -> Measured:
    """Warm up, then time a step again and again."""
    # Two labels a row load every library, so that their memory does not count as the loss's.
    step(problem.middle(2))
    problem.clear()
    gauge.reset()
    step(problem)
    seconds: list[float] = []
    before = _processor_seconds()
    while len(seconds) < REPETITIONS or sum(seconds) < LEAST_SECONDS:
        problem.clear()
        seconds.append(gauge.seconds(lambda: step(problem)))
    elapsed, others = (b - a for a, b in zip(before, _processor_seconds(), strict=True))
    return Measured(seconds, gauge.growth_mib(), others=max(0.0, others / elapsed))


def _processor_seconds() -> tuple[float, float]:
    """What the processor's cores had to give since the start, and gave to other processes."""
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return time.perf_counter(), 0.0
    # user, nice, system, idle, iowait, irq, softirq, steal; later columns count twice.
    ticks = [int(number) / os.sysconf("SC_CLK_TCK") for number in line.split()[1:9]]
    return sum(ticks), sum(ticks) - ticks[3] - ticks[4] - time.process_time()


def measure_floor(problem: Problem, gauge: HostGauge | CardGauge) -> Measured:
    """The height of its tiles that is fastest in a first trial, measured as any way is.

    The fastest of full measurements of all heights would have had four times the repetitions.
    """
    count = problem.labels.numel()
    heights = [rows for rows in FLOOR_ROWS if rows is None or rows < count]

    def trial(rows: int | None) -> float:
        step = floor(rows)
        return min(gauge.seconds(lambda: step(problem)) for _ in range(2))

    trial(heights[0])  # the first products of a process are slow
    rows = min(heights, key=trial)
    measured = measure(floor(rows), problem, gauge)
    return replace(measured, note=f"tiles of {rows or 'all'} rows")


def run_cell(cell: Cell) -> Measured:
    """Measure one way in this process, and check what it computes."""
    way = WAYS[cell.way]
    gauge = CardGauge() if cell.device == "cuda" else HostGauge()
    try:
        step = way.load()
    except UnavailableError as error:
        return Measured(missing=f"cannot run here: {error}")
    except ModuleNotFoundError as error:
        return Measured(missing=f"not installed: {error}")
    problem = make_problem(
        cell.pairs,
        cell.tokens,
        cell.width,
        cell.vocab,
        dtype=getattr(torch, cell.dtype),
        device=cell.device,
        frozen=cell.frozen,
        ignored=cell.ignored,
    )
    if cell.way == FLOOR:
        return measure_floor(problem, gauge)
    if not way.takes_reference:
        problem = problem.without_reference()
    measured = replace(measure(step, problem, gauge), note=way.note)
    if not cell.check:
        return measured
    problem.clear()
    loss = step(problem).item()
    return replace(measured, error=max_error(problem, loss, way.formula))


# ------------------------------------------------------------------------- from processes to rows


def run_apart(cell: Cell) -> Measured:
    """Measure a cell in a process of its own; if that dies, the measurement is missing."""
    command = [sys.executable, "-m", "benchmarks.bench_fused", "--cell", json.dumps(asdict(cell))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode < 0:
        return Measured(missing=f"killed by signal {-done.returncode}")
    if done.returncode > 0:
        return Measured(missing=f"failed: {done.stderr.strip().splitlines()[-1][:200]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def run_group(cells: Sequence[Cell], rounds: int) -> list[Row]:
    """Measure cells in turn, round after round; odd rounds run backwards, so none is always last.

    The first round also checks the solutions, where float64 is not too slow.
    """
    found: dict[Cell, list[Measured]] = {cell: [] for cell in cells}
    for turn in range(rounds):
        for cell in cells[:: -1 if turn % 2 else 1]:
            flop = 16 * cell.pairs * cell.tokens * cell.width * cell.vocab
            check = turn == 0 and flop <= CHECK_FLOP[cell.device]
            measured = run_apart(replace(cell, check=check))
            found[cell].append(measured)
            took = [measured.missing] if measured.missing else [f"{measured.fastest:.3f} s"]
            what = ", ".join(took + _disturbed([measured]))
            print(f"round {turn + 1}/{rounds}: {_title(cell)}: {cell.way}: {what}", file=sys.stderr)
    return [_row(cell, found) for cell in cells]


def _row(cell: Cell, found: dict[Cell, list[Measured]]) -> Row:
    mine = found[cell]
    good = [measured for measured in mine if not measured.missing]
    bad = [measured.missing for measured in mine if measured.missing]

    def time_of(other: Cell) -> float | None:
        return _median_ratio(mine, found.get(other, []), "fastest")

    full = replace(cell, way=FULL)
    return Row(
        cell,
        seconds=_median([measured.fastest for measured in good]),
        of_floor=time_of(replace(cell, way=FLOOR)),
        of_full_logits=time_of(full),
        of_nothing_ignored=time_of(replace(cell, ignored=0.0)) if cell.ignored else None,
        memory_mib=_median([m.memory_mib for m in good if m.memory_mib is not None]),
        memory_of_full_logits=_median_ratio(mine, found.get(full, []), "memory_mib"),
        max_error=mine[0].error,
        note="; ".join(dict.fromkeys([m.note for m in good if m.note] + bad + _disturbed(good))),
    )


def _disturbed(measured: Sequence[Measured]) -> list[str]:
    # Threads that wait for each other pay for a neighbour many times over: say so.
    others = max((m.others for m in measured), default=0.0)
    return [f"other processes took {others:.0%} of the cores"] if others > 0.05 else []


def _median_ratio(ours: list[Measured], others: list[Measured], name: str) -> float | None:
    pairs = [
        (getattr(a, name), getattr(b, name))
        for a, b in zip(ours, others, strict=False)
        if not (a.missing or b.missing)
    ]
    return _median([a / b for a, b in pairs if a is not None and b])


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


# --------------------------------------------------------------------------------- what it leaves

COLUMNS = {
    "seconds": ("seconds", "{:.3f}"),
    "of_floor": ("x floor", "{:.2f}"),
    "of_full_logits": ("x full logits", "{:.2f}"),
    "of_nothing_ignored": ("x none ignored", "{:.2f}"),
    "memory_mib": ("MiB", "{:.0f}"),
    "memory_of_full_logits": ("MiB x full logits", "{:.3f}"),
    "max_error": ("max error", "{:.0e}"),
}


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows of one group, at once: a run is long and may be watched through a pipe."""
    for title in dict.fromkeys(_title(row.cell) for row in rows):
        heads = "".join(f"{head:>{len(head) + 2}}" for head, _ in COLUMNS.values())
        print(f"\n{title}\n{'':<24}{heads}  note")
        for row in rows:
            if _title(row.cell) == title:
                print(f"{row.cell.way:<24}{_numbers(row)}  {row.note}".rstrip(), flush=True)


def _numbers(row: Row) -> str:
    texts = []
    for name, (head, form) in COLUMNS.items():
        value = getattr(row, name)
        texts.append(f"{'-' if value is None else form.format(value):>{len(head) + 2}}")
    return "".join(texts)


def _title(cell: Cell) -> str:
    head = "frozen" if cell.frozen else "trained"
    ignored = f", {cell.ignored:.0%} of the labels ignored" if cell.ignored else ""
    size = f"D = {cell.width}, V = {cell.vocab}, {cell.dtype}"
    return f"{cell.pairs} pairs of 2 x {cell.tokens} tokens, {size}, head {head}{ignored}"


def write_csv(rows: Sequence[Row], machine: str, path: Path) -> None:
    """Write all rows, after a comment that says where they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {machine}\n")
        names = [field.name for field in fields(Cell) if field.name != "check"]
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, *COLUMNS, "note"])
        for row in rows:
            numbers = [getattr(row, name) for name in COLUMNS]
            texts = ["" if number is None else f"{number:.4g}" for number in numbers]
            writer.writerow([*(getattr(row.cell, name) for name in names), *texts, row.note])


def draw(rows: Sequence[Row], machine: str, path: Path) -> None:
    """Draw time over the floor and memory, one pair of panels per head."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        print(f"no picture: {error}", file=sys.stderr)
        return
    heads = list(dict.fromkeys(row.cell.frozen for row in rows))
    figure = Figure(figsize=(16, 1 + 4.5 * len(heads)), layout="constrained")
    figure.suptitle(f"Hidden states to loss and gradients\n{machine}", fontsize=9)
    for frozen, panels in zip(heads, figure.subplots(len(heads), 2, squeeze=False), strict=True):
        part = [row for row in rows if row.cell.frozen == frozen and row.cell.way != FLOOR]
        head = "head frozen" if frozen else "head trained"
        draw_panel(panels[0], part, "of_floor", f"time, x the matrix products alone, {head}")
        panels[0].axhline(1, color="black", linewidth=0.8, linestyle=":")
        draw_panel(panels[1], part, "memory_mib", f"growth of peak memory, MiB, {head}")
        panels[1].set_yscale("log")
    labelled = [axes.get_legend_handles_labels() for axes in figure.axes]
    ways = {label: bars for some in labelled for bars, label in zip(*some, strict=True)}
    figure.legend(ways.values(), ways.keys(), loc="outside lower center", ncols=len(WAYS))
    FigureCanvasAgg(figure).print_png(path)


def draw_panel(axes: Axes, rows: Sequence[Row], name: str, label: str) -> None:
    """Draw one quantity: a group of bars per shape, a colour per way."""
    bars: dict[str, list[tuple[int, float]]] = {}
    groups = list(dict.fromkeys(_group(row.cell) for row in rows))
    for row in rows:
        if getattr(row, name) is not None:
            place = groups.index(_group(row.cell))
            bars.setdefault(row.cell.way, []).append((place, getattr(row, name)))
    width = 0.8 / max(1, len(bars))
    for i, (way, places) in enumerate(bars.items()):
        x = [place + (i - (len(bars) - 1) / 2) * width for place, _ in places]
        heights = [height for _, height in places]
        drawn = axes.bar(x, heights, width, label=way, color=WAYS[way].color)
        labels = [f"{h:.0f}" if h >= 100 else f"{h:.3g}" for _, h in places]
        axes.bar_label(drawn, labels, rotation=90, padding=2, fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.15)
    axes.set_ylabel(label)


def _group(cell: Cell) -> str:
    ignored = f"\n{cell.ignored:.0%} ignored" if cell.ignored else ""
    return f"{cell.pairs} x {cell.tokens}{ignored}"


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
    """The cells to measure; a group is what shares a shape and a head, and takes turns."""
    scale = SCALES["quick" if options.quick else options.device]
    return [
        _group_cells(scale, shape, head == "frozen", options)
        for shape in options.shapes or scale.shapes
        for head in options.heads
    ]


def _group_cells(scale: Scale, shape: str, frozen: bool, options: argparse.Namespace) -> list[Cell]:
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
    add("--quick", action="store_true", help="one tiny shape, one round; no files without --output")
    add("--shapes", nargs="+", metavar="PxT", help="pairs x tokens, such as 4x256 2x1024")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    heads = ("trained", "frozen")
    add("--heads", nargs="+", choices=heads, default=heads, help="default: both")
    add("--rounds", type=int, help="default: 3")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add(
        "--output", type=Path, help=f"a folder for CSV and PNG; default: {RESULTS.name} beside this"
    )
    add("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, got none")
    if options.output is None and not options.quick:
        options.output = RESULTS
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure group after group; each is printed and written as soon as it is complete."""
    options = parse_options(argv)
    if options.cell is not None:
        print(json.dumps(asdict(run_cell(Cell(**json.loads(options.cell))))))
        return
    rows: list[Row] = []
    machine = describe(*PEERS)
    if options.device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    print(machine)
    for cells in make_groups(options):
        group = run_group(cells, options.rounds)
        rows += group
        print_table(group)
        if options.output is not None:
            path = options.output / f"fused_{options.device}.csv"
            write_csv(rows, machine, path)
            draw(rows, machine, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
