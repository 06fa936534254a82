"""The tables in README and docs, written from the committed CSV files: python docs/tables.py.

A page names its table in a comment, and cog replaces the lines below it:

    <!-- [[[cog tables.fused("fused_cpu.csv", frozen=False) ]]] -->
    ...
    <!-- [[[end]]] -->

With --check, nothing is written, and the exit status tells whether a page is out of date.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogapp import Cog

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

OURS = {
    "spoloss": "**`linear_dpo_loss`**",
    "spoloss_spo": "**`linear_spo_loss`**",
    "spoloss_apo_down": "**`linear_pair_loss`, APO-down**",
    "spoloss_kto": "**`linear_logps`, then KTO**",
}
WAYS = {
    "full_logits": "full logits, `F.cross_entropy`",
    "trl": "TRL, chunked log-probabilities",
    "liger": "Liger fused DPO, eager (a)",
    "liger_compiled": "Liger fused DPO, compiled (a)",
    "torch_linear_ce": "`F.linear_cross_entropy`",
    **OURS,
}
JAX_WAYS = {
    "full_logits": "full logits, `log_softmax`",
    "optax": "full logits, Optax's cross-entropy",
    "scan_checkpoint": "scan over tokens and `jax.checkpoint`",
    **OURS,
}
TRAINERS = {
    "no_head": "both models without their heads (a)",
    "trl": "TRL's DPO loss",
    "liger": "TRL with Liger's fused DPO loss, compiled",
    "logits": "`SPOTrainer` by logits (`trl_dpo.py`)",
    "fused": "**`SPOTrainer` by the fused head (`trl_fused.py`)**",
}

Row = Mapping[str, Any]


def measured(name: str) -> list[dict[str, Any]]:
    """The rows of a committed CSV file without the line about the machine; numbers are numbers."""
    with (RESULTS / name).open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [{column: _number(text) for column, text in row.items()} for row in rows]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def write(header: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table on standard output, where cog reads it."""
    header = list(header)
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    print("", *lines, "", sep="\n")


def listed(rows: Iterable[Row], columns: Mapping[str, str]) -> None:
    """A table with a line for each row.

    Args:
      rows: of a CSV file.
      columns: heading -> format string over the names of a row. A heading with (%) has the sign for
        its cells, and an error of one value alone, nan, is left out.
    """

    def cell(heading: str, form: str, row: Row) -> str:
        text = form.format_map(row)
        text = text.replace("%", "") if "(%)" in heading else text
        return text.replace(" ± nan", "")

    write(columns, ([cell(*column, row) for column in columns.items()] for row in rows))


def pivoted(corner: str, heading: str, cells: Mapping[tuple[str, Any], str]) -> None:
    """A table of cells by line and column: lines in their own order, columns sorted."""
    lines, columns = dict.fromkeys(line for line, _ in cells), sorted({key for _, key in cells})
    write(
        [corner, *(heading.format(column) for column in columns)],
        ([line, *(cells.get((line, column), "-") for column in columns)] for line in lines),
    )


def machine(name: str) -> None:
    """The processor and versions that a CSV file was measured with."""
    with (RESULTS / name).open() as file:
        print(f"Measured on: {file.readline().removeprefix('#').strip()}.")


def roofline(name: str) -> None:
    """Predicted time on an H200 and an H100 over the bare products, and memory in GiB."""
    with (RESULTS / name).open() as file:
        print(f"Predicted for: {file.readline().removeprefix('#').strip()}.")
    rows = measured(name)
    ways = [way for way in WAYS if any(row["way"] == way for row in rows)]
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = f"{row['h200']:.2f} / {row['h100']:.2f} / {row['memory_gib']:.2f}"
        lines.setdefault(f"{row['model']}, {row['head']}", {})[row["way"]] = cell
    write(
        ["head", *(WAYS[way].removesuffix(" (a)") for way in ways)],
        ([line, *(cells.get(way, "-") for way in ways)] for line, cells in lines.items()),
    )


def fused(name: str, *, frozen: bool) -> None:
    """Time over the bare matrix products / memory in MiB, by way and shape of the batch.

    PyTorch's memory is the growth of the peak, JAX's the temporaries of the compiled program.
    """
    rows = [row for row in measured(name) if row["frozen"] == str(frozen) and row["of_floor"] != ""]
    jax = any("temp_mib" in row for row in rows)
    ways, memory = (JAX_WAYS, "temp_mib") if jax else (WAYS, "memory_mib")
    cells = {
        (title, (row["tokens"], row["pairs"])): f"{row['of_floor']:.2f} / {row[memory]:.0f}"
        for way, title in ways.items()
        for row in rows
        if row["way"] == way
    }
    pivoted("head frozen" if frozen else "head trained", "{0[1]} x {0[0]}", cells)


def trainers(name: str) -> None:
    """A training step, by way: time and growth of peak memory, and both over TRL's."""
    columns = {
        "loss": "{title}",
        "processor seconds": "{seconds:.2f}",
        "seconds of TRL's": "{of_trl:.2f}",
        "memory, MiB": "{memory_mib}",
        "memory of TRL's": "{memory_of_trl:.2f}",
    }
    listed(({**row, "title": TRAINERS[row["way"]]} for row in measured(name)), columns)


def core(name: str) -> None:
    """The losses against the same formulas written by hand."""
    columns = {"what": "{what}", "spoloss": "{ours:.4g}", "by hand": "{other:.4g}"}
    listed(measured(name), {**columns, "ratio": "{ratio:.2f}"})


def accuracy(name: str, beta: float = 1.0) -> None:
    """Median / worst error in eps over the whole range, by loss and way."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in measured(name):
        if row["beta"] == beta and row["range"] == "all":
            line = found.setdefault((row["loss"], row["way"]), {**row})
            line |= {f"{row['dtype']}_{column}": value for column, value in row.items()}
    columns = {"loss": "{loss}", "computed by": "{way}"}
    for dtype in ("float32", "float64"):
        for what in ("value", "slope"):
            form = f"{{{dtype}_{what}_median:.2g}} / {{{dtype}_{what}_worst:.2g}}"
            columns[f"{dtype}, {what}"] = form
    listed(found.values(), columns)


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    """Write the tables of all pages, or compare them under --check."""
    mode = ["--check", "--diff"] if "--check" in sys.argv[1:] else ["-r"]
    arguments = ["cog", "-P", "-I", str(ROOT / "docs"), "-p", "import tables, study_tables", *mode]
    return Cog().main([*arguments, *map(str, pages())])


if __name__ == "__main__":
    sys.exit(main())
