"""What the tests on several processes share: cases, what is expected of them, and exact steps.

A case wraps a policy as an engine would, and returns what makes an optimizer step or its gradient,
mostly a function of a recipe. Exact cases take a second step: what an engine kept of the first
would be wrong by then.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from helpers import recipes_oracle
from helpers.recipes_oracle import BETA, Grads, exact_step, models, relative_error, toy
from spoloss.torch import Completions, Head, linear_spo_loss, sequence_logps

PAIRS = toy.pairs(8)
PARTS = (PAIRS[:3], PAIRS[3:5], PAIRS[5:7], PAIRS[7:])  # uneven micro-batches

Step = Callable[[], object]
Found = list[float] | str
"""The relative error of each step, or the error that was raised."""


# ------------------------------------------------------------------------------- what is expected


@dataclass(frozen=True)
class Exact:
    """Each step is that of one process, on each rank, to a relative error."""

    tolerance: float

    def met(self, ranks: list[Found]) -> bool:
        return all(isinstance(found, list) and max(found) < self.tolerance for found in ranks)


@dataclass(frozen=True)
class Wrong:
    """The step has this relative error on some rank; docs/distributed.md warns of it."""

    error: float

    def met(self, ranks: list[Found]) -> bool:
        numbers = [found[0] for found in ranks if isinstance(found, list)]
        return len(numbers) == len(ranks) and max(numbers) == pytest.approx(self.error, rel=0.1)


@dataclass(frozen=True)
class Refused:
    """The error that every rank raises."""

    message: str

    def met(self, ranks: list[Found]) -> bool:
        return all(isinstance(f, str) and f.startswith(self.message) for f in ranks)


def unmet(ranks: list[dict[str, tuple[Any, Found]]]) -> dict[str, Any]:
    """Of what `run_all` returned on each rank: the cases that are not as expected."""
    assert ranks[0], "no case has run"
    found = {name: [rank[name][1] for rank in ranks] for name in ranks[0]}
    return {n: (ranks[0][n][0], found[n]) for n in found if not ranks[0][n][0].met(found[n])}


# ------------------------------------------------------------------------------------------ cases


@dataclass
class Setting:
    """A policy, and the batches of this rank as a recipe takes them: ids, mask, labels, ref."""

    policy: nn.Module
    reference: nn.Module

    def batch(self, pairs: list[Any]) -> tuple[Tensor, ...]:
        ids, mask, labels = toy.collate(pairs)
        with torch.no_grad():
            ref = sequence_logps(self.reference(ids, attention_mask=mask).logits, labels)
        return ids, mask, labels, ref

    @cached_property
    def all(self) -> tuple[Tensor, ...]:
        return self.batch(PAIRS)

    def parts(self, ranks: int, rank: int) -> list[list[Any]]:
        """The micro-batches of one of some ranks, or of one of some groups of ranks."""
        return [PARTS[i] for i in np.array_split(range(len(PARTS)), ranks)[rank]]

    @cached_property
    def micro_batches(self) -> list[tuple[Tensor, ...]]:
        parts = self.parts(dist.get_world_size(), dist.get_rank())
        return [self.batch(pairs) for pairs in parts]

    @cached_property
    def mine(self) -> tuple[Tensor, ...]:
        parts = self.parts(dist.get_world_size(), dist.get_rank())
        return self.batch([pair for part in parts for pair in part])


@dataclass(frozen=True)
class Case:
    """What makes the steps of a policy, and what is expected of them."""

    wrap: Callable[[Setting], Step]
    expected: Exact | Wrong | Refused
    dtype: torch.dtype
    tied: bool


@dataclass
class Cases:
    """The cases of a file, by name; `rate` is the learning rate of their gradient descent."""

    exact: Exact = Exact(1e-9)
    dtype: torch.dtype = torch.float64
    rate: float = 0.1
    cases: dict[str, Case] = field(default_factory=dict)

    def __call__(
        self,
        name: str,
        expected: Exact | Wrong | Refused | None = None,
        *,
        dtype: torch.dtype | None = None,
        tied: bool = False,
        **options: Any,
    ) -> Callable[[Callable[..., Step]], Callable[..., Step]]:
        """Registers a function of a setting; `options` are its further arguments."""

        def register(wrap: Callable[..., Step]) -> Callable[..., Step]:
            made = functools.partial(wrap, **options)
            self.cases[name] = Case(made, expected or self.exact, dtype or self.dtype, tied)
            return wrap

        return register

    def run_all(self, only: Callable[[str, Case], bool] = lambda *_: True) -> dict[str, Any]:
        """By case what is expected, and what this rank found."""
        warnings.filterwarnings("error", module="spoloss")
        chosen = {name: case for name, case in self.cases.items() if only(name, case)}
        return {name: (case.expected, self.run(case)) for name, case in chosen.items()}

    def run(self, case: Case) -> Found:
        policy, reference = models(tied=case.tied, dtype=case.dtype)
        steps = 2 if isinstance(case.expected, Exact) else 1
        errors = []
        try:
            step = case.wrap(Setting(policy, reference))
            for exact in exact_steps(case.tied, case.dtype, self.rate)[:steps]:
                before = whole(policy)
                step()
                descend(policy, self.rate)
                errors.append(step_error(before, policy, exact, self.rate))
        except Exception as error:
            if not isinstance(case.expected, Refused):
                raise
            return f"{type(error).__name__}: {error}"
        return errors


def work(_rank: int, module: str) -> dict[str, Any]:
    """What a process of a test does: all cases of a module of helpers."""
    return importlib.import_module(module).run_all()


# ------------------------------------------------------------------------------------ exact steps


@functools.cache
def exact_steps(tied: bool, dtype: torch.dtype, rate: float) -> list[Grads]:
    """One process's gradients, of two steps of gradient descent."""
    policy, reference = models(tied=tied, dtype=dtype)
    steps = []
    for _ in range(2):
        steps.append(exact_step(policy, reference, PAIRS)[1])
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                parameter -= rate * steps[-1][name].to(dtype)
    return steps


def descend(policy: nn.Module, rate: float) -> None:
    """A step of gradient descent, unless an engine has made it and taken the gradients."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None


def whole(model: nn.Module) -> Grads:
    """Copies of the parameters, gathered where they are sharded or partitioned."""
    copies = {}
    for name, parameter in model.named_parameters():
        with ExitStack() as stack:
            if hasattr(parameter, "ds_id"):  # partitioned by DeepSpeed, which is then imported
                import deepspeed

                stack.enter_context(deepspeed.zero.GatheredParameters([parameter]))
            sharded = isinstance(parameter, DTensor)
            copies[name] = (parameter.full_tensor() if sharded else parameter).detach().clone()
    return copies


def step_error(before: Grads, policy: nn.Module, exact: Grads, rate: float) -> float:
    """The relative error of the gradient that a step at this rate has moved the policy by."""
    after = whole(policy)
    return relative_error({name: (before[name] - after[name]) / rate for name in exact}, exact)


# ------------------------------------------------------------------------------- parts of a case


def loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor, **options: Any) -> Tensor:
    """The fused loss summed over the pairs of a batch of chosen, then rejected rows."""
    sides = map(Completions, hidden.chunk(2), labels.chunk(2))
    head = Head(weight, **options)
    return linear_spo_loss(head, *sides, *ref.chunk(2), beta=BETA, reduction="sum").loss


class Hidden(nn.Module):
    """Owns the model but returns hidden states: the head's weight is then used outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.held = [model.lm_head.weight]  # the Parameter itself, past attribute access

    def forward(self, ids: Tensor, mask: Tensor, *_: Tensor) -> Tensor:
        return self.model.model(ids, attention_mask=mask).last_hidden_state


class CalledHead(Hidden):
    """Calls the head with what the loss needs: an engine gathers the weight of a called module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        model.lm_head.forward = lambda *inputs: loss_sum(
            inputs[0], model.lm_head.weight, *inputs[1:]
        )

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        return self.model.lm_head(super().forward(ids, mask), labels, ref)


def script_in_group(name: str) -> list[float]:
    """The numbers that a recipe prints that is started as a script in this group of processes."""
    here = {"init_process_group": mock.DEFAULT, "destroy_process_group": mock.DEFAULT}
    with mock.patch.multiple(dist, **here):
        return recipes_oracle.run_script(name)
