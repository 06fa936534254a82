"""The house: public names, downward imports, no framework behind `import spoloss`."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spoloss
import spoloss.torch

PACKAGE = Path(spoloss.__file__).parent
ROOT = Path(__file__).parents[2]
# From the ground up; each file may import from those before it.
FLOORS = (
    "spoloss._arrays",
    "spoloss._options",
    "spoloss.losses",
    "spoloss.pairs",
    "spoloss.gradients",
    "spoloss.metrics",
    "spoloss",
    "spoloss.torch._rows",
    "spoloss.torch._vocab_parallel",
    "spoloss.torch._head",
    "spoloss.torch._device",
    "spoloss.torch._tiles",
    "spoloss.torch._once",
    "spoloss.torch.logps",
    "spoloss.torch.fused",
    "spoloss.torch.modules",
    "spoloss.torch",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add(node.module or "")
    return names


def climbs(name: str, source: str) -> set[str]:
    """The modules of the package that `source` imports from its own floor or above."""
    own = {n for n in imported(ast.parse(source)) if n.split(".")[0] == "spoloss"}
    return {n for n in own if FLOORS.index(n) >= FLOORS.index(name)}


def test_imports_run_downwards() -> None:
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    assert set(files) == set(FLOORS)
    for name, path in files.items():
        assert climbs(name, path.read_text()) == set(), name


def test_the_import_check_sees_a_climb() -> None:
    assert climbs("spoloss.losses", "from spoloss.pairs import spo_loss") == {"spoloss.pairs"}
    assert climbs("spoloss.losses", "import spoloss.losses") == {"spoloss.losses"}
    assert climbs("spoloss.pairs", "from spoloss.losses import SPO") == set()


def test_only_the_torch_floor_imports_a_framework() -> None:
    for path in PACKAGE.rglob("*.py"):
        frameworks = {n.split(".")[0] for n in imported(ast.parse(path.read_text()))} & {
            "torch",
            "jax",
        }
        assert not frameworks or path.parent.name == "torch", path


@pytest.mark.parametrize("module", [spoloss, spoloss.torch])
def test_public_names_are_all_and_documented(module: object) -> None:
    names = {
        n for n, v in vars(module).items() if not n.startswith("_") and not inspect.ismodule(v)
    }
    assert set(module.__all__) == names  # type: ignore[attr-defined]
    assert all(inspect.getdoc(getattr(module, name)) for name in names)


def test_every_argument_is_documented_or_referred_to() -> None:
    for name in spoloss.__all__:
        function = getattr(spoloss, name)
        if inspect.isfunction(function) and "Args:" in (function.__doc__ or ""):
            for argument in inspect.signature(function).parameters:
                assert re.search(rf"^ +{argument}: ", function.__doc__, re.M), (name, argument)


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_import_loads_no_framework() -> None:
    done = run(
        "import sys, spoloss; import numpy as np; a = np.zeros(2); spoloss.spo_loss(a, a, a, a)\n"
        "print({'torch', 'jax', 'jaxlib', 'array_api_compat'} & set(sys.modules))"
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_the_torch_floor_names_its_extra() -> None:
    done = run("import sys; sys.modules['torch'] = None; import spoloss.torch")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        'ImportError: spoloss.torch needs PyTorch: pip install "spoloss[torch]"'
    )


def test_version_is_in_the_changelog() -> None:
    assert f"## {spoloss.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
