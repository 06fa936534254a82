"""The parts of an experiment: what each of them computes and leaves in the store.

A seed has a foundation (prompts split, reference policy, pairs, limits); every arm of the seed
starts from it, on all pairs or on a few.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from benchmarks.alignment import seeds
from benchmarks.alignment.arms import CLEAN, FLIPPED_SHARES, NOISY, Arm
from benchmarks.alignment.evaluation import measure_pairs
from benchmarks.alignment.store import Store, write_atomically
from benchmarks.alignment.training import (
    Answers,
    Pairs,
    PolicyT,
    Stage,
    StepHook,
    train_on_pairs,
)


@dataclass(frozen=True)
class Measure:
    """A figure of a policy's answers, beside reward and KL, as a table shows it."""

    key: str
    heading: str
    digits: int
    factor: float = 1.0


@dataclass(frozen=True)
class Ground(ABC, Generic[PolicyT]):
    """A foundation that has been laid.

    Attributes:
      policy: the reference of all arms, and what they start from.
      pairs: training pairs, each labelled by its true rewards.
      held_out: pairs on the held-out prompts, labelled by their true rewards.
    """

    policy: PolicyT
    pairs: Pairs
    held_out: Pairs

    @abstractmethod
    def judge(self, policy: PolicyT, name: str) -> dict[str, Any]:
        """What a policy's own answers to the held-out prompts say of it.

        Args:
          policy: the policy.
          name: seeds the answers, so that no two policies share random numbers: with shared
            ones, policies that are nearly alike give the same text, and ties hide which of
            them is better.

        Returns:
          Means over the answers under "reward", "kl" and the keys of the task's measures, the
          reward of every answer [P, n] under "rewards", a few "texts". All nan where the policy's
          logits are not finite.
        """


@dataclass(frozen=True)
class Foundation(ABC, Generic[PolicyT]):
    """What every arm of a seed starts from; a task is a subclass.

    Attributes:
      reference_title: how tables name the reference.
      measures: what the task measures of a policy's answers.
      measured_pairs: pairs, trained and held out, that are measured after training.
      snapshot_pairs: pairs, trained and held out, that are measured on the way.
    """

    reference_title: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    measured_pairs: ClassVar[int]
    snapshot_pairs: ClassVar[int]

    @property
    @abstractmethod
    def steps(self) -> int:
        """How often laying it calls the hook."""

    @abstractmethod
    def lay(self, seed: int, store: Store, hook: StepHook) -> None:
        """Makes the reference and the pairs, judges the reference and finds the limits."""

    @abstractmethod
    def load(self, store: Store, seed: int) -> Ground[PolicyT]:
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
    ground: Ground[Any], store: Store, seed: int, policy: dict[str, Tensor] | None = None
) -> None:
    """Keeps the pairs that the arms of a seed start from, and the policy's weights if given."""
    contents = [("pairs", _tensors(ground.pairs)), ("held_out", _tensors(ground.held_out))]
    contents += [("policy", policy)] if policy else []
    # A file knows neither views nor two names of one tensor, such as a tied embedding has.
    flat = {
        f"{part}/{name}": tensor.clone(memory_format=torch.contiguous_format)
        for part, tensors in contents
        for name, tensor in tensors.items()
    }
    write_atomically(store.path(foundation_name(seed), SUFFIX), save(flat))


def _tensors(pairs: Pairs) -> dict[str, Tensor]:
    answers = pairs.answers
    inputs = {f"inputs/{name}": tensor for name, tensor in answers.inputs.items()}
    rows = {"chosen": pairs.chosen, "rejected": pairs.rejected}
    return {"rewards": answers.rewards, "reference": answers.reference, **rows, **inputs}


@dataclass(frozen=True)
class Kept:
    """What `save_ground` has kept of a seed."""

    pairs: Pairs
    held_out: Pairs
    policy: dict[str, Tensor] | None


def load_kept(store: Store, seed: int) -> Kept:
    """What the arms of a seed start from."""
    flat = load_file(store.path(foundation_name(seed), SUFFIX))
    policy = _under("policy/", flat)
    return Kept(_pairs(_under("pairs/", flat)), _pairs(_under("held_out/", flat)), policy or None)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _pairs(tensors: dict[str, Tensor]) -> Pairs:
    answers = Answers(_under("inputs/", tensors), tensors["rewards"], tensors["reference"])
    return Pairs(answers, tensors["chosen"], tensors["rejected"])


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
    name: str,
    arm: Arm,
    stage: Stage,
    foundation: Foundation[PolicyT],
    seed: int,
    store: Store,
    hook: StepHook,
) -> None:
    """Trains one arm from the foundation and judges it.

    Args:
      name: under which the store keeps the result; it also seeds the policy's answers.
      arm: loss, beta and labels.
      stage: how it is trained.
      foundation: what it starts from.
      seed: whose foundation that is.
      store: where that lies and the result goes.
      hook: called after every step.
    """
    ground = foundation.load(store, seed)
    pairs = labelled_for(arm, ground.pairs, seed)[: stage.pairs]
    splits = {"train": pairs, "held_out": ground.held_out}
    snapshots: list[dict[str, Any]] = []
    judgements: list[dict[str, Any]] = []

    def look(step: int, policy: PolicyT) -> None:
        if stage.is_due(step, stage.snapshots):
            for split, seen in splits.items():
                measured = measure_pairs(policy, seen[: foundation.snapshot_pairs], arm.beta)
                snapshots.append({"step": step, "split": split, **measured})
        if stage.is_due(step, stage.judgements):
            judged = ground.judge(policy, f"{name}/step {step}")
            judgements.append({"step": step, **judged})

    trained = train_on_pairs(ground.policy, pairs, arm, stage, seed, hook, look)
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
