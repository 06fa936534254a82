"""The tables in README and docs, written from the committed results: python docs/tables.py.

A page names its table in a comment, and cog replaces the lines below it:

    <!-- [[[cog tables.fused("fused_cpu.csv", frozen=False) ]]] -->
    ...
    <!-- [[[end]]] -->

With --check, nothing is written, and the exit status tells whether a page is out of date.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from cogapp import Cog

from spoloss import dpo_prob_grad, spo_prob_grad

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

WAYS = {
    "full_logits": "full logits, `F.cross_entropy`",
    "trl": "TRL, chunked log-probabilities",
    "liger": "Liger fused DPO, eager (a)",
    "liger_compiled": "Liger fused DPO, compiled (a)",
    "torch_linear_ce": "`F.linear_cross_entropy`",
    "spoloss": "**`linear_dpo_loss`**",
    "spoloss_spo": "**`linear_spo_loss`**",
}

JAX_WAYS = {
    "full_logits": "full logits, `log_softmax`",
    "optax": "full logits, Optax's cross-entropy",
    "scan_checkpoint": "scan over tokens and `jax.checkpoint`",
    "easydel": "EasyDeL's chunks, written out",
    "spoloss": "**`linear_dpo_loss`**",
    "spoloss_spo": "**`linear_spo_loss`**",
}
TRAINERS = {
    "no_head": "both models without their heads (a)",
    "trl": "TRL's DPO loss",
    "liger": "TRL with Liger's fused DPO loss, compiled",
    "logits": "`SPOTrainer` by logits (`trl_dpo.py`)",
    "fused": "**`SPOTrainer` by the fused head (`trl_fused.py`)**",
}


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def measured(name: str) -> list[dict[str, str]]:
    """The rows of a committed CSV file, without its first line about the machine."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def machine(name: str) -> None:
    """The processor and versions that a CSV file was measured with."""
    with (RESULTS / name).open() as file:
        print(f"Measured on: {file.readline().removeprefix('#').strip()}.")


def fused(name: str, *, frozen: bool) -> None:
    """Time over the bare matrix products / growth of peak memory, by way and shape of the batch."""
    rows = [row for row in measured(name) if row["frozen"] == str(frozen)]
    fewest = min(float(row["ignored"]) for row in rows)  # other rows ignore labels in addition
    rows = [row for row in rows if float(row["ignored"]) == fewest]
    _write_by_shape(rows, WAYS, "memory_mib", frozen=frozen)


def fused_jax(name: str, *, frozen: bool) -> None:
    """Time over the bare matrix products / temporaries, by way and shape of the batch."""
    rows = [row for row in measured(name) if row["frozen"] == str(frozen)]
    _write_by_shape(rows, JAX_WAYS, "temp_mib", frozen=frozen)


def mutants(*names: str) -> None:
    """How many mutants of some samples the tests notice, and why the others are not noticed."""
    rows = [row for name in names for row in measured(name) if row["outcome"] != "gone"]
    survived = [row for row in rows if row["outcome"] == "survived"]
    noticed = len(rows) - len(survived)
    print(
        f"Of {len(rows)} mutants, the tests notice {noticed} ({noticed / len(rows):.0%}). "
        "No test on a CPU can notice the others:"
    )
    about = ("file", "code", "was", "mutant")
    reasons = {
        tuple(row[name] for name in about): row["reason"] for row in measured("mutant_reasons.csv")
    }
    cells = (
        [
            f"`{row['file']}`",
            _code(row["code"]),
            _code(f"{row['was']} -> {row['mutant']}"),
            reasons[tuple(row[name] for name in about)],
        ]
        for row in sorted(survived, key=lambda row: (row["file"], int(row["line"])))
    )
    write(["file", "line", "mutant", "why no test notices it"], cells)


def _code(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`{text if len(text) <= 60 else text[:57] + '...'}`"


def _write_by_shape(
    rows: list[dict[str, str]], ways: dict[str, str], memory: str, *, frozen: bool
) -> None:
    cells = {(row["way"], int(row["pairs"]), int(row["tokens"])): row for row in rows}
    shapes = sorted({(pairs, tokens) for _, pairs, tokens in cells}, reverse=True)

    def cell(way: str, *shape: int) -> str:
        row = cells.get((way, *shape))
        if row is None or not row["of_floor"]:
            return "-"
        return f"{float(row['of_floor']):.2f} / {float(row[memory]):.0f}"

    header = ["head frozen" if frozen else "head trained", *(f"{p} x {t}" for p, t in shapes)]
    write(header, ([title, *(cell(way, *s) for s in shapes)] for way, title in ways.items()))


def trainers(name: str) -> None:
    """A training step, by way: time and growth of peak memory, and both over TRL's."""
    header = ["loss", "processor seconds", "of TRL's", "memory, MiB", "of TRL's"]
    rows = (
        [
            TRAINERS[row["way"]],
            f"{float(row['seconds']):.2f}",
            f"{float(row['of_trl']):.2f}",
            row["memory_mib"],
            f"{float(row['memory_of_trl']):.2f}",
        ]
        for row in measured(name)
    )
    write(header, rows)


def compared(name: str) -> None:
    """A version over another one, in time and memory, by head and shape of the batch."""
    header = ["P x T", "head", "time", "quartiles", "rounds", "memory"]
    rows = (
        [
            f"{row['pairs']} x {row['tokens']}",
            "frozen" if row["frozen"] == "True" else "trained",
            f"{float(row['time_ratio']):.3f}",
            f"{float(row['time_ratio_low']):.3f} to {float(row['time_ratio_high']):.3f}",
            row["rounds"],
            f"{float(row['memory_ratio']):.3f}",
        ]
        for row in sorted(measured(name), key=lambda row: int(row["tokens"]))
    )
    write(header, rows)


def core(name: str = "core.csv") -> None:
    """The losses against the same formulas written by hand."""
    header = ["what", "spoloss", "by hand", "ratio"]
    rows = ([row["what"], row["ours"], row["other"], row["ratio"]] for row in measured(name))
    write(header, rows)


def accuracy(beta: float = 1.0) -> None:
    """Median / worst error in eps over the whole range, by loss and way."""
    rows = [
        row
        for row in measured("accuracy.csv")
        if float(row["beta"]) == beta and row["range"] == "all"
    ]
    cells = {(row["loss"], row["way"], row["dtype"]): row for row in rows}

    def cell(loss: str, way: str, dtype: str, what: str) -> str:
        row = cells[loss, way, dtype]
        return " / ".join(f"{float(row[f'{what}_{which}']):.2g}" for which in ("median", "worst"))

    columns = [(dtype, what) for dtype in ("float32", "float64") for what in ("value", "slope")]
    header = ["loss", "computed by", *(f"{dtype}, {what}" for dtype, what in columns)]
    pairs = dict.fromkeys((row["loss"], row["way"]) for row in rows)
    write(header, ([*pair, *(cell(*pair, *column) for column in columns)] for pair in pairs))


def quote(
    report: str, heading: str, columns: Sequence[str], rows: Sequence[str], *, first: str = ""
) -> None:
    """Some rows and columns of a table in a committed Markdown report; `first` heads the names."""
    section = (RESULTS / report).read_text().partition(f"\n{heading}\n")[2].partition("\n#")[0]
    if not section:
        raise ValueError(f"{report}: expected the heading {heading!r}")
    lines = section.splitlines()
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")
    ]
    places = [table[0].index(column) for column in columns]
    found = {row[0]: row for row in table[2:]}
    write([first, *columns], ([name, *(found[name][place] for place in places)] for name in rows))


def quote_sentence(report: str, start: str) -> None:
    """The one line of a committed Markdown report that starts with these words."""
    (line,) = (
        line for line in (RESULTS / report).read_text().splitlines() if line.startswith(start)
    )
    print("", textwrap.fill(line, 110, break_on_hyphens=False), "", sep="\n")


def rejected_probability() -> None:
    """Equations 7 and 8 as the rejected probability falls, times its reference probability."""
    decades = np.array([5, 10, 20, 50])
    header = ["loss", "beta", *(f"1e-{d} of the reference" for d in decades)]
    zero, rejected = np.zeros(len(decades)), -decades * math.log(10)
    rows = []
    for beta in (0.1, 0.5, 1.0, 2.0):
        for name, gradient in (("DPO, eq. 7", dpo_prob_grad), ("SPO, eq. 8", spo_prob_grad)):
            log_abs = gradient(zero, rejected, zero, zero, beta=beta).policy_rejected.log_abs
            rows.append([name, f"{beta:g}", *(f"{10**d:.1e}" for d in log_abs / math.log(10))])
    write(header, rows)


def example_options() -> None:
    """The options of the training example, as its parser has them."""
    sys.path.append(str(ROOT / "docs" / "examples"))
    from arguments import build_parser

    options = [each for each in build_parser()._actions if each.dest != "help"]
    rows = [
        [f"`{' '.join([each.option_strings[0], *_values(each)])}`", each.help] for each in options
    ]
    write(["option", "meaning"], rows)


def _values(option: argparse.Action) -> list[str]:
    if option.nargs == 0:
        return []
    return [",".join(option.choices) if option.choices else option.dest.upper()]


def example_command(model: str, *given: str, name: str = "example.csv") -> None:
    """The command of a row of `example`, behind options that the reader fills in."""
    (flags,) = (row["flags"] for row in measured(name) if row["model"] == model)
    command = " ".join(["python docs/examples/train.py", *given, flags]).strip()
    lines = textwrap.wrap(command, 96, break_on_hyphens=False)
    print("", "```bash", " \\\n    ".join(lines), "```", "", sep="\n")


def example(name: str = "example.csv") -> None:
    """The example's documented commands: their time, memory and held-out accuracy."""
    header = ["model", "whole run", "first step done", "peak memory", "pairs in the right order"]
    rows = (
        [
            row["model"],
            f"{float(row['seconds']):.0f} s",
            f"{float(row['first_step_seconds']):.0f} s",
            f"{int(row['peak_mib']):,} MiB",
            f"{float(row['accuracy']) * int(row['held_out']):.0f} of {row['held_out']} held out",
        ]
        for row in measured(name)
    )
    write(header, rows)


def write(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table on standard output, where cog reads it."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    print("", *lines, "", sep="\n")


def main() -> int:
    """Write the tables of all pages, or compare them under --check."""
    mode = ["--check", "--diff"] if "--check" in sys.argv[1:] else ["-r"]
    arguments = ["cog", "-P", "-I", str(ROOT / "docs"), "-p", "import tables, study_tables", *mode]
    return Cog().main([*arguments, *map(str, pages())])


if __name__ == "__main__":
    sys.exit(main())
