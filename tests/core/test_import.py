"""What happens at import: only the package's own files are read, and nothing else is touched."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import spoloss
from helpers.interpreter import run_python

PACKAGE = Path(spoloss.__file__).parent
ROOT = Path(__file__).parents[2]

WATCH = """
import os, pathlib, sys, sysconfig
import numpy, {framework}
package, python = pathlib.Path({package!r}), pathlib.Path(sysconfig.get_path("stdlib"))
seen = []

def hook(event, arguments):
    # An import looks for files (os.listdir) and reads the module's source or its cached code.
    if event.startswith(("socket.", "subprocess.", "os.", "shutil.", "urllib.", "pickle.")):
        if event != "os.listdir":
            seen.append((event, str(arguments)))
    if event == "open":
        path, mode, flags = arguments
        above = pathlib.Path(path).parents if isinstance(path, str) else ()
        module = python in above and path.endswith((".py", ".pyc"))
        writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (module or package in above) or writes:
            seen.append((event, str(arguments)))

class Environment(dict):
    def __getitem__(self, name):
        seen.append(("environment", name))
        return super().__getitem__(name)
    def get(self, name, default=None):
        seen.append(("environment", name))
        return super().get(name, default)

sys.dont_write_bytecode = True
os.environ = Environment(os.environ)
sys.addaudithook(hook)
{code}
found = list(seen)
print(found)
"""


def touched(code: str, framework: str = "numpy") -> list[tuple[str, str]]:
    """The audit events of `code` beyond reading the package's own files."""
    program = WATCH.format(package=str(PACKAGE), framework=framework, code=code)
    done = run_python("-W", "error", "-c", program)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


WINGS = {
    "spoloss": "numpy",
    "spoloss.torch": "torch, torch.utils.checkpoint",
    "spoloss.jax": "jax.numpy",
}


@pytest.mark.parametrize("module", WINGS)
def test_an_import_touches_nothing(module: str) -> None:
    assert touched(f"import {module}", WINGS[module]) == []


def test_import_loads_no_framework() -> None:
    done = run_python(
        "-W",
        "error",
        "-c",
        "import sys, spoloss, numpy; a = numpy.zeros(2); spoloss.spo_loss(a, a, a, a, beta=0.1)\n"
        "print({'torch', 'jax', 'jaxlib', 'mlx', 'array_api_compat'} & set(sys.modules))",
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_the_torch_floor_names_its_extra() -> None:
    done = run_python("-c", "import sys; sys.modules['torch'] = None; import spoloss.torch")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        'ImportError: spoloss.torch needs PyTorch: pip install "spoloss[torch]"'
    )


PICKLE = re.compile(
    r"torch\.load\(|(?:pickle|joblib|dill)\.loads?\(|allow_pickle=True"
    r"|trust_remote_code=True|safe_serialization=False|weights_only=False"
)


def test_nothing_that_users_run_loads_a_pickle() -> None:
    """A pickle runs code when it is loaded; models and tensors are safetensors."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "docs").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    files += [*(ROOT / "benchmarks").rglob("*.py"), ROOT / "README.md"]
    assert len(files) > 50
    found = {str(path): PICKLE.findall(path.read_text()) for path in files}
    assert {path: calls for path, calls in found.items() if calls} == {}
