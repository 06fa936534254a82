"""Time and memory from hidden states to a preference loss and its gradients in JAX, way by way.

    python -m benchmarks.fused_jax            results/fused_jax_cpu.csv and .svg
    python -m benchmarks.fused_jax --quick    a tiny shape, the table alone

All ways of a problem are compiled first and then run in turn, round after round, odd rounds
backwards. Right before each way runs the floor, the bare matrix products in tiles (the fastest of
some tilings in a first trial), and a ratio is that of a way to the floor beside it: absolute times
drift on a shared machine. The table has medians over the rounds. Memory is what XLA plans: the
temporaries of the compiled program, without its inputs and outputs. The error is the largest of
loss and gradients against float64. tokamax is left out: 0.0.12, the newest release, reduces over
all tokens, so that it cannot give the log-probability of a sequence.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figure import draw
from benchmarks.fused_jax_ways import (
    WAYS,
    Problem,
    Way,
    checkpointed_logps,
    floors,
    make_problem,
    mean_loss,
)
from benchmarks.record import RESULTS, Others, Table, machine

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "spoloss")
SHAPES = ("16x64", "4x256", "2x1024", "1x4096")
WIDTH, VOCAB, ROUNDS = 512, 32_000, 15
FLOOR, SPO_WAY = "matmul_floor", "spoloss_spo"
MIB = 2**20
HEADS = {"trained": False, "frozen": True}


@dataclass(frozen=True)
class Cell:
    """What is measured: a way, on a shape, with a trained or a frozen head."""

    way: str
    pairs: int
    tokens: int
    width: int
    vocab: int
    frozen: bool


def gradients_of(way: Way, *, frozen: bool) -> Callable[[Problem], Any]:
    """Loss and gradients of a way, by hidden states and, if it is trained, weight."""
    wanted = ("chosen", "rejected") if frozen else ("chosen", "rejected", "weight")

    def run(problem: Problem) -> Any:
        by = {name: getattr(problem, name) for name in wanted}
        return jax.value_and_grad(lambda by: way(problem._replace(**by)))(by)

    return run


def exact(problem: Problem, *, frozen: bool) -> Any:
    """The solution in float64, tile by tile."""
    with jax.enable_x64(True):
        wide = problem._replace(
            **{
                name: jnp.asarray(np.asarray(getattr(problem, name)), jnp.float64)
                for name in ("chosen", "rejected", "weight", "reference")
            }
        )
        way = lambda problem: mean_loss(checkpointed_logps(problem), problem)  # noqa: E731
        return jax.tree.map(np.asarray, jax.jit(gradients_of(way, frozen=frozen))(wide))


def max_error(got: Any, want: Any) -> float:
    """The maximum over loss and gradients of max|got - want| / max|want|."""
    error = lambda g, w: float(np.abs(np.asarray(g) - w).max() / np.abs(w).max())  # noqa: E731
    return max(jax.tree.leaves(jax.tree.map(error, got, want)))


def seconds(run: Callable[[Problem], Any], problem: Problem) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    jax.block_until_ready(run(problem))
    return time.perf_counter() - start


def measure(problem: Problem, *, frozen: bool, rounds: int) -> dict[str, dict[str, Any]]:
    """The columns of every way's row, and of the floor's, on one problem."""
    tokens = problem.labels.size

    def compiled(function: Callable[[Problem], Any]) -> Callable[[Problem], Any]:
        program = jax.jit(function).lower(problem).compile()
        seconds(program, problem)  # the first call is slow
        return program

    programs = {name: compiled(gradients_of(way, frozen=frozen)) for name, way in WAYS.items()}
    tilings = {tiling: compiled(tiling) for tiling in floors(tokens, frozen=frozen)}
    trials = {t: min(seconds(p, problem) for _ in range(2)) for t, p in tilings.items()}
    tiling = min(trials, key=trials.__getitem__)
    programs = {FLOOR: tilings[tiling], **programs}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    with Others() as others:
        for turn in range(rounds):
            for name in list(programs)[:: -1 if turn % 2 else 1]:
                beside = seconds(programs[FLOOR], problem)
                turns[name].append((seconds(programs[name], problem), beside))
    want = exact(problem, frozen=frozen)
    found = {}
    for name, program in programs.items():
        checked = name not in (FLOOR, SPO_WAY)  # the exact solution is DPO's
        planned = program.memory_analysis()
        found[name] = {
            "seconds": statistics.median(way for way, _ in turns[name]),
            "of_floor": statistics.median(way / floor for way, floor in turns[name]),
            "temp_mib": planned.temp_size_in_bytes / MIB,
            "output_mib": planned.output_size_in_bytes / MIB,
            "max_error": max_error(program(problem), want) if checked else None,
            "rounds": rounds,
            "others": others.share,
        }
    found[FLOOR]["note"] = f"tiles of {tiling.rows} tokens, {tiling.blocks} blocks"
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="pairs x tokens, as 16x64")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--quick", action="store_true", help="one tiny shape; no file")
    options = parser.parse_args(argv)
    path = None if options.quick else RESULTS / f"fused_jax_{jax.default_backend()}.csv"
    table = Table(path, machine(*PACKAGES), Cell)
    shapes, size, rounds = options.shapes, (WIDTH, VOCAB), options.rounds
    if options.quick:
        shapes, size, rounds = ("4x128",), (32, 1024), 2
    groups = [
        Cell(FLOOR, *map(int, shape.split("x")), *size, frozen=HEADS[head])
        for shape, head in product(shapes, options.heads)
    ]
    for group in table.todo(groups):
        problem = make_problem(group.pairs, group.tokens, group.width, group.vocab)
        found = measure(problem, frozen=group.frozen, rounds=rounds)
        # The floor's row comes last: where it stands, the group is complete.
        for way in (*WAYS, FLOOR):
            table.add(replace(group, way=way), **found[way])
    if path is not None:
        draw(path, "temp_mib")


if __name__ == "__main__":
    main()
