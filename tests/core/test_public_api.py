"""The public names with their documentation, and the order of the files behind them."""

from __future__ import annotations

import ast
import graphlib
import inspect
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

PACKAGE = Path(spoloss.__file__).parent
WINGS = {"spoloss.torch", "spoloss.jax"}


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


def test_imports_run_downwards() -> None:
    """No file imports one that stands on it; the core imports no wing, and a wing no other."""
    sources = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: imported(path.read_text()) & set(sources) for name, path in sources.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises an error for a circle
    for name, below in graph.items():
        wings = {".".join(other.split(".")[:2]) for other in below} & WINGS
        assert wings <= {".".join(name.split(".")[:2])}, name
        assert "spoloss" not in below, f"{name} needs one module and imports all of the core"


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


def test_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
