"""Regenerating the tables in README and docs from the committed results changes nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from helpers.interpreter import run_python
from helpers.pages import ROOT

SCRIPT = ROOT / "docs" / "tables.py"


def test_every_table_is_up_to_date() -> None:
    result = run_python(SCRIPT, "--check")
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
    result = run_python(tmp_path / "docs" / "tables.py", "--check")
    assert result.returncode != 0
    assert "1.1e+44" in result.stdout
