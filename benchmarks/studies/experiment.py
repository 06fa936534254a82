"""The parts of an experiment: what each of them computes and leaves in the store.

A seed has a foundation (prompts split, reference policy, pairs, limits); every arm of the seed
starts from it, on all pairs or on a few.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from benchmarks.studies import seeds
from benchmarks.studies.arms import CLEAN, FLIPPED_SHARES, NOISY, Arm
from benchmarks.studies.evaluation import measure_pairs
from benchmarks.studies.runner import Job
from benchmarks.studies.store import Store, write_atomically
from benchmarks.studies.training import (
    Answers,
    Pairs,
    Policy,
    Rounds,
    Stage,
    fixed_batches,
    train_on_pairs,
)


@dataclass(frozen=True)
class Ground(ABC):
    """A foundation that has been laid.

    Attributes:
      policy: the reference of all arms, and what they start from.
      pairs: training pairs, each labelled by its true rewards.
      held_out: pairs on the held-out prompts, labelled by their true rewards.
    """

    policy: Policy
    pairs: Pairs
    held_out: Pairs

    @property
    def on_the_way(self) -> Ground:
        """What judges a policy during its training; it may take fewer answers."""
        return self

    def rounds(self, policy: Policy, stage: Rounds, seed: int) -> Iterator[Pairs]:
        """The pairs of each step of a stage in rounds, which the policy writes as it is trained."""
        raise NotImplementedError(f"{type(self).__name__} has no rounds")

    @abstractmethod
    def judge(self, policy: Policy, name: str) -> dict[str, Any]:
        """What a policy's own answers to the held-out prompts say of it.

        Args:
          policy: the policy.
          name: seeds the answers, so that no two policies share random numbers: with shared
            ones, policies that are nearly alike give the same text, and ties hide which of
            them is better.

        Returns:
          Means over the answers under "reward", "kl" and the task's measures, the reward of every
          answer [P, n] under "rewards", a few "texts". All nan where the policy's logits are not
          finite.
        """


@dataclass(frozen=True)
class Foundation(ABC):
    """What every arm of a seed starts from; a task is a subclass.

    Attributes:
      reference_name: how tables name the reference.
      measures: what the task measures of a policy's answers beside reward and KL.
      measured_pairs: pairs, trained and held out, that are measured after training.
      snapshot_pairs: pairs, trained and held out, that are measured on the way.
    """

    reference_name: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]
    measured_pairs: ClassVar[int]
    snapshot_pairs: ClassVar[int]

    @abstractmethod
    def lay(self, seed: int, store: Store) -> None:
        """Makes the reference and the pairs, judges the reference and finds the limits."""

    @abstractmethod
    def load(self, store: Store, seed: int) -> Ground:
        """What `lay` left in the store."""

    def settings(self) -> dict[str, Any]:
        """All that the results depend on, for settings.json."""
        return asdict(self)


def foundation_name(seed: int) -> str:
    """Under which the store keeps a seed's foundation."""
    return f"seed-{seed}/foundation"


# ------------------------------------------------------------------------------------ the labels


def labelled_for(arm: Arm, pairs: Pairs, seed: int) -> Pairs:
    """Pairs of true labels with the labels that the arm is given."""
    return pairs if arm.labels == CLEAN else pairs.flipped(wrong_labels(arm.labels, pairs, seed))


def wrong_labels(labels: str, pairs: Pairs, seed: int) -> Tensor:
    """The pairs whose labels are wrong, of those kinds of labels that have such: booleans [N]."""
    uniform = torch.rand(len(pairs), generator=seeds.generator(seed, "labels"))
    if labels in FLIPPED_SHARES:
        return uniform < FLIPPED_SHARES[labels]
    return uniform > pairs.gap.sigmoid()  # a Bradley-Terry judge of the true rewards


# ------------------------------------------------------------------------------------- the store


SUFFIX = ".safetensors"


def save_ground(
    ground: Ground, store: Store, seed: int, policy: dict[str, Tensor] | None = None
) -> None:
    """Keeps the pairs that the arms of a seed start from, and the policy's weights if given."""
    contents = {"policy": policy or {}}
    for split, pairs in (("pairs", ground.pairs), ("held_out", ground.held_out)):
        answers, rows = pairs.answers, {"chosen": pairs.chosen, "rejected": pairs.rejected}
        inputs = {f"inputs/{name}": tensor for name, tensor in answers.inputs.items()}
        known = {"rewards": answers.rewards, "reference": answers.reference}
        contents[split] = known | rows | inputs
    # A file knows neither views nor two names of one tensor, such as a tied embedding has.
    flat = {
        f"{part}/{name}": tensor.clone(memory_format=torch.contiguous_format)
        for part, tensors in contents.items()
        for name, tensor in tensors.items()
    }
    write_atomically(store.path(foundation_name(seed), SUFFIX), save(flat))


def load_kept(store: Store, seed: int) -> tuple[Pairs, Pairs, dict[str, Tensor]]:
    """The pairs, the held-out pairs, and the policy's weights if they were given."""
    flat = load_file(store.path(foundation_name(seed), SUFFIX))

    def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = (name for name in tensors if name.startswith(prefix))
        return {name.removeprefix(prefix): tensors[name] for name in names}

    def pairs(split: str) -> Pairs:
        found = under(f"{split}/", flat)
        answers = Answers(under("inputs/", found), found["rewards"], found["reference"])
        return Pairs(answers, found["chosen"], found["rejected"])

    return pairs("pairs"), pairs("held_out"), under("policy/", flat)


def describe_pairs(pairs: Pairs, seed: int) -> dict[str, float]:
    """What a report says of the pairs that the arms are trained on."""
    wrong = wrong_labels(NOISY, pairs, seed)
    return {
        "pairs": len(pairs),
        "mean_gap": pairs.gap.mean().item(),
        "wrong_labels": wrong.double().mean().item(),
    }


# ---------------------------------------------------------------------------------------- the arms


def run_arm(
    name: str, arm: Arm, stage: Stage, foundation: Foundation, seed: int, store: Store
) -> None:
    """Trains one arm from the foundation and judges it.

    Args:
      name: under which the store keeps the result; it also seeds the policy's answers.
      arm: loss, beta, labels and learning rate.
      stage: how it is trained.
      foundation: what it starts from.
      seed: whose foundation that is.
      store: where that lies and the result goes.
    """
    stage = stage if arm.rate is None else replace(stage, lr=arm.rate)
    ground = foundation.load(store, seed)
    pairs = labelled_for(arm, ground.pairs, seed)[: stage.pairs]
    splits = {"train": pairs, "held_out": ground.held_out}
    snapshots: list[dict[str, Any]] = []
    judgements: list[dict[str, Any]] = []

    def look(step: int, policy: Policy) -> None:
        if stage.is_due(step, stage.snapshots):
            for split, seen in splits.items():
                measured = measure_pairs(policy, seen[: foundation.snapshot_pairs], arm.beta)
                snapshots.append({"step": step, "split": split, **measured})
        if stage.is_due(step, stage.judgements):
            judged = ground.on_the_way.judge(policy, f"{name}/step {step}")
            judgements.append({"step": step, **judged})

    def batches(policy: Policy) -> Iterator[Pairs]:
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
                split: measure_pairs(trained.policy, seen[: foundation.measured_pairs], arm.beta)
                for split, seen in splits.items()
            },
            "snapshots": snapshots,
            "judgements": judgements,
        },
    )


# --------------------------------------------------------------------------------------- the parts


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


def settings_of(foundation: Foundation, parts: Sequence[Part]) -> dict[str, Any]:
    """What the results of an experiment depend on, for settings.json."""
    return {"foundation": foundation.settings(), **{part.name: part.settings() for part in parts}}


def jobs_of(foundation: Foundation, parts: Sequence[Part]) -> list[Job]:
    """The jobs of parts of an experiment, seed by seed, each seed's foundation first."""
    found: dict[str, Job] = {}  # parts may share an arm
    for seed in sorted({seed for part in parts for seed in part.all_seeds}):
        job = foundation_job(foundation, seed)
        found[job.name] = job
        for part in parts:
            for arm in part.arms if seed in part.all_seeds else ():
                name = part.result_name(arm, seed)
                found.setdefault(name, arm_job(name, arm, part.stage, foundation, seed))
    return list(found.values())


def foundation_job(foundation: Foundation, seed: int) -> Job:
    """The job that lays a seed's foundation."""
    return Job(foundation_name(seed), partial(foundation.lay, seed))


def arm_job(name: str, arm: Arm, stage: Stage, foundation: Foundation, seed: int) -> Job:
    """The job that trains and judges an arm."""
    function = partial(run_arm, name, arm, stage, foundation, seed)
    return Job(name, function, needs=(foundation_name(seed),))
