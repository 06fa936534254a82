"""What every benchmark shares: the machine in a line, result files, progress, a quiet machine."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
MOST_OTHERS = 0.1
"""A row is not written if other processes took more than this share of the cores."""
T = TypeVar("T")


# -------------------------------------------------------------------------------- the result file


class Table:
    """A CSV file below a comment line; it grows row by row and skips what it already has.

    Args:
      path: the file; None writes nothing.
      title: the comment line: where and with what the rows are measured. Rows that the file has
        under another title are replaced.
      cell: a dataclass whose fields are the first columns; they tell what a row is about.
    """

    def __init__(self, path: Path | None, title: str, cell: type) -> None:
        self.path, self.title = path, title
        self.key = [field.name for field in fields(cell)]
        self.rows = read(path, title) if path is not None else []
        print(f"# {title}")

    def todo(self, cells: Sequence[Any]) -> Iterator[Any]:
        """`missing`, behind a progress bar."""
        return iter(tqdm(self.missing(cells), unit="row", disable=None))

    def missing(self, cells: Sequence[T]) -> list[T]:
        """The cells that have no row yet."""
        found = {self._key_of(row) for row in self.rows}
        left = [cell for cell in cells if self._key_of(_texts(asdict(cell))) not in found]
        if len(left) < len(cells):
            tqdm.write(f"{self.path}: {len(cells) - len(left)} of {len(cells)} rows are there")
        return left

    def add(self, cell: Any, **found: Any) -> None:
        """Print a row, and write it to the file.

        Args:
          cell: what the row is about.
          **found: what was measured; None stays empty. `others` is a share of the cores.

        Raises:
          SystemExit: other processes took more than `MOST_OTHERS`, and there is a file.
        """
        about, texts = _texts(asdict(cell)), _texts(found)
        columns = ", ".join(f"{name} {text}" for name, text in texts.items() if text)
        tqdm.write(f"{' '.join(about.values())}: {columns}")
        if self.path is None:
            return
        if (found.get("others") or 0.0) > MOST_OTHERS:
            raise SystemExit(
                f"others: expected at most {MOST_OTHERS:.0%} of the cores for other processes, got "
                f"{found['others']:.0%}. This row is not written; the same command continues here."
            )
        self.rows.append(about | texts)
        write(self.path, self.title, self.rows)

    def _key_of(self, row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in self.key)


def write(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows below a comment line, whole or not at all; a row may lack columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {title}\n")
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(_texts, rows))
    draft.replace(path)


def read(path: Path, title: str) -> list[dict[str, str]]:
    """The rows of a file; none if there is no file or it has another title."""
    if not path.exists():
        return []
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(lines)) if first == f"# {title}" else []


def _texts(row: dict[str, Any]) -> dict[str, str]:
    def text(value: Any) -> str:
        if value is None or value != value:  # nan
            return ""
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    return {name: text(value) for name, value in row.items()}


# ------------------------------------------------------------------------------------ the machine


def machine(*packages: str) -> str:
    """The processor, its cores, the system, Python and the versions of `packages` in one line."""
    versions = [f"{name} {version(name)}" for name in packages]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = f"Python {platform.python_version()}"
    return ", ".join([_processor(), f"{cores} cores", platform.system(), python, *versions])


def version(name: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Others:
    """Measures which share of the cores other processes take during a `with` block.

    Child processes count as this one once they have ended.

    Attributes:
      share: in [0, 1]; 0 where the system keeps no record.
    """

    share = 0.0

    def __enter__(self) -> Others:
        self._before = _core_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        before, after = self._before, _core_seconds()
        if before is not None and after is not None and after.total > before.total:
            self.share = max(0.0, (after.others - before.others) / (after.total - before.total))


class _CoreSeconds(NamedTuple):
    """Seconds of all cores since the start of the system: in all, and spent on other processes."""

    total: float
    others: float


def _core_seconds() -> _CoreSeconds | None:
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; later columns count twice.
    ticks = [int(number) / os.sysconf("SC_CLK_TCK") for number in line.split()[1:9]]
    own = sum(os.times()[:4])  # of this process and of its children that have ended
    return _CoreSeconds(sum(ticks), sum(ticks) - ticks[3] - ticks[4] - own)
