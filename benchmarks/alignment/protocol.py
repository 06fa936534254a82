"""An experiment: its parts, and the jobs that they consist of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from benchmarks.alignment.arms import Arm, parse_arm
from benchmarks.alignment.experiment import Foundation, foundation_name, run_arm
from benchmarks.alignment.runner import Job
from benchmarks.alignment.training import Stage


@dataclass(frozen=True)
class Part:
    """Arms that are trained alike.

    Attributes:
      name: how it is called.
      arms: each of them trained for every seed.
      stage: how.
      seeds: how often all of it is repeated, from the prompts' split to the order of pairs.
      first_seed: the seeds are counted from here.
      prefix: stands before an arm in the store; parts with the same stage can share it, and with
        it the results of the same arms.
    """

    name: str
    arms: tuple[Arm, ...]
    stage: Stage
    seeds: int
    prefix: str = ""
    first_seed: int = 0

    @property
    def all_seeds(self) -> range:
        """The seeds themselves."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def result_name(self, arm: Arm, seed: int) -> str:
        """Under which the store keeps an arm."""
        return f"seed-{seed}/{self.prefix}{arm}"

    def settings(self) -> dict[str, Any]:
        """All of it, as it is written to settings.json."""
        return {
            "seeds": list(self.all_seeds) if self.first_seed else self.seeds,
            "arms": [str(arm) for arm in self.arms],
            "stage": asdict(self.stage),
        }

    def jobs(self, foundation: Foundation[Any], seed: int) -> list[Job]:
        """Those of a seed, the foundation's left out."""
        if seed not in self.all_seeds:
            return []
        return [
            arm_job(self.result_name(arm, seed), arm, self.stage, foundation, seed)
            for arm in self.arms
        ]


@dataclass(frozen=True)
class Protocol:
    """Parts that start from the same foundations.

    Attributes:
      foundation: what every arm of a seed starts from.
      parts: the first one's arms come first.
    """

    foundation: Foundation[Any]
    parts: tuple[Part, ...]

    def settings(self) -> dict[str, Any]:
        """All of it, as it is written to settings.json."""
        parts = {part.name: part.settings() for part in self.parts}
        return {"foundation": self.foundation.settings(), **parts}

    def with_first_part(self, **changes: Any) -> Protocol:
        """The protocol with another first part."""
        first, *others = self.parts
        return replace(self, parts=(replace(first, **changes), *others))

    def jobs(self) -> list[Job]:
        """All of them, seed by seed."""
        return jobs_of(self.foundation, self.parts)


def jobs_of(foundation: Foundation[Any], parts: Sequence[Part]) -> list[Job]:
    """The jobs of parts of an experiment, seed by seed, each seed's foundation first."""
    found = []
    for seed in sorted({seed for part in parts for seed in part.all_seeds}):
        found.append(foundation_job(foundation, seed))
        for part in parts:
            found += part.jobs(foundation, seed)
    return found


def foundation_job(foundation: Foundation[Any], seed: int) -> Job:
    """The job that lays a seed's foundation."""
    return Job(foundation_name(seed), foundation.steps, partial(foundation.lay, seed))


def arm_job(name: str, arm: Arm, stage: Stage, foundation: Foundation[Any], seed: int) -> Job:
    """The job that trains and judges an arm."""
    function = partial(run_arm, name, arm, stage, foundation, seed)
    return Job(name, stage.steps, function, needs=(foundation_name(seed),))


def arms(form: str, *betas: str) -> tuple[Arm, ...]:
    """Arms of one form at betas such as "0.1" and "0.4@noisy"."""
    return tuple(parse_arm(f"{form}:{beta}") for beta in betas)
