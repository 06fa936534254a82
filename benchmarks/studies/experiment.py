"""The parts of an experiment: arms that start from a seed's foundation, and what they leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from benchmarks.studies.arms import Arm
from benchmarks.studies.evaluation import measure_pairs
from benchmarks.studies.foundation import Foundation, foundation_name
from benchmarks.studies.pretrained import TopBlocks
from benchmarks.studies.runner import Job
from benchmarks.studies.store import Store
from benchmarks.studies.training import Pairs, Rounds, Stage, fixed_batches, train_on_pairs

MEASURED_PAIRS, SNAPSHOT_PAIRS = 64, 32
"""Pairs, trained and held out, that are measured after training, and on the way."""


def run_arm(
    name: str, arm: Arm, stage: Stage, foundation: Foundation, seed: int, store: Store
) -> None:
    """Trains one arm from the foundation and judges it.

    Args:
      name: under which the store keeps the result; it also seeds the policy's answers.
      arm: loss, beta and learning rate.
      stage: how it is trained.
      foundation: what it starts from.
      seed: whose foundation that is.
      store: where that lies and the result goes.
    """
    stage = stage if arm.rate is None else replace(stage, lr=arm.rate)
    ground = foundation.load(store, seed)
    pairs = ground.pairs[: stage.pairs]
    splits = {"train": pairs, "held_out": ground.held_out}
    snapshots: list[dict[str, Any]] = []
    judgements: list[dict[str, Any]] = []

    def look(step: int, policy: TopBlocks) -> None:
        if stage.shows_margins(step):
            for split, seen in splits.items():
                measured = measure_pairs(policy, seen[:SNAPSHOT_PAIRS], arm.beta)
                snapshots.append({"step": step, "split": split, **measured})
        if step in stage.judgements:
            judged = ground.on_the_way.judge(policy, f"{name}/step {step}")
            judgements.append({"step": step, **judged})

    def batches(policy: TopBlocks) -> Iterator[Pairs]:
        if isinstance(stage, Rounds):
            return ground.rounds(policy, stage, seed)
        return fixed_batches(pairs, stage, seed)

    trained = train_on_pairs(ground.policy, batches, arm, stage, look)
    store.write(
        name,
        {
            **ground.judge(trained.policy, name),
            **trained.summary(),
            **{
                split: measure_pairs(trained.policy, seen[:MEASURED_PAIRS], arm.beta)
                for split, seen in splits.items()
            },
            "snapshots": snapshots,
            "judgements": judgements,
        },
    )


@dataclass(frozen=True)
class Part:
    """Arms that are trained alike.

    Attributes:
      name: how it is called.
      arms: each of them trained for every seed.
      stage: how.
      seeds: those with which all of it is repeated, from the openings' split to the order of pairs.
      prefix: stands before an arm in the store; parts with the same stage can share it, and with
        it the results of the same arms.
    """

    name: str
    arms: tuple[Arm, ...]
    stage: Stage
    seeds: range
    prefix: str

    def result_name(self, arm: Arm, seed: int) -> str:
        """Under which the store keeps an arm."""
        return f"seed-{seed}/{self.prefix}{arm}"

    def settings(self) -> dict[str, Any]:
        """All of it, as it is written to settings.json."""
        return {
            "seeds": list(self.seeds),
            "arms": [str(arm) for arm in self.arms],
            "stage": asdict(self.stage),
        }


def settings_of(foundation: Foundation, parts: Sequence[Part]) -> dict[str, Any]:
    """What the results of an experiment depend on, for settings.json."""
    return {"foundation": foundation.settings(), **{part.name: part.settings() for part in parts}}


def jobs_of(foundation: Foundation, parts: Sequence[Part]) -> list[Job]:
    """The jobs of parts of an experiment, seed by seed, each seed's foundation first."""
    found: dict[str, Job] = {}  # parts may share an arm
    for seed in sorted({seed for part in parts for seed in part.seeds}):
        needed = foundation_name(seed)
        found[needed] = Job(needed, partial(foundation.lay, seed))
        for part in (part for part in parts if seed in part.seeds):
            for arm in part.arms:
                name = part.result_name(arm, seed)
                function = partial(run_arm, name, arm, part.stage, foundation, seed)
                found.setdefault(name, Job(name, function, needs=(needed,)))
    return list(found.values())
