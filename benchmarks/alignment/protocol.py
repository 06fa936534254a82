"""The two protocols, quick and full, and the jobs that each consists of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from benchmarks.alignment.arms import Arm, parse_arm
from benchmarks.alignment.experiment import (
    Foundation,
    foundation_name,
    lay_foundation,
    run_arm,
)
from benchmarks.alignment.runner import Job
from benchmarks.alignment.training import Stage


@dataclass(frozen=True)
class Protocol:
    """The whole experiment.

    Attributes:
      foundation: what every arm of a seed starts from.
      seeds: how often all of it is repeated, from the prompts' split to the order of pairs.
      arms: trained at the stage `preference`, for every seed.
      preference: the preference stage.
      memorised_arms: trained at the stage `memorised`, for seed 0.
      memorised: a long stage on few pairs.
    """

    foundation: Foundation
    seeds: int
    arms: tuple[Arm, ...]
    preference: Stage
    memorised_arms: tuple[Arm, ...]
    memorised: Stage

    def settings(self) -> dict[str, Any]:
        """All of it, as it is written to settings.json."""
        arms = {
            name: [str(arm) for arm in getattr(self, name)] for name in ("arms", "memorised_arms")
        }
        return {**asdict(self), **arms}

    def jobs(self) -> list[Job]:
        """Its parts, seed by seed."""
        found = []
        for seed in range(self.seeds):
            found.append(foundation_job(self.foundation, seed))
            if seed == 0:
                found += [
                    arm_job(memorised_name(arm), arm, self.memorised, self.foundation, seed)
                    for arm in self.memorised_arms
                ]
            found += [
                arm_job(arm_name(arm, seed), arm, self.preference, self.foundation, seed)
                for arm in self.arms
            ]
        return found


def arm_name(arm: Arm, seed: int) -> str:
    """Under which the store keeps an arm."""
    return f"seed-{seed}/{arm}"


def memorised_name(arm: Arm) -> str:
    """Under which the store keeps an arm that memorised a few pairs."""
    return f"seed-0/memorised-{arm}"


def foundation_job(foundation: Foundation, seed: int) -> Job:
    """The job that lays a seed's foundation."""
    function = partial(lay_foundation, foundation, seed)
    return Job(foundation_name(seed), foundation.fine_tuning.steps, function)


def arm_job(name: str, arm: Arm, stage: Stage, foundation: Foundation, seed: int) -> Job:
    """The job that trains and judges an arm."""
    function = partial(run_arm, name, arm, stage, foundation, seed)
    return Job(name, stage.steps, function, needs=foundation_name(seed))


def _arms(form: str, *betas: str) -> tuple[Arm, ...]:
    return tuple(parse_arm(f"{form}:{beta}") for beta in betas)


QUICK = Protocol(
    foundation=Foundation(
        fine_tuning=Stage(pairs=10_000, steps=600, batch=64, lr=2e-3, clip=None),
        pairs=2000,
        held_out_pairs=512,
        answers=64,
        limit_answers=400,
    ),
    seeds=1,
    arms=(*_arms("dpo", "0.1", "0.4"), *_arms("spo", "0.1")),
    preference=Stage(pairs=2000, steps=200, snapshots=5),
    memorised_arms=(*_arms("dpo", "0.25"), *_arms("spo", "0.25")),
    memorised=Stage(pairs=64, steps=300, lr_end=1.0, snapshots=10),
)
FULL = Protocol(
    foundation=replace(
        QUICK.foundation,
        fine_tuning=replace(QUICK.foundation.fine_tuning, steps=1000),
        pairs=3000,
    ),
    seeds=5,
    arms=(
        *_arms("dpo", "0.025", "0.05", "0.1", "0.2", "0.25", "0.4", "1", "4"),
        *_arms("spo", "0.025", "0.05", "0.1", "0.25", "1"),
        *_arms("spo-below0", "0.1"),
        *_arms("squared", "0.1", "0.2"),
        *_arms("dpo-soft", "0.25"),
        *_arms("squared-gap", "0.25"),
        *_arms("spo-gap", "0.25"),
        *_arms("spo-gap-floor", "0.25"),
        *_arms("spo-gap-weighted", "0.25"),
        *_arms("spo-gap-weighted-below0", "0.25"),
        *_arms("dpo", "0.025@noisy", "0.1@noisy", "0.25@noisy", "0.4@noisy", "1@noisy"),
        *_arms("spo", "0.025@noisy", "0.1@noisy", "0.25@noisy"),
        *_arms("spo-below0", "0.1@noisy"),
    ),
    preference=Stage(pairs=3000, steps=300, snapshots=5),
    memorised_arms=(*_arms("dpo", "0.1", "1"), *_arms("spo", "0.1", "1")),
    memorised=Stage(pairs=300, steps=1500, lr_end=1.0, snapshots=30),
)
