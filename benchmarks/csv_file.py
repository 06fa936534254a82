"""Result files: one comment line about the machine, then a table that grows over several runs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def update(path: Path, title: str, rows: Sequence[dict[str, Any]], key: Sequence[str]) -> None:
    """Write rows to a file, in place of those with the same key, or of all under another title.

    Args:
      path: the file.
      title: its first line: where and with what the rows were measured.
      rows: column -> value, with the same columns in each; None is left empty.
      key: the columns that tell what a row is about.
    """
    new = [{name: _text(value) for name, value in row.items()} for row in rows]
    replaced = {tuple(row[name] for name in key) for row in new}
    kept = [row for row in read(path, title) if tuple(row[name] for name in key) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {title}\n")
        writer = csv.DictWriter(file, list(new[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new])


def read(path: Path, title: str) -> list[dict[str, str]]:
    """The rows of a file, none if there is no file or it has another title."""
    if not path.exists():
        return []
    first, *lines = path.read_text().splitlines()
    return list(csv.DictReader(lines)) if first == f"# {title}" else []


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
