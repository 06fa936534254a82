"""Time and memory from hidden states to a preference loss and its gradients, way by way.

    python -m benchmarks.bench_fused                     the table, results/fused_cpu.csv and .png
    python -m benchmarks.bench_fused --quick             one tiny shape, the table alone
    python -m benchmarks.bench_fused --device cuda       the head of Qwen2.5-7B in bfloat16

Every way has a process of its own, which warms up and waits; then they take turns, each repeating
forward and backward once a round. A round gives one ratio per way, of repetitions that lie seconds
apart: medians over the rounds are quoted, since absolute times drift on any shared machine. (A card
holds one way at a time.) Memory is the growth of the process's peak over what it held before the
first full call, gradients included. The error is the largest of loss and gradients against full
logits in float64. A row says so where other processes were at work during a repetition: then
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
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
MARK = "@"
"""What a process has to say starts with it; libraries may print other lines."""
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

    @property
    def is_checked(self) -> bool:
        """Whether float64 is not too slow for it."""
        flop = 16 * self.pairs * self.tokens * self.width * self.vocab
        return flop <= CHECK_FLOP[self.device]


@dataclass(frozen=True)
class Measured:
    """What a cell found.

    Attributes:
      seconds: of each round.
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


class Stage:
    """A step on a problem, warm, to be repeated."""

    def __init__(self, step: Step, problem: Problem, gauge: HostGauge | CardGauge) -> None:
        self.step, self.problem, self.gauge = step, problem, gauge
        # Two labels a row load every library, so that their memory does not count as the loss's.
        step(problem.middle(2))
        problem.clear()
        gauge.reset()
        step(problem)
        self.seconds: list[float] = []
        self.elapsed = self.others = 0.0

    def repeat(self) -> None:
        """Time the step once more."""
        self.problem.clear()
        before = _processor_seconds()
        self.seconds.append(self.gauge.seconds(lambda: self.step(self.problem)))
        elapsed, others = (b - a for a, b in zip(before, _processor_seconds(), strict=True))
        self.elapsed += elapsed
        self.others += others

    def measured(self) -> Measured:
        """What was found so far."""
        others = max(0.0, self.others / self.elapsed) if self.elapsed else 0.0
        return Measured(self.seconds, self.gauge.growth_mib(), others=others)


def _processor_seconds() -> tuple[float, float]:
    """What the processor's cores had to give since the start, and gave to other processes."""
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return time.perf_counter(), 0.0
    # user, nice, system, idle, iowait, irq, softirq, steal; later columns count twice.
    ticks = [int(number) / os.sysconf("SC_CLK_TCK") for number in line.split()[1:9]]
    return sum(ticks), sum(ticks) - ticks[3] - ticks[4] - time.process_time()


def fastest_floor(problem: Problem, gauge: HostGauge | CardGauge) -> tuple[Step, str]:
    """The floor with the height of its tiles that is fastest in a trial, and a note of it."""
    count = problem.labels.numel()
    heights = [rows for rows in FLOOR_ROWS if rows is None or rows < count]

    def trial(rows: int | None) -> float:
        step = floor(rows)
        return min(gauge.seconds(lambda: step(problem)) for _ in range(2))

    trial(heights[0])  # the first products of a process are slow
    rows = min(heights, key=trial)
    return floor(rows), f"tiles of {rows or 'all'} rows"


def serve(cell: Cell) -> None:
    """Repeat a way in this process, once for each line that comes in; say what was found."""
    way = WAYS[cell.way]
    gauge = CardGauge() if cell.device == "cuda" else HostGauge()
    try:
        step, note = way.load(), way.note
    except UnavailableError as error:
        _say(asdict(Measured(missing=f"cannot run here: {error}")))
        return
    except ModuleNotFoundError as error:
        _say(asdict(Measured(missing=f"not installed: {error}")))
        return
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
        step, note = fastest_floor(problem, gauge)
    if not way.takes_reference:
        problem = problem.without_reference()
    stage = Stage(step, problem, gauge)
    _say("ready")
    for _ in sys.stdin:
        stage.repeat()
        _say(stage.seconds[-1])
    measured = replace(stage.measured(), note=note)
    if cell.is_checked and cell.way != FLOOR:
        problem.clear()
        loss = step(problem).item()
        measured = replace(measured, error=max_error(problem, loss, way.formula))
    _say(asdict(measured))


def _say(what: object) -> None:
    print(f"{MARK}{json.dumps(what)}", flush=True)


# ------------------------------------------------------------------------- from processes to rows


class Worker:
    """A cell in a process of its own."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "benchmarks.bench_fused", "--cell"]
        self._process = subprocess.Popen(
            [*command, json.dumps(asdict(cell))],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._found = self._answer()

    def repeat(self) -> str:
        """Repeat once; what came of it, in words."""
        if isinstance(self._found, Measured):
            return self._found.missing
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("again\n")
            self._process.stdin.flush()
        self._found = self._answer()
        if isinstance(self._found, Measured):
            return self._found.missing
        return f"{self._found:.3f} s"

    def finish(self) -> Measured:
        """End the process: what it measured, or why nothing."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if not isinstance(self._found, Measured):
            self._found = self._answer()
        self._process.wait()
        self._log.close()
        return self._found

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                answer = json.loads(line[len(MARK) :])
                return Measured(**answer) if isinstance(answer, dict) else answer
        status = self._process.wait()
        if status < 0:
            return Measured(missing=f"killed by signal {-status}")
        self._log.seek(0)
        last = (self._log.read().strip().splitlines() or ["no message"])[-1]
        return Measured(missing=f"failed: {last[:200]}")


def run_group(cells: Sequence[Cell], rounds: int) -> list[Row]:
    """Measure cells in turn, round after round; every other round runs backwards."""
    found: dict[Cell, Measured] = {}
    # A card keeps its speed from way to way, but could not hold what all of them hold.
    together = [[cell] for cell in cells] if cells[0].device == "cuda" else [list(cells)]
    for part in together:
        workers = [Worker(cell) for cell in part]
        for turn in range(rounds):
            for worker in workers[:: -1 if turn % 2 else 1]:
                time.sleep(0.1)  # the threads of the last one may spin for a while
                what = f"{_title(worker.cell)}: {worker.cell.way}: {worker.repeat()}"
                print(f"round {turn + 1}/{rounds}: {what}", file=sys.stderr)
        found |= {worker.cell: worker.finish() for worker in workers}
    return [_row(cell, found) for cell in cells]


def _row(cell: Cell, found: dict[Cell, Measured]) -> Row:
    mine = found[cell]
    full = replace(cell, way=FULL)

    def time_of(other: Cell) -> float | None:
        theirs = found.get(other, Measured())
        return _median([a / b for a, b in zip(mine.seconds, theirs.seconds, strict=False)])

    memory, of_full = mine.memory_mib, found.get(full, Measured()).memory_mib
    return Row(
        cell,
        seconds=_median(mine.seconds),
        of_floor=time_of(replace(cell, way=FLOOR)),
        of_full_logits=time_of(full),
        of_nothing_ignored=time_of(replace(cell, ignored=0.0)) if cell.ignored else None,
        memory_mib=memory,
        memory_of_full_logits=memory / of_full if memory is not None and of_full else None,
        max_error=mine.error,
        note="; ".join(filter(None, (mine.note, mine.missing, _disturbed(mine)))),
    )


def _disturbed(measured: Measured) -> str:
    # Threads that wait for each other pay for a neighbour many times over: say so.
    others = measured.others
    return f"other processes took {others:.0%} of the cores" if others > 0.05 else ""


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
        names = [field.name for field in fields(Cell)]
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
    add("--rounds", type=int, help="default: 5")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add(
        "--output", type=Path, help=f"a folder for CSV and PNG; default: {RESULTS.name} beside this"
    )
    add("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds is None:
        options.rounds = 1 if options.quick else 5
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
        serve(Cell(**json.loads(options.cell)))
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
