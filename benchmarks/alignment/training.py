"""Supervised fine-tuning, and preference training from the model that it gave."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from benchmarks.alignment import seeds
from benchmarks.alignment.arms import Arm, Logps
from benchmarks.alignment.model import Policy, completion_logps
from spoloss import log_ratio_margin
from torch import Tensor

SCORING_ROWS = 256

StepHook = Callable[[], None]
"""Called after every step of training: it counts, and may raise to stop."""


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
    """

    pairs: int
    steps: int
    batch: int = 32
    lr: float = 3e-4
    lr_end: float = 0.0
    clip: float | None = 1.0
    snapshots: int = 0

    def lr_factor(self, step: int) -> float:
        """The share of the learning rate at a step."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.lr_end + (1.0 - self.lr_end) * cosine


@dataclass(frozen=True)
class Pairs:
    """Pairs of completions, with what the reference gives them.

    Attributes:
      prompts: ids [N, 4].
      chosen: ids [N, 40].
      rejected: ids [N, 40].
      gap: true reward of chosen less that of rejected, [N]; negative where the label is wrong.
      reference_chosen: log-probabilities, nats, [N].
      reference_rejected: likewise.
    """

    prompts: Tensor
    chosen: Tensor
    rejected: Tensor
    gap: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    def __len__(self) -> int:
        return len(self.gap)

    def __getitem__(self, rows: Tensor | slice) -> Pairs:
        return Pairs(*(tensor[rows] for tensor in vars(self).values()))

    def flipped(self, wrong: Tensor) -> Pairs:
        """The pairs with chosen and rejected exchanged where `wrong` [N] says so."""
        rows = wrong[:, None]
        return replace(
            self,
            chosen=torch.where(rows, self.rejected, self.chosen),
            rejected=torch.where(rows, self.chosen, self.rejected),
            gap=torch.where(wrong, -self.gap, self.gap),
            reference_chosen=torch.where(wrong, self.reference_rejected, self.reference_chosen),
            reference_rejected=torch.where(wrong, self.reference_chosen, self.reference_rejected),
        )


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
        """How training went; a norm that is not a number counts as the largest."""
        norms = [math.inf if math.isnan(norm) else norm for norm in self.grad_norms]
        return {
            "grad_norm_median": statistics.median(norms),
            "grad_norm_max": max(norms),
            "grad_norms": norms,
            "stopped_at": self.stopped_at,
            "lowest_x": self.lowest_x,
        }


def fine_tune(
    prompts: Tensor, completions: Tensor, stage: Stage, seed: int, hook: StepHook
) -> Policy:
    """Trains a new policy on texts, by their mean negative log-probability."""
    with torch.random.fork_rng():
        torch.manual_seed(seeds.number(seed, "weights"))
        policy = Policy()
    updater = Updater(policy, stage)
    for rows in draw_batches(len(prompts), stage, seeds.generator(seed, "fine-tuning order")):
        logps = completion_logps(policy, prompts[rows], completions[rows])
        updater.step(-logps.mean())
        hook()
    return policy


def train_on_pairs(
    reference: Policy,
    pairs: Pairs,
    arm: Arm,
    stage: Stage,
    seed: int,
    hook: StepHook,
    look: Callable[[int, Policy], None],
) -> Trained:
    """Trains a copy of the reference on preferences.

    Args:
      reference: the fine-tuned policy; it stays as it is.
      pairs: the pairs to train on, as the arm's labels have them.
      arm: the loss.
      stage: the settings.
      seed: of the order in which pairs come; the same for every arm.
      hook: called after every step.
      look: called with the step and the policy, `stage.snapshots` times.
    """
    trained = Trained(copy.deepcopy(reference))
    updater = Updater(trained.policy, stage)
    batches = draw_batches(len(pairs), stage, seeds.generator(seed, "preference order"))
    for step, rows in enumerate(batches, start=1):
        batch = pairs[rows]
        logps = pair_logps(trained.policy, batch)
        margins = log_ratio_margin(*logps).detach()
        trained.lowest_x = min(trained.lowest_x, arm.beta * margins.min().item())
        norm, moved = updater.step(arm.loss(logps, batch.gap))
        trained.grad_norms.append(norm)
        if not moved:
            trained.stopped_at = step
            break
        if stage.snapshots and step % (stage.steps // stage.snapshots) == 0:
            look(step, trained.policy)
        hook()
    return trained


class Updater:
    """AdamW, its schedule and its clipping, for one stage."""

    def __init__(self, policy: Policy, stage: Stage) -> None:
        self.parameters = list(policy.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=stage.lr, weight_decay=0.0)
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


def draw_batches(number: int, stage: Stage, order: torch.Generator) -> Iterator[Tensor]:
    """Rows of each step's batch: pass after pass over them all, each shuffled."""
    needed = stage.steps * stage.batch
    passes = [torch.randperm(number, generator=order) for _ in range(-(-needed // number))]
    return iter(torch.cat(passes)[:needed].split(stage.batch))


def pair_logps(policy: Policy, pairs: Pairs) -> Logps:
    """The four log-probabilities of the pairs."""
    both = completion_logps(
        policy, pairs.prompts.repeat(2, 1), torch.cat((pairs.chosen, pairs.rejected))
    )
    chosen, rejected = both.chunk(2)
    return chosen, rejected, pairs.reference_chosen, pairs.reference_rejected


@torch.no_grad()
def score(policy: Policy, prompts: Tensor, completions: Tensor) -> Tensor:
    """Log-probabilities of any number of completions, without gradients."""
    slices = zip(prompts.split(SCORING_ROWS), completions.split(SCORING_ROWS), strict=True)
    return torch.cat([completion_logps(policy, *each) for each in slices])
