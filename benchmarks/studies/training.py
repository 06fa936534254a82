"""Preference training: the stage, the pairs, the policy that it needs, and the loop."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.studies import seeds
from benchmarks.studies.arms import Arm, Logps

if TYPE_CHECKING:
    from typing_extensions import Self

SCORING_ROWS = 256


@dataclass(frozen=True)
class Stage:
    """How a stage trains.

    Attributes:
      pairs: how many of the training pairs are used; texts, in supervised fine-tuning.
      steps: how many steps of AdamW, without weight decay.
      batch: pairs (or texts) of a step.
      lr: the learning rate of the first step.
      lr_end: the share of it that a cosine has left at the last; 1 is a constant rate.
      clip: the gradient norm that is clipped to; None is no clipping.
      snapshots: how often the margins are looked at on the way.
      judgements: how often the policy's answers are judged on the way; or after which steps.
    """

    pairs: int
    steps: int
    batch: int = 32
    lr: float = 3e-4
    lr_end: float = 0.0
    clip: float | None = 1.0
    snapshots: int = 0
    judgements: int | tuple[int, ...] = 0

    def lr_factor(self, step: int) -> float:
        """The share of the learning rate at a step."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.lr_end + (1.0 - self.lr_end) * cosine

    def is_due(self, step: int, times: int | tuple[int, ...]) -> bool:
        """Whether something done `times` times, evenly spread, or so listed, comes after a step."""
        if isinstance(times, tuple):
            return step in times
        return times > 0 and step % (self.steps // times) == 0


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
    """Answers of a reference, and what is known of them.

    Attributes:
      inputs: the tensors [M, ...] that the policy reads an answer from, by argument name.
      rewards: true rewards, [M].
      reference: log-probabilities under the reference, nats, [M].
    """

    inputs: dict[str, Tensor]
    rewards: Tensor
    reference: Tensor

    def __len__(self) -> int:
        return len(self.rewards)

    def __getitem__(self, rows: Tensor) -> Answers:
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return Answers(inputs, self.rewards[rows], self.reference[rows])


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
    def gap(self) -> Tensor:
        """True reward of chosen less that of rejected, [N]; negative where the label is wrong."""
        rewards = self.answers.rewards
        return (rewards[self.chosen] - rewards[self.rejected]).float()

    def flipped(self, wrong: Tensor) -> Pairs:
        """The pairs with chosen and rejected exchanged where `wrong` [N] says so."""
        return replace(
            self,
            chosen=torch.where(wrong, self.rejected, self.chosen),
            rejected=torch.where(wrong, self.chosen, self.rejected),
        )

    def logps_given(self, chosen: Tensor, rejected: Tensor) -> Logps:
        """The pairs' log-probabilities, where `chosen` and `rejected` [N] are the policy's."""
        reference = self.answers.reference
        return Logps(chosen, rejected, reference[self.chosen], reference[self.rejected])


class PairLoss(NamedTuple):
    """The loss of a batch of pairs, and their margins h [N] in nats, detached."""

    loss: Tensor
    margins: Tensor


class Policy(Protocol):
    """What can be trained on pairs."""

    def copy(self) -> Self:
        """A policy of its own that starts where this one is."""

    def trained(self) -> list[Parameter]:
        """The parameters that are trained."""

    def logps(self, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of answers, nats, [M], from the tensors that hold them."""

    def pair_loss(self, arm: Arm, pairs: Pairs) -> PairLoss:
        """The arm's loss, by which `trained()` can be differentiated."""


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

    policy: Policy
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
            "grad_norms": norms,
            "stopped_at": self.stopped_at,
            "lowest_x": self.lowest_x,
        }


def train_on_pairs(
    reference: Policy,
    batches: Callable[[Policy], Iterator[Pairs]],
    arm: Arm,
    stage: Stage,
    look: Callable[[int, Policy], None] = lambda *_: None,
) -> Trained:
    """Trains a copy of the reference on preferences.

    Args:
      reference: the policy to start from; it stays as it is.
      batches: the pairs of each step, as the arm's labels have them. It is called with the copy,
        and asked for a batch when the step before it is done.
      arm: the loss.
      stage: the settings.
      look: called after every step with its number and the policy.
    """
    trained = Trained(reference.copy())
    updater = Updater(trained.policy.trained(), stage)
    for step, pairs in enumerate(batches(trained.policy), start=1):
        loss, margins = trained.policy.pair_loss(arm, pairs)
        trained.lowest_x = min(trained.lowest_x, arm.beta * margins.min().item())
        norm, moved = updater.step(loss)
        trained.grad_norms.append(norm)
        if not moved:
            trained.stopped_at = step
            break
        look(step, trained.policy)
    return trained


class Updater:
    """AdamW, its schedule and its clipping, for one stage."""

    def __init__(self, parameters: list[Parameter], stage: Stage) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, stage.lr_factor)
        self.clip = math.inf if stage.clip is None else stage.clip

    def step(self, loss: Tensor) -> tuple[float, bool]:
        """Moves the policy down the loss.

        Returns:
          The gradient norm before clipping, and whether the policy was moved: with a non-finite
          loss or gradient it stays.
        """
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip).item()
        finite = math.isfinite(norm) and math.isfinite(loss.item())
        if finite:
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad()
        return norm, finite


def fixed_batches(pairs: Pairs, stage: Stage, seed: int) -> Iterator[Pairs]:
    """The batches of pairs that do not depend on the policy, in the same order for every arm."""
    order = seeds.generator(seed, "preference order")
    return (pairs[rows] for rows in draw_batches(len(pairs), stage, order))


def draw_batches(number: int, stage: Stage, order: torch.Generator) -> Iterator[Tensor]:
    """Rows of each step's batch: pass after pass over them all, each shuffled."""
    needed = stage.steps * stage.batch
    passes = [torch.randperm(number, generator=order) for _ in range(-(-needed // number))]
    return iter(torch.cat(passes)[:needed].split(stage.batch))


@torch.no_grad()
def score(policy: Policy, inputs: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of any number of answers, without gradients."""
    slices = zip(*(tensor.split(SCORING_ROWS) for tensor in inputs.values()), strict=True)
    return torch.cat([policy.logps(dict(zip(inputs, each, strict=True))) for each in slices])


def pair_logps(policy: Policy, pairs: Pairs) -> Logps:
    """The log-probabilities of any number of pairs, without gradients."""
    both = score(policy, pairs.answers[torch.cat((pairs.chosen, pairs.rejected))].inputs)
    return pairs.logps_given(*both.chunk(2))
