"""Pages that quote results: their tables, and the committed files that the figures come from."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def table_below(text: str, heading: str) -> tuple[list[str], dict[str, list[str]]]:
    """The first Markdown table below a heading: its columns, and its rows by their first cell."""
    lines = text.partition(heading)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start:end]]
    return cells[0][1:], {first: rest for first, *rest in cells[2:]}
