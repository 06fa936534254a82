"""Time and memory from hidden states to a preference loss and its gradients in JAX, way by way.

    python -m benchmarks.bench_fused_jax                        results/fused_jax_cpu.csv and .png
    python -m benchmarks.bench_fused_jax --shapes 16x64 4x256   some shapes; other rows are kept
    python -m benchmarks.bench_fused_jax --quick                a tiny shape, the table alone

All ways are compiled first and then run in turn, round after round, odd rounds backwards. Right
before each way runs the floor, the bare matrix products in tiles (the fastest of some tilings in a
first trial), and a ratio is that of a way to the floor beside it: absolute times drift on a shared
machine. The table has medians over the rounds. Memory is what XLA plans: the temporaries of the
compiled program, without its inputs and outputs. The error is the largest of loss and gradients
against float64.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.fused_ways_jax import (
    FULL,
    SPO_WAY,
    TOKAMAX,
    WAYS,
    Problem,
    Way,
    checkpointed_logps,
    floors,
    make_problem,
    mean_loss,
)
from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "optax", "tokamax", "numpy", "spoloss")
SHAPES = ("16x64", "4x256", "2x1024", "1x4096")
WIDTH, WORDS = 512, 32_000
FLOOR = "matmul_floor"
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table; None where there is nothing to say."""

    way: str
    pairs: int
    tokens: int
    width: int
    vocab: int
    frozen: bool
    seconds: float | None = None
    of_floor: float | None = None
    of_spoloss: float | None = None
    temp_mib: float | None = None
    temp_of_full_logits: float | None = None
    output_mib: float | None = None
    max_error: float | None = None
    note: str = ""

    @property
    def cell(self) -> tuple[Any, ...]:
        """What is measured, without the way."""
        return self.pairs, self.tokens, self.width, self.vocab, self.frozen


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


def measure(shape: str, *, frozen: bool, rounds: int, width: int, words: int) -> list[Row]:
    """All ways on one shape."""
    pairs, tokens = map(int, shape.split("x"))
    problem = make_problem(pairs, tokens, width, words)
    programs = {
        name: jax.jit(gradients_of(way, frozen=frozen)).lower(problem).compile()
        for name, way in WAYS.items()
    }
    tilings = {
        tiling: jax.jit(tiling).lower(problem).compile()
        for tiling in floors(2 * pairs * tokens, frozen=frozen)
    }
    for program in (*programs.values(), *tilings.values()):
        seconds(program, problem)  # the first call is slow
    trials = {t: min(seconds(p, problem) for _ in range(2)) for t, p in tilings.items()}
    tiling = min(trials, key=trials.__getitem__)
    floor = tilings[tiling]

    beside: dict[str, list[float]] = {name: [] for name in programs}
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds):
        for name in list(programs)[:: -1 if turn % 2 else 1]:
            beside[name].append(seconds(floor, problem))
            taken[name].append(seconds(programs[name], problem))
        print(f"{shape}, round {turn + 1} of {rounds}", file=sys.stderr)
    want = exact(problem, frozen=frozen)

    row = functools.partial(
        Row, pairs=pairs, tokens=tokens, width=width, vocab=words, frozen=frozen
    )
    rows = [
        row(
            FLOOR,
            seconds=statistics.median(itertools.chain(*beside.values())),
            of_floor=1.0,
            of_spoloss=ratio(beside["spoloss"], taken["spoloss"]),
            note=f"tiles of {tiling.rows} tokens, {tiling.blocks} blocks",
            **memory(floor),
        )
    ]
    full = memory(programs[FULL])["temp_mib"]
    for name, program in programs.items():
        of_floor = [t / b for t, b in zip(taken[name], beside[name], strict=True)]
        ours = [t / b for t, b in zip(taken["spoloss"], beside["spoloss"], strict=True)]
        temp = memory(program)["temp_mib"]
        rows.append(
            row(
                name,
                seconds=statistics.median(taken[name]),
                of_floor=statistics.median(of_floor),
                of_spoloss=ratio(of_floor, ours),
                temp_of_full_logits=temp / full,
                max_error=None if name == SPO_WAY else max_error(program(problem), want),
                **memory(program),
            )
        )
    return [*rows, row(TOKAMAX[0], note=TOKAMAX[1])]


def ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """The median ratio of what was found in the same round."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def memory(program: Any) -> dict[str, float]:
    """MiB of temporaries and of outputs."""
    planned = program.memory_analysis()
    return {
        "temp_mib": planned.temp_size_in_bytes / MIB,
        "output_mib": planned.output_size_in_bytes / MIB,
    }


# --------------------------------------------------------------------------------- what it leaves

NUMBERS = {
    "seconds": "{:.3f}",
    "of_floor": "{:.2f}",
    "of_spoloss": "{:.2f}",
    "temp_mib": "{:.0f}",
    "temp_of_full_logits": "{:.3f}",
    "output_mib": "{:.0f}",
    "max_error": "{:.0e}",
}


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows of one cell."""
    first = rows[0]
    head = "frozen" if first.frozen else "trained"
    print(f"\n{first.pairs} pairs of 2 x {first.tokens} tokens, D = {first.width}, ", end="")
    print(f"V = {first.vocab}, head {head}")
    print(" " * 18 + "".join(f"{name:>{len(name) + 2}}" for name in NUMBERS) + "  note")
    for row in rows:
        texts = []
        for name, form in NUMBERS.items():
            value = getattr(row, name)
            texts.append(f"{'-' if value is None else form.format(value):>{len(name) + 2}}")
        print(f"{row.way:<18}{''.join(texts)}  {row.note}".rstrip(), flush=True)


def write_csv(rows: Sequence[Row], machine: str, path: Path) -> None:
    """Write all rows, after a comment that says where they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {machine}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        for row in rows:
            values = [getattr(row, field.name) for field in fields(Row)]
            writer.writerow(
                ["" if v is None else f"{v:.4g}" if isinstance(v, float) else v for v in values]
            )


def read_csv(path: Path, machine: str) -> list[Row]:
    """The rows of a file, if they were measured on this machine with these versions."""
    if not path.exists():
        return []
    first, *lines = path.read_text().splitlines()
    if first != f"# {machine}":
        raise SystemExit(f"{path} is of another machine or other versions: move it away first")
    return [
        Row(
            line["way"],
            *(int(line[name]) for name in ("pairs", "tokens", "width", "vocab")),
            frozen=line["frozen"] == "True",
            note=line["note"],
            **{name: float(line[name]) if line[name] else None for name in NUMBERS},
        )
        for line in csv.DictReader(lines)
    ]


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The rows with new ones in the place of old ones, trained heads first, in order of length."""
    measured = {row.cell for row in new}
    kept = [row for row in old if row.cell not in measured]
    return sorted([*kept, *new], key=lambda row: (row.frozen, row.tokens))


def draw(rows: Sequence[Row], machine: str, path: Path) -> None:
    """Draw time over the floor, and temporaries over those of full logits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.of_floor is not None and row.way != FLOOR]
    heads = list(dict.fromkeys(row.frozen for row in measured))
    ways = list(dict.fromkeys(row.way for row in measured))
    figure = Figure(figsize=(13, 1 + 3.6 * len(heads)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Hidden states to loss and gradients in JAX\n{machine}", fontsize=9)
    panels = figure.subplots(len(heads), 2, squeeze=False)
    titles = {
        "of_floor": "time, x its matrix products",
        "temp_mib": "temporaries beyond inputs and outputs, MiB",
    }
    for frozen, pair in zip(heads, panels, strict=True):
        shapes = list(
            dict.fromkeys((row.pairs, row.tokens) for row in measured if row.frozen == frozen)
        )
        for axes, (name, title) in zip(pair, titles.items(), strict=True):
            width = 0.8 / len(ways)
            for i, way in enumerate(ways):
                found = {
                    (row.pairs, row.tokens): getattr(row, name)
                    for row in measured
                    if row.frozen == frozen and row.way == way
                }
                places = [k - 0.4 + i * width for k in range(len(shapes))]
                bars = [found[shape] for shape in shapes]
                axes.bar(places, bars, width, label=way, align="edge")
            axes.set_xticks(range(len(shapes)), [f"{p} x {t}" for p, t in shapes])
            axes.set_title(f"head {'frozen' if frozen else 'trained'}: {title}", fontsize=9)
            if name == "of_floor":
                axes.axhline(1.0, color="black", linewidth=0.8)
    panels[0][1].legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="pairs x tokens, as 16x64")
    parser.add_argument("--heads", nargs="+", default=("trained", "frozen"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one tiny shape; nothing is written")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = describe(*PACKAGES)
    path = options.output / f"fused_jax_{jax.default_backend()}.csv"
    print(machine)
    if options.quick:
        print_table(measure("4x128", frozen=False, rounds=2, width=32, words=1024))
        return
    for shape in options.shapes:
        for head in options.heads:
            rows = measure(
                shape,
                frozen=head == "frozen",
                rounds=options.rounds,
                width=WIDTH,
                words=WORDS,
            )
            print_table(rows)
            found = merge(read_csv(path, machine), rows)
            write_csv(found, machine, path)
            draw(found, machine, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
