"""The house: public names, downward imports, no framework behind `import spoloss`."""

from __future__ import annotations

import ast
import graphlib
import inspect
import itertools
import pickle
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import spoloss
import spoloss.jax
import spoloss.torch
from helpers.interpreter import run_python

PACKAGE = Path(spoloss.__file__).parent
# From the ground up; each file may import from those before it, and a wing from all of them.
CORE = (
    "spoloss._arrays",
    "spoloss._options",
    "spoloss._checks",
    "spoloss.losses",
    "spoloss._inputs",
    "spoloss.pairs",
    "spoloss.gradients",
    "spoloss._objective",
    "spoloss._linear_losses",
    "spoloss.paper",
    "spoloss.metrics",
    "spoloss",
    "spoloss.testing",
)
WINGS = {f"spoloss.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str) -> set[str]:
    """What a file imports: modules, and `a.b` for `from a import b`, which may be one."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def climbs(sources: dict[str, str]) -> set[tuple[str, str]]:
    """The imports within a package, given as modules and sources, that do not go downwards."""
    graph = {name: imported(source) & set(sources) for name, source in sources.items()}
    wrong = set()
    for name, below in graph.items():
        wing = next((w for w in WINGS if f"{name}.".startswith(f"{w}.")), None)
        for other in below:
            if wing is None:
                down = other in CORE[: CORE.index(name)]
            elif other in CORE:
                down = other != "spoloss"
            else:
                private, behind = (m.rpartition(".")[2].startswith("_") for m in (name, other))
                own = f"{other}.".startswith(f"{wing}.") and other != wing
                down = own and (behind or not private)
            wrong |= set() if down else {(name, other)}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong |= set(itertools.pairwise(error.args[1]))
    return wrong


def test_imports_run_downwards() -> None:
    sources = {module_name(path): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {name for name in sources if name.count(".") < 2} == {*CORE, *WINGS}
    assert climbs(sources) == set()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("spoloss.losses", "from spoloss.pairs import spo_loss"),
        ("spoloss.torch._head", "from spoloss.torch.logps import sequence_logps"),
        ("spoloss.torch._tiles", "from spoloss.torch._one_pass import OnePass"),
        ("spoloss.torch.logps", "from spoloss import spo_loss"),
    ],
)
def test_the_import_check_sees_a_climb(name: str, source: str) -> None:
    sources = {module_name(path): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert climbs(sources | {name: f"{sources[name]}\n{source}\n"}) != set()


def test_only_a_wing_imports_a_framework_and_only_its_own() -> None:
    for path in PACKAGE.rglob("*.py"):
        found = {n.split(".")[0] for n in imported(path.read_text())} & {"torch", "jax", "mlx"}
        assert found <= ({path.parent.name} - {"spoloss"}), path


@pytest.mark.parametrize("module", [spoloss, spoloss.torch, spoloss.jax])
def test_public_names_are_all_and_documented(module: object) -> None:
    names = {
        n for n, v in vars(module).items() if not n.startswith("_") and not inspect.ismodule(v)
    }
    assert set(module.__all__) == names  # type: ignore[attr-defined]
    assert all(inspect.getdoc(getattr(module, name)) for name in names)


def undocumented(function: Any) -> set[str]:
    """Arguments without an entry under Args, in the docstring that help() shows."""
    text = inspect.getdoc(function) or ""
    arguments = [name for name in inspect.signature(function).parameters if name != "self"]
    return {name for name in arguments if not re.search(rf"^ +{name}: ", text, re.M)}


def documented() -> dict[str, Any]:
    """The public functions, classes with arguments, and the modules' forward methods."""
    found = {}
    for module in (spoloss, spoloss.torch, spoloss.jax):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isroutine(thing):
                found[f"{module.__name__}.{name}"] = thing
            if isinstance(thing, type) and issubclass(thing, torch.nn.Module):
                found[f"{module.__name__}.{name}"] = thing
                found[f"{module.__name__}.{name}.forward"] = thing.forward
    return found


DOCUMENTED = documented()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_argument_is_documented(name: str) -> None:
    thing = DOCUMENTED[name]
    assert undocumented(thing) == set()
    hints = typing.get_type_hints(thing.__init__ if isinstance(thing, type) else thing)
    assert {*inspect.signature(thing).parameters} - {"self"} <= set(hints)


@pytest.mark.parametrize("wing", [spoloss.torch, spoloss.jax])
def test_a_named_loss_of_a_wing_survives_pickling(wing: Any) -> None:
    found = pickle.loads(pickle.dumps(wing.linear_spo_loss))
    assert found.__self__.linear_pair_loss is wing.linear_pair_loss


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


def test_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
