"""The alignment experiment at a size for tests, and what its runs leave in a folder."""

from __future__ import annotations

import csv
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.alignment import seeds
from benchmarks.alignment.arms import parse_arm
from benchmarks.alignment.language_protocols import MEMORISED, PREFERENCE
from benchmarks.alignment.language_task import LanguageFoundation
from benchmarks.alignment.model import Policy
from benchmarks.alignment.protocol import Part, Protocol
from benchmarks.alignment.runner import Job
from benchmarks.alignment.store import Store
from benchmarks.alignment.training import Stage, StepHook

TINY = Protocol(
    foundation=LanguageFoundation(
        fine_tuning=Stage(pairs=300, steps=12, batch=16, lr=2e-3, clip=None),
        pairs=48,
        held_out_pairs=32,
        answers=4,
        limit_answers=16,
    ),
    parts=(
        Part(
            PREFERENCE,
            arms=tuple(map(parse_arm, ("dpo:0.1", "spo:0.1", "dpo:0.4", "spo:0.1@noisy"))),
            stage=Stage(pairs=48, steps=4, batch=8, snapshots=2),
            seeds=2,
        ),
        Part(
            MEMORISED,
            arms=(parse_arm("spo:0.25"),),
            stage=Stage(pairs=8, steps=4, batch=4, lr_end=1.0, snapshots=2),
            seeds=1,
            prefix="memorised-",
        ),
    ),
)


@dataclass(frozen=True)
class Interrupted(Protocol):
    """A protocol with a job among its own that presses Ctrl-C and never ends by itself."""

    after: int = 0

    def jobs(self) -> list[Job]:
        """Those of the protocol, and the interrupting one after so many of them."""
        jobs = super().jobs()
        return [*jobs[: self.after], Job("interrupt", 1, interrupt), *jobs[self.after :]]

    def settings(self) -> dict[str, object]:
        """Those of the protocol."""
        return Protocol(self.foundation, self.parts).settings()


def interrupted(protocol: Protocol, after: int) -> Interrupted:
    """A protocol that is stopped after so many jobs; for a process of its own."""
    # Where a shell has started the tests in the background, Python ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return Interrupted(protocol.foundation, protocol.parts, after)


def interrupt(store: Store, hook: StepHook) -> None:  # noqa: ARG001
    """Sends SIGINT to the process that runs the experiment, and works until it is stopped."""
    os.kill(os.getppid(), signal.SIGINT)
    while True:
        time.sleep(0.01)
        hook()


def policy_of(name: str) -> Policy:
    """A new policy, the same for the same name."""
    torch.manual_seed(seeds.number(name))
    return Policy()


def published(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without its subfolders."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, below a line that names the versions."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    assert f"torch {torch.__version__.partition('+')[0]}" in first
    return list(csv.DictReader(lines))
