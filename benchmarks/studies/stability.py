"""Which settings does preference training survive? Learning rates, betas, noise and clipping.

    python -m benchmarks.studies stability        180 runs of one seed, ten minutes on two cores

Every run starts from the same fine-tuned policy and takes 150 steps at a constant learning rate.
It stops at the first loss or gradient that is not finite. A run that was interrupted goes on when
the same command is given again. One seed: a single run says little, their counts say more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks import record
from benchmarks.studies.alignment import FULL_FOUNDATION
from benchmarks.studies.arms import CLEAN, NOISY, Arm
from benchmarks.studies.experiment import arm_job, foundation_job, foundation_name
from benchmarks.studies.figures import save
from benchmarks.studies.language_task import LanguageFoundation
from benchmarks.studies.report import PACKAGES
from benchmarks.studies.results import Row, rewards_win_rate
from benchmarks.studies.runner import Job, command_line, run_jobs
from benchmarks.studies.store import Store, open_store
from benchmarks.studies.training import Stage

OUTPUT = record.RESULTS / "alignment" / "stability"
SEED = 0


@dataclass(frozen=True)
class Setting:
    """One run of the study."""

    arm: Arm
    lr: float
    clip: float | None

    @property
    def name(self) -> str:
        """Under which the store keeps it."""
        return f"seed-{SEED}/lr{self.lr:g}-{self.clipping}-{self.arm}"

    @property
    def clipping(self) -> str:
        """How the gradient is clipped, in words."""
        return "unclipped" if self.clip is None else f"clipped at {self.clip:g}"


@dataclass(frozen=True)
class Study:
    """The grid, and what its runs have in common."""

    foundation: LanguageFoundation
    stage: Stage
    forms: tuple[str, ...]
    betas: tuple[float, ...]
    rates: tuple[float, ...]
    clips: tuple[float | None, ...]

    def runs(self) -> list[Setting]:
        """Every run of the grid."""
        return [
            Setting(Arm(form, beta, labels), lr, clip)
            for form, beta, labels, lr, clip in itertools.product(
                self.forms, self.betas, (CLEAN, NOISY), self.rates, self.clips
            )
        ]

    def jobs(self) -> list[Job]:
        """The foundation, and a job for every run."""
        return [
            foundation_job(self.foundation, SEED),
            *(
                arm_job(
                    run.name,
                    run.arm,
                    replace(self.stage, lr=run.lr, clip=run.clip),
                    self.foundation,
                    SEED,
                )
                for run in self.runs()
            ),
        ]


STUDY = Study(
    foundation=replace(FULL_FOUNDATION, answers=16, limit_answers=16),
    stage=Stage(pairs=3000, steps=150, lr_end=1.0),
    forms=("dpo", "spo", "spo-below0", "spo-below-1", "spo-below-2"),
    betas=(0.1, 1.0, 5.0),
    rates=(3e-4, 1e-3, 3e-3),
    clips=(1.0, None),
)


def report(study: Study, store: Store) -> None:
    """Writes and draws what became of every run, and prints counts."""
    title = f"{record.machine(*PACKAGES)}; seed {SEED} alone, {study.stage.steps} steps a run"
    rows = [row_of(run, store) for run in study.runs()]
    record.write(store.folder / "stability.csv", title, rows)
    save(draw(study, rows), store.folder / "stability.png", title)
    print(f"{store.folder}: {title}\n\n{counts(rows).to_string(float_format='{:.3g}'.format)}")


def row_of(run: Setting, store: Store) -> Row:
    """What became of a run."""
    found, sft = store.read(run.name), store.read(foundation_name(SEED))
    return {
        "form": run.arm.form,
        "beta": run.arm.beta,
        "lr": run.lr,
        "labels": run.arm.labels,
        "clip": "none" if run.clip is None else run.clip,
        "stopped_at": found["stopped_at"],
        "grad_norm_max": found["grad_norm_max"],
        "win_rate": rewards_win_rate(found, sft),
        **{key: found[key] for key in ("kl", "malformed", "lowest_x")},
    }


def counts(rows: Sequence[Row]) -> pd.DataFrame:
    """Stopped runs, runs that lose against SFT, and the largest gradient norm, by form and clip.

    A run that was broken before it stopped has no win rate, and counts as one that loses.
    """
    runs = pd.DataFrame(rows).assign(
        stopped=lambda runs: runs["stopped_at"].notna(),
        below_sft=lambda runs: ~(runs["win_rate"] > 0.5),
    )
    return runs.groupby(["form", "clip"], sort=False).agg(
        runs=("stopped", "size"),
        stopped=("stopped", "sum"),
        below_sft=("below_sft", "sum"),
        grad_norm_max=("grad_norm_max", "max"),
        win_rate=("win_rate", lambda rates: rates.fillna(0.0).mean()),
    )


def draw(study: Study, rows: Sequence[Row]) -> Figure:
    """Win rate over SFT of every run; a stopped run says at which step it stopped."""
    figure = Figure(figsize=(3.2 * len(study.forms), 5.5), layout="constrained", dpi=90)
    panels = figure.subplots(1, len(study.forms), squeeze=False)[0]
    settings = list(itertools.product(study.betas, study.rates))
    columns = list(itertools.product((CLEAN, NOISY), study.clips))
    for axes, form in zip(panels, study.forms, strict=True):
        grid = np.full((len(settings), len(columns)), math.nan)
        for row in (row for row in rows if row["form"] == form):
            clip = None if row["clip"] == "none" else row["clip"]
            y, x = settings.index((row["beta"], row["lr"])), columns.index((row["labels"], clip))
            stopped = row["stopped_at"]
            grid[y, x] = math.nan if stopped else 100 * row["win_rate"]
            note = f"stop\n{stopped}" if stopped else f"{grid[y, x]:.0f}"
            axes.text(x, y, note, ha="center", va="center", fontsize=7)
        image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        axes.set_facecolor("silver")
        axes.set_title(form)
        names = [f"{labels}\n{'no clip' if c is None else f'clip {c:g}'}" for labels, c in columns]
        axes.set_xticks(range(len(columns)), names, fontsize=7)
        names = [f"β {beta:g}, lr {lr:g}" for beta, lr in settings]
        axes.set_yticks(range(len(settings)), names, fontsize=7)
    figure.colorbar(image, ax=panels, label="win rate vs SFT, %")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study.

    Raises:
      InputError: the results folder cannot be used.
    """
    options = command_line("stability", __doc__, str(OUTPUT)).parse_args(argv)
    store = open_store(options.output or OUTPUT, asdict(STUDY))
    run_jobs(STUDY.jobs(), store, options.workers)
    report(STUDY, store)
