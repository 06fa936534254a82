"""Preference training: the stage, the pairs, and the loop."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.studies import seeds
from benchmarks.studies.arms import Arm

if TYPE_CHECKING:
    from benchmarks.studies.pretrained import TopBlocks


@dataclass(frozen=True)
class Stage:
    """How a stage trains.

    Attributes:
      pairs: how many of the training pairs are used.
      steps: how many steps of AdamW, without weight decay.
      batch: pairs of a step.
      lr: the learning rate of the first step.
      lr_end: the share of it that a cosine has left at the last; 1 is a constant rate.
      clip: the gradient norm that is clipped to.
      snapshots: how often the margins are looked at on the way, evenly spread.
      judgements: after which steps the policy's answers are judged on the way.
    """

    pairs: int
    steps: int
    batch: int
    lr: float
    lr_end: float = 0.0
    clip: float = 1.0
    snapshots: int = 0
    judgements: tuple[int, ...] = ()

    def lr_factor(self, step: int) -> float:
        """The share of the learning rate at a step."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.lr_end + (1.0 - self.lr_end) * cosine

    def shows_margins(self, step: int) -> bool:
        """Whether the margins are looked at after a step."""
        return self.snapshots > 0 and step % (self.steps // self.snapshots) == 0


@dataclass(frozen=True)
class Rounds(Stage):
    """A stage in rounds: at the start of each, the policy writes the pairs that it is trained on.

    `pairs` are those of a round, `steps` those of all rounds together; a round whose completions
    give fewer pairs takes fewer steps.

    Attributes:
      rounds: how many.
      openings: of the training prompts, those that are answered.
      answers: how many the policy writes to each of them.
    """

    rounds: int = 8
    openings: int = 48
    answers: int = 10


@dataclass(frozen=True)
class Answers:
    """Answers of a policy, and what is known of them.

    Attributes:
      inputs: the tensors [M, ...] that a policy reads an answer from, by argument name.
      rewards: true rewards, [M].
      logps: log-probabilities under the policy that wrote them, nats, [M].
      reference: those under the reference.
    """

    inputs: dict[str, Tensor]
    rewards: Tensor
    logps: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers.

    Attributes:
      answers: all of them; several pairs may share one.
      chosen: the row of each pair's chosen answer, [N].
      rejected: of its rejected answer, [N].
    """

    answers: Answers
    chosen: Tensor
    rejected: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, rows: Tensor | slice) -> Pairs:
        return replace(self, chosen=self.chosen[rows], rejected=self.rejected[rows])

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a policy reads the chosen answers from, then the rejected ones, [2N, ...]."""
        rows = torch.cat((self.chosen, self.rejected))
        return {name: tensor[rows] for name, tensor in self.answers.inputs.items()}

    @property
    def references(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities under the reference, chosen and rejected, nats, [N] each."""
        reference = self.answers.reference.float()
        return reference[self.chosen], reference[self.rejected]

    @property
    def gap(self) -> Tensor:
        """True reward of chosen less that of rejected, [N]."""
        rewards = self.answers.rewards
        return (rewards[self.chosen] - rewards[self.rejected]).float()

    def tensors(self) -> dict[str, Tensor]:
        """All that the pairs consist of, for `of_tensors`."""
        named = vars(self.answers) | {"chosen": self.chosen, "rejected": self.rejected}
        return {name: tensor.contiguous() for name, tensor in (named | named.pop("inputs")).items()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Pairs:
        """The pairs of these `tensors`; those without a name of their own are inputs."""
        rows = {side: tensors.pop(side) for side in ("chosen", "rejected")}
        known = {name: tensors.pop(name) for name in ("rewards", "logps", "reference")}
        return cls(Answers(tensors, **known), **rows)


class PairLoss(NamedTuple):
    """The loss of a batch of pairs, and their margins h [N] in nats, detached."""

    loss: Tensor
    margins: Tensor


@dataclass
class Trained:
    """What a preference stage leaves.

    Attributes:
      policy: the trained policy; of a stopped run, as it was before the step that failed.
      grad_norms: gradient norm before clipping, step by step; the last of a stopped run may be
        infinite or nan.
      stopped_at: the first step with a non-finite loss or gradient, counted from 1; or None.
      lowest_x: the smallest x = beta * h of any pair in any step.
    """

    policy: TopBlocks
    grad_norms: list[float] = field(default_factory=list)
    stopped_at: int | None = None
    lowest_x: float = 0.0

    def summary(self) -> dict[str, Any]:
        """How training went; a norm that is not a number counts as the largest.

        `steps` are those that moved the policy. Without a step, no norm is known: nan.
        """
        norms = [math.inf if math.isnan(norm) else norm for norm in self.grad_norms]
        return {
            "steps": len(norms) - (self.stopped_at is not None),
            "grad_norm_median": statistics.median(norms or [math.nan]),
            "grad_norm_max": max(norms, default=math.nan),
            "stopped_at": self.stopped_at,
            "lowest_x": self.lowest_x,
        }


def train_on_pairs(
    reference: TopBlocks,
    batches: Callable[[TopBlocks], Iterator[Pairs]],
    arm: Arm,
    stage: Stage,
    look: Callable[[int, TopBlocks], None] = lambda *_: None,
) -> Trained:
    """Trains a copy of the reference on preferences.

    Args:
      reference: the policy to start from; it stays as it is.
      batches: the pairs of each step, in order. It is called with the copy,
        and asked for a batch when the step before it is done.
      arm: the loss.
      stage: the settings.
      look: called after every step with its number and the policy.
    """
    trained = Trained(reference.copy())
    parameters = trained.policy.trained()
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, stage.lr_factor)
    for step, pairs in enumerate(batches(trained.policy), start=1):
        loss, margins = trained.policy.pair_loss(arm, pairs)
        trained.lowest_x = min(trained.lowest_x, arm.beta * margins.min().item())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, stage.clip).item()
        trained.grad_norms.append(norm)
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            trained.stopped_at = step
            break
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        look(step, trained.policy)
    return trained


def fixed_batches(pairs: Pairs, stage: Stage, seed: int) -> Iterator[Pairs]:
    """Pass after pass over all pairs, each shuffled, in the same order for every arm."""
    order = seeds.generator(seed, "preference order")
    needed = stage.steps * stage.batch
    passes = [torch.randperm(len(pairs), generator=order) for _ in range(-(-needed // len(pairs)))]
    return (pairs[rows] for rows in torch.cat(passes)[:needed].split(stage.batch))
