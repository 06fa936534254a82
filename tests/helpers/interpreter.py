"""A Python process of its own that imports the package which the tests import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run_python(*arguments: str | Path, cwd: Path = TESTS) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS`.

    `python -c` and `python -m` import from the working directory first, so it must not be the
    checkout: its package is not the installed one.
    """
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
