"""Time and memory from hidden states to a preference loss and its gradients in JAX, way by way.

    python -m benchmarks.fused_jax            results/fused_jax_cpu.csv and .svg
    python -m benchmarks.fused_jax --quick    a tiny shape, the table alone

All ways of a problem are compiled first and then take turns with the floor, as in
`benchmarks.fused`; the floor is the bare matrix products in tiles, in the fastest of some tilings.
Time is the clock's. Memory is what XLA plans: the temporaries of the compiled program, without its
inputs and outputs. The error is the largest of loss and gradients against float64, where that does
not take long.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figure import draw
from benchmarks.fused_jax_ways import (
    DEFAULT_WAYS,
    WAYS,
    Formula,
    Problem,
    checkpointed_logps,
    floors,
    make_problem,
    mean_loss,
)
from benchmarks.record import RESULTS, Table, machine
from benchmarks.turns import (
    CHECK_FLOP,
    FLOOR,
    HEADS,
    ROUNDS,
    SHAPES,
    Timed,
    check_flop,
    paced,
    sizes,
    summaries,
    take_turns,
    timed,
    together,
)

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "spoloss")
WIDTH, VOCAB = 512, 32_000
MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """What is measured: a way, on a shape, with a trained or a frozen head."""

    way: str
    pairs: int
    tokens: int
    width: int
    vocab: int
    frozen: bool


def gradients_of(loss: Callable[[Problem], Any], *, frozen: bool) -> Callable[[Problem], Any]:
    """Loss and gradients with respect to hidden states and, if it is trained, weight."""
    wanted = ("chosen", "rejected") if frozen else ("chosen", "rejected", "weight")

    def run(problem: Problem) -> Any:
        leaves = {name: getattr(problem, name) for name in wanted}
        return jax.value_and_grad(lambda leaves: loss(problem._replace(**leaves)))(leaves)

    return run


def exact(problem: Problem, formula: Formula, *, frozen: bool) -> Any:
    """The solution in float64, tile by tile."""
    with jax.enable_x64(True):
        wide = problem._replace(
            **{
                name: jnp.asarray(np.asarray(getattr(problem, name)), jnp.float64)
                for name in ("chosen", "rejected", "weight", "reference")
            }
        )
        loss = lambda problem: mean_loss(checkpointed_logps(problem), problem, formula)  # noqa: E731
        return jax.tree.map(np.asarray, jax.jit(gradients_of(loss, frozen=frozen))(wide))


def max_error(got: Any, want: Any) -> float:
    """The maximum over loss and gradients of max|got - want| / max|want|."""
    error = lambda g, w: float(np.abs(np.asarray(g) - w).max() / np.abs(w).max())  # noqa: E731
    return max(jax.tree.leaves(jax.tree.map(error, got, want)))


def repetition(program: Callable[[Problem], Any], problem: Problem) -> Callable[[], Timed]:
    """What runs a program once and says how long it took."""
    return partial(timed, lambda: jax.block_until_ready(program(problem)))


def compiled(function: Callable[[Problem], Any], problem: Problem) -> Any:
    """The program of a function, warmed up."""
    program = jax.jit(function).lower(problem).compile()
    repetition(program, problem)()
    return program


def measure(floor: Cell, names: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """The columns of the rows of one problem and head: the floor's, and those of other ways."""
    size = floor.pairs, floor.tokens, floor.width, floor.vocab
    problem = make_problem(*size)
    tilings = floors(problem.labels.size, frozen=floor.frozen)
    trials = {tiling: compiled(tiling, problem) for tiling in tilings}
    tiling = min(tilings, key=lambda tiling: repetition(trials[tiling], problem)().seconds)
    programs = {FLOOR: trials[tiling]}
    for name in names:
        programs[name] = compiled(gradients_of(WAYS[name].loss, frozen=floor.frozen), problem)
    repeat = {name: repetition(program, problem) for name, program in programs.items()}
    found: dict[str, dict[str, Any]] = dict(
        summaries(take_turns(repeat.pop(FLOOR), repeat, rounds))
    )
    for name, program in programs.items():
        planned = program.memory_analysis()
        found[name]["temp_mib"] = planned.temp_size_in_bytes / MIB
        found[name]["output_mib"] = planned.output_size_in_bytes / MIB
    if check_flop(*size) <= CHECK_FLOP["cpu"]:
        for formula, same in groupby(names, key=lambda name: WAYS[name].formula):
            want = exact(problem, formula, frozen=floor.frozen)
            for name in same:
                found[name]["max_error"] = max_error(programs[name](problem), want)
    found[FLOOR]["note"] = f"tiles of {tiling.rows} tokens, {tiling.blocks} blocks"
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure shape by shape; rows are printed and written as soon as these are complete."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", default=SHAPES, metavar="PxT", help="pairs x tokens, such as 4x256")
    add("--ways", nargs="+", choices=WAYS, default=DEFAULT_WAYS, help=", ".join(WAYS))
    add("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="default: both")
    add("--rounds", type=int, default=ROUNDS, help=f"two ratios each; default: {ROUNDS}")
    add("--quick", action="store_true", help="one tiny shape; no file")
    options = parser.parse_args(argv)
    path = None if options.quick else RESULTS / f"fused_jax_{jax.default_backend()}.csv"
    table = Table(path, machine(*PACKAGES), Cell)
    shapes, size, rounds = options.shapes, (WIDTH, VOCAB), options.rounds
    if options.quick:
        shapes, size, rounds = ("4x128",), (32, 1024), 2
    cells = [
        Cell(way, *sizes(shape), *size, frozen=HEADS[head])
        for shape, head, way in product(shapes, options.heads, (FLOOR, *options.ways))
    ]
    for floor, group in paced(together(table.missing(cells))):
        found = measure(floor, [cell.way for cell in group if cell != floor], rounds)
        for cell in group:
            table.add(cell, **found[cell.way])
    if path is not None:
        draw(path, "temp_mib")


if __name__ == "__main__":
    main()
