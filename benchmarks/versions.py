"""Time and memory of this checkout's `linear_spo_loss` against those of another checkout.

    python -m benchmarks.versions ../base                 results/compare_<commit>.csv
    python -m benchmarks.versions ../base --shapes 4x256 --heads frozen

Each version has one process for all repetitions of a cell, and the two take turns: a repetition of
this version gives a ratio to either repetition of the other beside it, in which a slow drift of the
machine cancels. The median of the ratios and their quartiles are reported. Memory is the growth of
a fresh process's peak over what it held before the call, gradients included, as a median of several
processes. The other checkout needs version 0.3 or later.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.fused_worker import Apart, Cell, growth_mib, set_up, timed, use_checkout
from benchmarks.record import RESULTS, Table, machine
from benchmarks.turns import HEADS, ROUNDS, SHAPES, sizes, summaries, take_turns

ROOT = Path(__file__).parents[1]
SIZE = (512, 32_000, "float32", "cpu")
MEMORY_PROCESSES = 3


@dataclass(frozen=True)
class VersionCell(Cell):
    """What is compared, on so many threads."""

    threads: int


def measure(cell: VersionCell, checkouts: Sequence[Path], rounds: int) -> dict[str, float]:
    """Compare the two checkouts on one cell, this one first."""
    memory = [_growth(cell, checkout) for checkout in checkouts]
    with Apart() as this, Apart() as other:
        for process, checkout in zip((this, other), checkouts, strict=True):
            process.call(use_checkout, checkout)
            process.call(set_up, cell, cell.threads)
            process.call(timed)  # the first call is slower
        ways = {cell.way: partial(this.call, timed)}
        found = summaries(take_turns(partial(other.call, timed), ways, rounds))[cell.way]
    low, middle, high = (found.pop(f"of_floor{end}") for end in ("_low", "", "_high"))
    return found | {
        "time_ratio": middle,
        "time_ratio_low": low,
        "time_ratio_high": high,
        "memory_ratio": memory[0] / memory[1],
        "memory_mib": memory[0],
        "other_memory_mib": memory[1],
    }


def _growth(cell: VersionCell, checkout: Path) -> float:
    """The median growth of peak memory over some fresh processes, MiB."""
    found = []
    for _ in range(MEMORY_PROCESSES):
        with Apart() as process:
            process.call(use_checkout, checkout)
            process.call(set_up, cell, cell.threads)
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
    add("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="default: both")
    add("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    add("--threads", type=int, default=1, help="of the CPU; default: 1, the firmest")
    add("--output", type=Path, default=RESULTS, help=f"a folder; default: {RESULTS.name}")
    options = parser.parse_args(argv)
    checkouts = [ROOT, options.other.resolve()]
    this, other = map(commit_of, checkouts)
    title = f"{this} over {other}, {machine('torch')}"
    table = Table(options.output / f"compare_{other}.csv", title, VersionCell)
    cells = [
        VersionCell("spoloss_spo", *sizes(shape), *SIZE, HEADS[head], options.threads)
        for shape, head in product(options.shapes, options.heads)
    ]
    for cell in table.todo(cells):
        table.add(cell, **measure(cell, checkouts, options.rounds))


if __name__ == "__main__":
    main()
