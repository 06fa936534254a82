"""The parts of an experiment: arms that start from a seed's foundation, and what they leave."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.studies.arms import Arm
from benchmarks.studies.evaluation import measure_pairs
from benchmarks.studies.foundation import ANSWERS_ON_THE_WAY, Foundation, foundation_name
from benchmarks.studies.pretrained import TopBlocks
from benchmarks.studies.store import Store
from benchmarks.studies.training import Pairs, Rounds, Stage, fixed_batches, train_on_pairs

MEASURED_PAIRS, SNAPSHOT_PAIRS = 64, 32
"""Pairs, trained and held out, that are measured after training, and on the way."""


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


def run_parts(parts: Sequence[Part], foundation: Foundation, store: Store, workers: int) -> None:
    """Runs what is not finished of some parts: each seed's foundation, then the arms."""
    seeds = sorted({seed for part in parts for seed in part.seeds})
    grounds = {foundation_name(seed): partial(foundation.lay, seed) for seed in seeds}
    arms = {
        part.result_name(arm, seed): partial(run_arm, arm, seed, part, foundation)
        for seed in seeds
        for part in parts
        if seed in part.seeds
        for arm in part.arms
    }
    for jobs in (grounds, arms):
        run_jobs(jobs, store, workers)


def run_jobs(jobs: Mapping[str, Callable[[Store], None]], store: Store, workers: int) -> None:
    """Runs jobs in so many worker processes of one thread each.

    Every result is written whole or not at all, so an interrupted run goes on where it was.

    Args:
      jobs: by the name under which the store keeps their results; finished ones are left out.
      store: where results go.
      workers: processes at work.
    """
    waiting = [job for name, job in jobs.items() if not store.has(name)]
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        finished = pool.map(methodcaller("__call__", store), waiting)
        for _ in tqdm(finished, total=len(waiting), unit="job"):
            pass


def run_arm(arm: Arm, seed: int, part: Part, foundation: Foundation, store: Store) -> None:
    """Trains an arm of a part from a seed's foundation, and judges it."""
    name = part.result_name(arm, seed)
    stage = part.stage if arm.rate is None else replace(part.stage, lr=arm.rate)
    ground = foundation.load(seed, store)
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
            each = min(foundation.answers, ANSWERS_ON_THE_WAY)
            judged = ground.judge(policy, f"{name}/step {step}", each)
            judgements.append({"step": step, **judged})

    def batches(policy: TopBlocks) -> Iterator[Pairs]:
        if isinstance(stage, Rounds):
            return ground.rounds(policy, stage)
        return fixed_batches(pairs, stage, seed)

    trained = train_on_pairs(ground.reference, batches, arm, stage, look)
    store.write(
        name,
        {
            **ground.judge(trained.policy, name, foundation.answers),
            **trained.summary(),
            **{
                split: measure_pairs(trained.policy, seen[:MEASURED_PAIRS], arm.beta)
                for split, seen in splits.items()
            },
            "snapshots": snapshots,
            "judgements": judgements,
        },
    )
