"""The results folder: its settings, and the finished parts of a run, each in a file of its own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

import spoloss
from benchmarks.studies import InputError

SETTINGS, WORK, TENSORS = "settings.json", "work", ".safetensors"


@dataclass(frozen=True)
class Store:
    """A results folder. What a run needs to go on lies in `work`, which git does not see."""

    folder: Path

    def path(self, name: str, suffix: str = ".json") -> Path:
        """Where the part of a run with this name lies."""
        return self.folder / WORK / (name.replace(":", "_") + suffix)

    def has(self, name: str) -> bool:
        """Whether the part is finished."""
        return self.path(name).exists()

    def read(self, name: str) -> dict[str, Any]:
        """A finished part."""
        part: dict[str, Any] = json.loads(self.path(name).read_text(encoding="utf-8"))
        return part

    def write(self, name: str, part: dict[str, Any]) -> None:
        """Keeps a part as finished: wholly or not at all."""
        write_atomically(self.path(name), json.dumps(part).encode())

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors that were kept."""
        return load_file(self.path(name, TENSORS))

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors by name: wholly or not at all."""
        write_atomically(self.path(name, TENSORS), save(tensors))


def open_store(folder: Path, settings: dict[str, Any]) -> Store:
    """Opens a new results folder, or one of a run with the same settings and versions.

    A part of a study that the folder does not have yet is added to its settings.

    Raises:
      InputError: the folder is another run's or not a run's at all; nothing in it is changed.
    """
    path = folder / SETTINGS
    versions = {"spoloss": spoloss.__version__, "torch": torch.__version__}
    asked = json.loads(json.dumps({"versions": versions, **settings}))
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not found and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: expected a folder of results, or an empty one")
    if differing := sorted(key for key in found.keys() & asked if found[key] != asked[key]):
        raise InputError(
            f"{folder}: expected results of the same settings, but these differ: "
            f"{', '.join(differing)}; choose another --output"
        )
    if asked.keys() - found:
        content = json.dumps(found | asked, indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, content.encode())
    # A folder that ignores itself stays out of any repository that the results are put in.
    write_atomically(folder / WORK / ".gitignore", b"*\n")
    return Store(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    draft.write_bytes(content)
    draft.replace(path)
