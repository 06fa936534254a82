"""Which settings does preference training survive? Learning rates, betas, noise and clipping.

    python -m benchmarks.alignment.stability        180 runs of one seed, ten minutes on two cores

Every run starts from the same fine-tuned policy and takes 150 steps at a constant learning rate.
It stops at the first loss or gradient that is not finite. Results go to the results folder; a run
that was interrupted goes on when the same command is given again. One seed: a single run says
little, their counts say more.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.alignment.arms import CLEAN, NOISY, Arm
from benchmarks.alignment.command import Plan, at_least_one, carry_out, command_line
from benchmarks.alignment.experiment import foundation_name
from benchmarks.alignment.figures import save
from benchmarks.alignment.language_protocols import FULL
from benchmarks.alignment.language_task import LanguageFoundation
from benchmarks.alignment.protocol import arm_job, foundation_job
from benchmarks.alignment.report import PACKAGES, markdown, write_csv
from benchmarks.alignment.results import rewards_win_rate
from benchmarks.alignment.runner import Job
from benchmarks.alignment.store import Store, write_atomically
from benchmarks.alignment.training import Stage
from benchmarks.record import machine as describe

PROGRAM = "python -m benchmarks.alignment.stability"
OUTPUT = Path("runs/alignment-stability")
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
    foundation=replace(FULL.foundation, answers=16, limit_answers=16),
    stage=Stage(pairs=3000, steps=150, lr_end=1.0),
    forms=("dpo", "spo", "spo-below0", "spo-below-1", "spo-below-2"),
    betas=(0.1, 1.0, 5.0),
    rates=(3e-4, 1e-3, 3e-3),
    clips=(1.0, None),
)


# ------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    setting: Setting
    stopped_at: int | None
    grad_norm_max: float
    win_rate: float
    kl: float
    malformed: float
    lowest_x: float

    @property
    def stopped(self) -> bool:
        """Whether it met a loss or gradient that is not finite."""
        return self.stopped_at is not None

    @property
    def worse_than_sft(self) -> bool:
        """Whether its answers lose against those that it started from, or there are none."""
        return not self.win_rate > 0.5


@dataclass(frozen=True)
class Count:
    """Runs taken together, and what they have in common."""

    name: str
    outcomes: list[Outcome]

    @property
    def stopped(self) -> int:
        """How many were stopped."""
        return sum(outcome.stopped for outcome in self.outcomes)

    @property
    def worse_than_sft(self) -> int:
        """How many ended worse than they began."""
        return sum(outcome.worse_than_sft for outcome in self.outcomes)

    @property
    def grad_norm_max(self) -> float:
        """The greatest gradient norm of any."""
        return max(outcome.grad_norm_max for outcome in self.outcomes)

    @property
    def win_rate(self) -> float:
        """Mean win rate over SFT of the policies that the runs left; a broken one wins nothing."""
        rates = [outcome.win_rate for outcome in self.outcomes]
        return statistics.fmean(0.0 if math.isnan(rate) else rate for rate in rates)

    @property
    def kl(self) -> float:
        """Median divergence from the reference; a broken policy's is infinite."""
        divergences = [outcome.kl for outcome in self.outcomes]
        return statistics.median(math.inf if math.isnan(kl) else kl for kl in divergences)

    @property
    def merit(self) -> tuple[int, int, float]:
        """What the recommendation goes by: the smallest is the best."""
        return self.stopped, self.worse_than_sft, -self.win_rate


def report(study: Study, store: Store) -> str:
    """Writes CSV, figure and tables, and returns the tables."""
    sft = store.read(foundation_name(SEED))
    outcomes = [outcome_of(run, store.read(run.name), sft) for run in study.runs()]
    header = f"{describe(*PACKAGES)}; seed {SEED} alone, {study.stage.steps} steps a run"
    found = [header, count_table(outcomes), cell_table(study, outcomes), advice(outcomes)]
    text = "\n\n".join(found)
    write_atomically(store.folder / "tables.md", f"{text}\n".encode())
    write_csv(store.folder, "stability", [row_of(outcome) for outcome in outcomes], header)
    save(draw(study, outcomes), store.folder / "stability.png", header)
    return text


def outcome_of(run: Setting, found: dict[str, Any], sft: dict[str, Any]) -> Outcome:
    """Puts together what became of a run."""
    keys = ("stopped_at", "grad_norm_max", "kl", "malformed", "lowest_x")
    return Outcome(run, win_rate=rewards_win_rate(found, sft), **{key: found[key] for key in keys})


def count_by(key: Callable[[Setting], str], outcomes: Iterable[Outcome]) -> list[Count]:
    """Takes together the runs for which the key is the same."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(key(outcome.setting), []).append(outcome)
    return [Count(name, found) for name, found in groups.items()]


def form_of(setting: Setting) -> str:
    """The form of the run's loss."""
    return setting.arm.form


def cell_of(setting: Setting) -> str:
    """The run's beta and learning rate."""
    return f"β {setting.arm.beta:g}, lr {setting.lr:g}"


def count_table(outcomes: Sequence[Outcome]) -> str:
    """What became of the runs, by form and clipping."""
    columns = ["", "runs", "stopped", "below SFT", "greatest gradient norm"]
    columns += ["win rate vs SFT, mean (%)", "KL, median (nats)"]
    rows = [
        [
            each.name,
            str(len(each.outcomes)),
            str(each.stopped),
            str(each.worse_than_sft),
            f"{each.grad_norm_max:.2g}",
            f"{100 * each.win_rate:.1f}",
            f"{each.kl:.2f}",
        ]
        for each in count_by(lambda s: f"{s.arm.form}, {s.clipping}", outcomes)
    ]
    return markdown("All learning rates, betas and labels", columns, rows)


def cell_table(study: Study, outcomes: Sequence[Outcome]) -> str:
    """Stopped runs and greatest gradient norms by beta and learning rate."""
    rows = []
    for form in study.forms:
        cells = count_by(cell_of, (each for each in outcomes if each.setting.arm.form == form))
        notes = [f"{c.stopped} of {len(c.outcomes)}; {c.grad_norm_max:.2g}" for c in cells]
        rows.append([form, *notes])
    columns = ["stopped of all; greatest norm", *(each.name for each in cells)]
    return markdown("By beta and learning rate (both labels, both clippings)", columns, rows)


def advice(outcomes: Sequence[Outcome]) -> str:
    """The setting of SPO that the counts speak for, and what they leave open."""
    spos = [each for each in outcomes if each.setting.arm.form.startswith("spo")]
    best, *others = sorted(count_by(form_of, spos), key=lambda each: each.merit)
    cell = min(count_by(cell_of, best.outcomes), key=lambda each: each.merit)
    rest = ", ".join(f"{each.name} {each.stopped} and {each.worse_than_sft}" for each in others)
    return (
        "Recommended for SPO (fewest stopped runs, then fewest below SFT, then the best mean win "
        f"rate): {best.name}. Of its {len(best.outcomes)} runs {best.stopped} stopped and "
        f"{best.worse_than_sft} ended below SFT (of as many: {rest}). Within it {cell.name}: "
        f"{100 * cell.win_rate:.1f} % over SFT on average. With one seed, a few runs more or less "
        "below SFT decide nothing."
    )


def row_of(outcome: Outcome) -> dict[str, Any]:
    """A row of stability.csv."""
    setting = outcome.setting
    row = {"form": setting.arm.form, "beta": setting.arm.beta, "lr": setting.lr}
    row["labels"] = setting.arm.labels
    row["clip"] = "none" if setting.clip is None else setting.clip
    return {**row, **{key: value for key, value in vars(outcome).items() if key != "setting"}}


def draw(study: Study, outcomes: Sequence[Outcome]) -> Figure:
    """Win rate over SFT of every run; a stopped run says at which step it stopped."""
    figure = Figure(figsize=(3.2 * len(study.forms), 5.5), layout="constrained", dpi=90)
    panels = figure.subplots(1, len(study.forms), squeeze=False)[0]
    rows = list(itertools.product(study.betas, study.rates))
    columns = list(itertools.product((CLEAN, NOISY), study.clips))
    for axes, form in zip(panels, study.forms, strict=True):
        grid = np.full((len(rows), len(columns)), math.nan)
        for outcome in outcomes:
            setting, arm = outcome.setting, outcome.setting.arm
            if arm.form == form:
                place = (
                    rows.index((arm.beta, setting.lr)),
                    columns.index((arm.labels, setting.clip)),
                )
                grid[place] = math.nan if outcome.stopped else 100 * outcome.win_rate
                note = f"stop\n{outcome.stopped_at}" if outcome.stopped else f"{grid[place]:.0f}"
                axes.text(*place[::-1], note, ha="center", va="center", fontsize=7)
        image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        axes.set_facecolor("silver")
        axes.set_title(form)
        names = [f"{labels}\n{'no clip' if c is None else f'clip {c:g}'}" for labels, c in columns]
        axes.set_xticks(range(len(columns)), names, fontsize=7)
        axes.set_yticks(range(len(rows)), [f"β {b:g}, lr {lr:g}" for b, lr in rows], fontsize=7)
    figure.colorbar(image, ax=panels, label="win rate vs SFT, %")
    return figure


# ---------------------------------------------------------------------------------- command line


def plan(argv: Sequence[str] | None) -> Plan:
    """Reads the command line.

    Raises:
      InputError: an option is unknown or out of range.
    """
    options = command_line(PROGRAM, __doc__, str(OUTPUT)).parse_args(argv)
    workers = at_least_one("--workers", options.workers)
    report_study = partial(report, STUDY)
    return Plan(asdict(STUDY), STUDY.jobs(), report_study, options.output or OUTPUT, workers)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study and returns its exit code."""
    return carry_out(PROGRAM, partial(plan, argv))


if __name__ == "__main__":
    sys.exit(main())
