"""A Python process of its own that imports what the tests import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
RECIPES = TESTS.parent / "docs" / "recipes"


def run_python(*arguments: str | Path, cwd: Path = TESTS) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS`.

    `python -c` and `python -m` import from the working directory first, so it must not be the
    checkout: its package is not the installed one.
    """
    folders = [*filter(None, [os.environ.get("PYTHONPATH")]), str(RECIPES)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
