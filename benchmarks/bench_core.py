"""What the package costs over the formula typed by hand, and what importing it costs.

    python -m benchmarks.bench_core            prints the table
    python -m benchmarks.bench_core --save     also writes benchmarks/results/core.csv

Both ways run in turn in one process, and each round gives one ratio and one difference: their
medians are quoted, since absolute times drift on any shared machine.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import describe
from spoloss import dpo_loss, spo_loss

RESULTS = Path(__file__).parent / "results" / "core.csv"
BETA = 0.1


@dataclass(frozen=True)
class Row:
    """One comparison: medians over rounds, in microseconds (imports: milliseconds)."""

    what: str
    ours: float
    other: float
    ratio: float
    difference: float


def spo_by_hand(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor) -> Tensor:
    """Equation 6 as one types it."""
    x = BETA * ((pc - pr) - (rc - rr))
    return (-x * torch.exp(-x)).mean()


def dpo_by_hand(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor) -> Tensor:
    """DPO as one types it."""
    x = BETA * ((pc - pr) - (rc - rr))
    return -torch.nn.functional.logsigmoid(x).mean()


def compare(
    what: str, ours: Callable[[], object], other: Callable[[], object], rounds: int, calls: int
) -> Row:
    """Time two calls in turn, `rounds` times `calls` each, after a warm-up round."""
    times = [(_microseconds(ours, calls), _microseconds(other, calls)) for _ in range(rounds + 1)]
    return _row(what, times[1:])


def _microseconds(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls * 1e6


def _row(what: str, times: list[tuple[float, float]]) -> Row:
    return Row(
        what,
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(a / b for a, b in times),
        statistics.median(a - b for a, b in times),
    )


def loss_rows(rounds: int) -> list[Row]:
    """SPO and DPO at two batch sizes, forward alone and with backward."""
    rows = []
    for size, calls in ((64, 500), (65_536, 60)):
        torch.manual_seed(0)
        logps = [torch.randn(size) * 5.0 - 50.0 for _ in range(4)]
        logps = [logp.requires_grad_(i < 2) for i, logp in enumerate(logps)]
        for name, loss, by_hand in (
            ("SPO", spo_loss, spo_by_hand),
            ("DPO", dpo_loss, dpo_by_hand),
        ):
            forward = [partial(f, *logps) for f in (loss, by_hand)]
            both = [partial(_with_backward, f, logps) for f in (loss, by_hand)]
            rows.append(compare(f"{name} forward, B = {size}, µs", *forward, rounds, calls))
            rows.append(compare(f"{name} forward + backward, B = {size}, µs", *both, rounds, calls))
    return rows


def _with_backward(loss: Callable[..., Tensor], logps: list[Tensor]) -> None:
    torch.autograd.grad(loss(*logps), logps[:2])


def import_row(rounds: int) -> Row:
    """`import spoloss` against `import numpy`, each in a fresh interpreter, in milliseconds."""
    pairs = [(_import_ms("spoloss"), _import_ms("numpy")) for _ in range(rounds + 1)]
    return _row("import spoloss against numpy, ms", pairs[1:])


def _import_ms(module: str) -> float:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout) * 1e3


def main() -> None:
    """Run all comparisons, print them, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help="rounds per comparison")
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name}")
    arguments = parser.parse_args()
    machine = describe("torch", "numpy", "spoloss")
    rows = [*loss_rows(arguments.rounds), import_row(arguments.rounds)]
    print(machine)
    print(f"{'':45}{'spoloss':>10}{'by hand':>10}{'ratio':>8}{'more':>9}")
    for row in rows:
        print(
            f"{row.what:45}{row.ours:10.1f}{row.other:10.1f}{row.ratio:8.2f}{row.difference:9.1f}"
        )
    if arguments.save:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as file:
            file.write(f"# {machine}\n")
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(
                {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(row).items()}
                for row in rows
            )


if __name__ == "__main__":
    main()
