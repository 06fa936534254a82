"""Time and memory of this checkout's `linear_spo_loss` against those of another checkout.

    python -m benchmarks.compare_versions ../base                 results/compare_<commit>.csv
    python -m benchmarks.compare_versions ../base --shapes 4x256 --heads frozen --rounds 5

Each version has one process for all repetitions of a cell, and these take turns: a round is this
version, the other, the other, this one. A round gives one ratio, in which a slow drift of the
machine cancels; the median over the rounds and their quartiles are reported. Memory is the growth
of a fresh process's peak over what it held before the call, gradients included, as a median of
several processes. Cells that are not measured again keep their rows in the file.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.apart import Apart
from benchmarks.csv_file import update
from benchmarks.fused_worker import Cell, growth_mib, set_up, timed, use_checkout
from benchmarks.machine import describe

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
WAY = "spoloss_spo"
SHAPES = ("16x64", "4x256", "2x1024")
WIDTH, VOCAB = 512, 32_000
HEADS = ("trained", "frozen")
LEAST_ROUNDS = 5
MEMORY_PROCESSES = 3


@dataclass(frozen=True)
class Row:
    """One cell: this version over the other one, medians over the rounds and over the processes."""

    pairs: int
    tokens: int
    width: int
    vocab: int
    dtype: str
    frozen: bool
    threads: int
    rounds: int
    time_ratio: float
    time_ratio_low: float
    time_ratio_high: float
    seconds: float
    other_seconds: float
    memory_ratio: float
    memory_mib: float
    other_memory_mib: float
    others: float


KEY = ("pairs", "tokens", "width", "vocab", "dtype", "frozen", "threads")
"""The columns that tell what a row is about."""


def measure(cell: Cell, checkouts: Sequence[Path], rounds: int, threads: int) -> Row:
    """Compare the two checkouts on one cell, this one first."""
    memory = [_growth(cell, checkout, threads) for checkout in checkouts]
    with Apart() as this, Apart() as other:
        for process, checkout in zip((this, other), checkouts, strict=True):
            process.call(use_checkout, checkout)
            process.call(set_up, cell, threads)
            process.call(timed)  # the first call is slower
        turns = (this, other, other, this)
        found = [[process.call(timed) for process in turns] for _ in range(rounds)]
    ratios = [(a.seconds + d.seconds) / (b.seconds + c.seconds) for a, b, c, d in found]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Row(
        cell.pairs,
        cell.tokens,
        cell.width,
        cell.vocab,
        cell.dtype,
        cell.frozen,
        threads,
        rounds,
        middle,
        low,
        high,
        statistics.median(turn.seconds for a, _, _, d in found for turn in (a, d)),
        statistics.median(turn.seconds for _, b, c, _ in found for turn in (b, c)),
        memory[0] / memory[1],
        *memory,
        statistics.median(turn.others for turns in found for turn in turns),
    )


def _growth(cell: Cell, checkout: Path, threads: int) -> float:
    """The median growth of peak memory over some fresh processes, MiB."""
    found = []
    for _ in range(MEMORY_PROCESSES):
        with Apart() as process:
            process.call(use_checkout, checkout)
            process.call(set_up, cell, threads)
            found.append(process.call(growth_mib))
    if None in found:
        raise SystemExit("memory: expected a system with /proc, which keeps a process's peak")
    return statistics.median(found)


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, with -dirty after it where the package has changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    dirty = git("status", "--porcelain", "--", "spoloss")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Compare cell by cell; each is printed and written as soon as it is complete."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("other", type=Path, help="the other checkout")
    add("--shapes", nargs="+", default=SHAPES, metavar="PxT", help="pairs x tokens, such as 4x256")
    add("--heads", nargs="+", choices=HEADS, default=HEADS, help="default: both")
    add("--rounds", type=int, default=2 * LEAST_ROUNDS, help=f"default: {2 * LEAST_ROUNDS}")
    add("--threads", type=int, default=1, help="of the CPU; default: 1, the firmest")
    add("--output", type=Path, default=RESULTS, help=f"a folder; default: {RESULTS.name}")
    options = parser.parse_args(argv)
    if options.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds: expected at least {LEAST_ROUNDS}, got {options.rounds}")
    checkouts = [ROOT, options.other.resolve()]
    this, other = map(commit_of, checkouts)
    title = f"{this} over {other}, {describe('torch')}"
    print(title)
    for shape in options.shapes:
        for head in options.heads:
            pairs, tokens = map(int, shape.split("x"))
            cell = Cell(WAY, pairs, tokens, WIDTH, VOCAB, "float32", "cpu", head == "frozen")
            row = measure(cell, checkouts, options.rounds, options.threads)
            spread = f"{row.time_ratio_low:.3f} to {row.time_ratio_high:.3f}"
            memory = f"{row.memory_mib:.0f} / {row.other_memory_mib:.0f} MiB"
            print(
                f"{shape:>7} {head:<8} time {row.time_ratio:.3f} ({spread}), "
                f"memory {row.memory_ratio:.3f} ({memory}), others {row.others:.0%}",
                flush=True,
            )
            update(options.output / f"compare_{other}.csv", title, [asdict(row)], KEY)


if __name__ == "__main__":
    main()
