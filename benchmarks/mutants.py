"""Mutation testing: how many small faults in `spoloss/` the tests of their area notice.

    python -m benchmarks.mutants --sample 120 --seed 0 --save     results/mutants_0.csv
    python -m benchmarks.mutants --again --seed 0 --save          only those that survived

Every constant, comparison, arithmetic or boolean operator, condition and returned value of the
package is a place for a mutant. A seeded sample of places is drawn, each once. Each mutant runs the
fast tests of its file (`TESTS`) until the first failure. If they all pass, it runs every test of
its area (`WIDE`). The tests run on a copy of the tree, in a fork of a process that has loaded the
array libraries already.

With `--again`, the mutants that survived in a saved sample run the fast tests of today. Where the
expression has left the file, the mutant is gone.
"""

from __future__ import annotations

import argparse
import ast
import csv
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import record

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("file", "line", "code", "was", "mutant", "outcome")
"""`code` is the line, without spaces at its ends."""
Row = tuple[str, ...]
CPU_SECONDS = 600
SECONDS = 3600.0

_CORE = ("core/test_losses.py", "core/test_pairs.py", "core/test_gradients.py")
_HEAD = (
    "torch/test_sizes.py",
    "torch/test_torch_fused.py",
    "torch/test_torch_edges.py",
    "torch/test_packed.py",
    "torch/test_plan.py",
    "torch/test_torch_logps.py",
)
TESTS = {
    "losses.py": _CORE,
    "_arrays.py": (*_CORE[::-1], "core/test_metrics.py", "core/test_transforms.py"),
    "_options.py": ("core/test_options.py", "torch/test_torch_edges.py"),
    "pairs.py": (*_CORE[1:], "core/test_metrics.py", "core/test_transforms.py"),
    "gradients.py": ("core/test_gradients.py", "core/test_transforms.py"),
    "metrics.py": ("core/test_metrics.py",),
    "torch/modules.py": ("torch/test_torch_modules.py",),
    "torch/logps.py": ("torch/test_torch_logps.py", *_HEAD),
    "torch/_vocab_parallel.py": ("distributed/test_vocab_parallel.py",),
    "torch": _HEAD,
    "jax": (
        "jax/test_jax_memory.py",
        "jax/test_jax_calls.py",
        "jax/test_jax_logps.py",
        "jax/test_jax_fused.py",
    ),
}
ALL_SLOW = {"torch/_vocab_parallel.py"}
"""Files whose tests are all marked as slow."""
WIDE = {
    "core": ("core",),
    "torch": ("torch", "distributed/test_vocab_parallel.py"),
    "jax": ("jax",),
}

_SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.USub: ast.UAdd,
}


@dataclass(frozen=True)
class Mutant:
    """One expression of one file, and what takes its place."""

    file: str
    line: int
    code: str
    was: str
    now: str
    start: int
    end: int

    def apply(self, source: bytes) -> bytes:
        """The file with the mutant in it."""
        return source[: self.start] + self.now.encode() + source[self.end :]

    def row(self, outcome: str) -> Row:
        """What a file has about it."""
        return (self.file, str(self.line), self.code, self.was, self.now, outcome)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All mutants of a file, in the order of its lines."""
    source = path.read_bytes()
    lines = [0, *_ends(source)]
    tree = ast.parse(source)
    name = path.relative_to(ROOT / "spoloss").as_posix()
    for node, replacements in _code(tree):
        for now in replacements:
            start = lines[node.lineno - 1] + node.col_offset
            end = lines[node.end_lineno - 1] + node.end_col_offset
            was = source[start:end].decode()
            if now != was:
                code = source[lines[node.lineno - 1] :].splitlines()[0].decode().strip()
                yield Mutant(name, node.lineno, code, was, now, start, end)


def _ends(source: bytes) -> Iterator[int]:
    at = 0
    for line in source.splitlines(keepends=True):
        at += len(line)
        yield at


def _code(tree: ast.AST) -> Iterator[tuple[ast.expr, list[str]]]:
    """The expressions that run, without annotations, docstrings and messages, and their mutants."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, (ast.Raise, ast.JoinedStr)) or not isinstance(node, ast.AST):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                yield node.value, ["None"]
            if isinstance(node, ast.If):
                if ast.unparse(node.test) == "TYPE_CHECKING":
                    continue  # never runs
                yield node.test, ["True", "False"]
            if isinstance(node, ast.expr):
                yield node, list(_replacements(node))
            yield from _code(node)


def _replacements(node: ast.expr) -> Iterator[str]:
    """What takes the expression's place: one change each."""
    match node:
        case ast.Constant(value=bool() as value):
            yield str(not value)
        case ast.Constant(value=int() | float() as value):
            yield f"({value!r} + 1)"
            if value:
                yield f"({value!r} * 2)"
        case ast.BinOp(op=op) if type(op) in _SWAPS:
            yield f"({ast.unparse(ast.BinOp(node.left, _SWAPS[type(op)](), node.right))})"
        case ast.UnaryOp(op=ast.USub()):
            yield f"({ast.unparse(node.operand)})"
        case ast.UnaryOp(op=ast.Not()):
            yield f"bool({ast.unparse(node.operand)})"
        case ast.Compare(ops=[op]) if type(op) in _SWAPS:
            yield f"({ast.unparse(ast.Compare(node.left, [_SWAPS[type(op)]()], node.comparators))})"
        case ast.BoolOp(op=op):
            yield f"({ast.unparse(ast.BoolOp(_SWAPS[type(op)](), node.values))})"
        case ast.IfExp():
            yield f"({ast.unparse(node.body)})"
            yield f"({ast.unparse(node.orelse)})"
        case ast.Call(func=ast.Attribute(value=receiver, attr=attr)) if attr in _DROPPED:
            yield ast.unparse(receiver)


_DROPPED = ("detach", "clone", "contiguous", "to", "float", "sum", "exp", "abs", "clamp", "neg")


def fast_tests(file: str) -> tuple[str, ...]:
    """Options of pytest that select the fast tests of a file, the likeliest to notice first."""
    paths = _paths(TESTS.get(file) or TESTS[file.split("/")[0]])
    return paths if file in ALL_SLOW else (*paths, "-m", "not slow", "-k", "not compil")


def wide_tests(file: str) -> tuple[str, ...]:
    """All tests of the area, for those that survive."""
    return _paths(WIDE[file.split("/")[0] if "/" in file else "core"])


def _paths(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"tests/{name}" for name in names if (ROOT / "tests" / name).exists())


def outcome(mutant: Mutant, tree: Path, *, wide: bool = True) -> str:
    """killed, killed by the wide tests, survived, or timeout, in a copy of the tree."""
    path = tree / "spoloss" / mutant.file
    right = path.read_bytes()
    path.write_bytes(mutant.apply(right))
    try:
        fast = _run_tests(tree, fast_tests(mutant.file))
        if fast != "survived" or not wide:
            return fast
        all_tests = _run_tests(tree, wide_tests(mutant.file))
        return "killed by the wide tests" if all_tests == "killed" else all_tests
    finally:
        path.write_bytes(right)


def _run_tests(tree: Path, tests: tuple[str, ...]) -> str:
    child = os.fork()
    if child == 0:
        _become_pytest(tree, tests)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            if code in (-signal.SIGXCPU, -signal.SIGKILL):
                return "timeout"
            return "survived" if code == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def _become_pytest(tree: Path, tests: tuple[str, ...]) -> None:
    import pytest

    os.setpgrp()
    # Time on the processor, because the clock runs on where other work is in the way.
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 60))
    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("benchmarks", "spoloss")]:
        del sys.modules[name]
    os.environ["PYTHONPATH"] = str(tree)
    sys.dont_write_bytecode = True
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    code = 2
    try:
        options = ["-x", "-q", "-p", "no:cacheprovider"]
        code = pytest.main([*options, *tests])
    finally:
        os._exit(int(code))


def sample(files: list[Path], size: int, seed: int) -> list[Mutant]:
    """A sample without repeats over all mutants of the files: each is as likely as any other."""
    population = [mutant for path in files for mutant in mutants_of(path)]
    print(f"{len(population)} mutants in {len(files)} files")
    return random.Random(seed).sample(population, min(size, len(population)))


def again(row: Row, tree: Path) -> Row:
    """A surviving mutant against the fast tests of today, where the file still has that line."""
    file, line, *expression, _ = row
    path = ROOT / "spoloss" / file
    mutants = mutants_of(path) if path.exists() else ()
    same = [m for m in mutants if [m.code, m.was, m.now] == expression]
    if not same:
        return (*row[:-1], "gone")
    mutant = min(same, key=lambda m: abs(m.line - int(line)))
    found = mutant.row(outcome(mutant, tree, wide=False))
    print(*found, sep=" | ", flush=True)
    return found


def load_libraries() -> None:
    """What every fork would load again; nothing of the package, which is mutated."""
    import array_api_strict  # noqa: F401
    import mpmath  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch.utils.checkpoint

    torch.set_num_threads(1)


def main() -> int:
    """Run a sample or its survivors; print the outcome of each mutant and the score."""
    parser = argparse.ArgumentParser(prog="benchmarks.mutants", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sample", type=int, default=120)
    which.add_argument("--again", action="store_true", help="only those that survived")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path contains this")
    parser.add_argument("--save", action="store_true", help="write results/mutants_SEED.csv")
    options = parser.parse_args()
    result = RESULTS / f"mutants_{options.seed}.csv"
    load_libraries()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        skip = shutil.ignore_patterns(".git", "__pycache__", "build", "*.pyc")
        shutil.copytree(ROOT, tree, ignore=skip)
        if options.again:
            rows = [
                again(row, tree) if row[-1] == "survived" and options.only in row[0] else row
                for row in load(result)
            ]
            if options.save:
                save(rows, result)
        else:
            files = sorted((ROOT / "spoloss").rglob("*.py"))
            files = [p for p in files if options.only in p.as_posix() and p.name != "__init__.py"]
            rows = []
            for row in outcomes(sample(files, options.sample, options.seed), tree):
                rows.append(row)
                if options.save:  # after each one: a run takes hours, and what has run is a sample
                    save(rows, result)
    there = [row for row in rows if row[-1] != "gone"]
    print(f"{sum(row[-1] != 'survived' for row in there)} of {len(there)} noticed")
    return 0


def outcomes(drawn: list[Mutant], tree: Path) -> Iterator[Row]:
    """Run a sample. The tests must pass without a mutant."""
    for tests in {fast_tests(mutant.file) for mutant in drawn}:
        if _run_tests(tree, tests) != "survived":
            raise SystemExit(f"these fail without a mutant: {tests}")
    for mutant in drawn:
        row = mutant.row(outcome(mutant, tree))
        print(*row, sep=" | ", flush=True)
        yield row


def load(path: Path) -> list[Row]:
    """The rows of a saved sample."""
    with path.open(newline="") as file:
        _, _, *rows = csv.reader(file)
    return [tuple(row) for row in rows]


def save(rows: list[Row], path: Path) -> None:
    """The outcomes so far, with machine and versions."""
    with path.open("w", newline="") as file:
        print(f"# {record.machine('torch', 'jax', 'spoloss')}", file=file)
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    sys.exit(main())
