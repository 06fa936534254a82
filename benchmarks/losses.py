"""What the losses cost over the formula typed by hand, and what `import spoloss` costs.

    python -m benchmarks.losses            results/core.csv
    python -m benchmarks.losses --quick    two rounds; the table alone

The two ways run in turn in one process, and each round gives a ratio and a difference. The medians
are quoted, since absolute times drift on any shared machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.record import RESULTS, Others, Table, machine
from spoloss import dpo_loss, spo_loss

BETA = 0.1
ROUNDS = 25
CALLS = {64: 500, 65_536: 60}
"""Calls of a round, by the number of pairs."""


@dataclass(frozen=True)
class Cell:
    """One comparison."""

    what: str


def spo_by_hand(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor) -> Tensor:
    """Equation 6 as one types it."""
    x = BETA * ((pc - pr) - (rc - rr))
    return (-x * torch.exp(-x)).mean()


def dpo_by_hand(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor) -> Tensor:
    """DPO as one types it."""
    x = BETA * ((pc - pr) - (rc - rr))
    return -torch.nn.functional.logsigmoid(x).mean()


LOSSES = {"SPO": (spo_loss, spo_by_hand), "DPO": (dpo_loss, dpo_by_hand)}
Turns = tuple[Callable[[], float], Callable[[], float]]
"""Two functions that return the time of one turn of either way."""


def comparisons() -> dict[Cell, Turns]:
    """Every loss at two batch sizes, forward alone and with backward, in µs; the import, in ms."""
    found: dict[Cell, Turns] = {}
    for size, calls in CALLS.items():
        torch.manual_seed(0)
        logps = [torch.randn(size) * 5.0 - 50.0 for _ in range(4)]
        logps = [logp.requires_grad_(i < 2) for i, logp in enumerate(logps)]
        for name, (loss, by_hand) in LOSSES.items():
            ways = partial(loss, beta=BETA), by_hand
            forward, both = (
                tuple(partial(_microseconds, partial(run, way, logps), calls) for way in ways)
                for run in (_forward, _with_backward)
            )
            found[Cell(f"{name} forward, B = {size}, µs")] = forward
            found[Cell(f"{name} forward + backward, B = {size}, µs")] = both
    imports = partial(_import_ms, "spoloss"), partial(_import_ms, "numpy")
    return found | {Cell("import spoloss against numpy, ms"): imports}


def compare(turns: Turns, rounds: int) -> dict[str, float]:
    """The medians over rounds, in which the two ways take turns, after a round that warms up."""
    ours, other = turns
    with Others() as others:
        times = [(ours(), other()) for _ in range(rounds + 1)][1:]
    return {
        "ours": statistics.median(a for a, _ in times),
        "other": statistics.median(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
        "difference": statistics.median(a - b for a, b in times),
        "others": others.share,
    }


def _forward(loss: Callable[..., Tensor], logps: list[Tensor]) -> None:
    loss(*logps)


def _with_backward(loss: Callable[..., Tensor], logps: list[Tensor]) -> None:
    torch.autograd.grad(loss(*logps), logps[:2])


def _microseconds(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls * 1e6


def _import_ms(module: str) -> float:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout) * 1e3


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rounds; no file")
    quick = parser.parse_args(argv).quick
    path = None if quick else RESULTS / "core.csv"
    table = Table(path, machine("torch", "numpy", "spoloss"), Cell)
    turns = comparisons()
    for cell in table.todo(list(turns)):
        table.add(cell, **compare(turns[cell], 2 if quick else ROUNDS))


if __name__ == "__main__":
    main()
