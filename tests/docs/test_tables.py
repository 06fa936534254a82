"""Regenerating the tables in README and docs from the committed results changes nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.pages import ROOT

SCRIPT = ROOT / "docs" / "tables.py"


def run(script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_table_is_up_to_date() -> None:
    result = run(SCRIPT, "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_changed_cell_is_found(tmp_path: Path) -> None:
    page = ROOT / "docs" / "gradients.md"
    (tmp_path / "docs").mkdir()
    for script in ("tables.py", "study_tables.py"):
        shutil.copy(ROOT / "docs" / script, tmp_path / "docs")
    (tmp_path / "README.md").touch()
    changed, count = re.subn(r"1\.0e\+44", "1.1e+44", page.read_text())
    assert count > 0
    (tmp_path / "docs" / "gradients.md").write_text(changed)
    result = run(tmp_path / "docs" / "tables.py", "--check")
    assert result.returncode != 0
    assert "1.1e+44" in result.stdout
