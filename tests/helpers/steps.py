"""What the tests on several processes share: cases, what is expected of them, and exact steps.

A case wraps a policy as an engine would, and returns what makes an optimizer step or its gradient,
mostly a function of a recipe. Whatever the engine, the step must be that of one process on all
`PAIRS`.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
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

from helpers.recipes_oracle import BETA, Grads, exact_step, models, relative_error, run_script, toy
from helpers.trainers import with_end
from spoloss.torch import Completions, Head, linear_spo_loss, sequence_logps

PAIRS = toy.pairs(8)
PARTS = (PAIRS[:3], PAIRS[3:5], PAIRS[5:7], PAIRS[7:])  # uneven micro-batches

Batch = tuple[Tensor, ...]
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

    def batch(self, pairs: list[Any]) -> Batch:
        ids, mask, labels = toy.collate(pairs)
        with torch.no_grad():
            ref = sequence_logps(self.reference(ids, attention_mask=mask).logits, labels)
        return ids, mask, labels, ref

    def parts(self, ranks: int | None = None, rank: int | None = None) -> list[list[Any]]:
        """The micro-batches of this rank, or of one of some groups of ranks."""
        ranks, rank = ranks or dist.get_world_size(), dist.get_rank() if rank is None else rank
        return [PARTS[i] for i in np.array_split(range(len(PARTS)), ranks)[rank]]

    @cached_property
    def micro_batches(self) -> list[Batch]:
        return [self.batch(pairs) for pairs in self.parts()]

    @cached_property
    def mine(self) -> Batch:
        return self.batch([*itertools.chain(*self.parts())])


@dataclass
class Cases:
    """The cases of a file, by name.

    Attributes:
      exact: what is expected if nothing else is said.
      dtype: of the models.
      rate: the learning rate of gradient descent.
      steps: the number that an exact case takes. What an engine kept of the first by mistake
        makes the second one wrong.
      around: what each case runs in.
    """

    exact: Exact = Exact(1e-9)
    dtype: torch.dtype = torch.float64
    rate: float = 0.1
    steps: int = 2
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    cases: dict[str, Callable[[], tuple[Any, Found]]] = field(default_factory=dict)

    def __call__(
        self,
        name: str,
        expected: Exact | Wrong | Refused | None = None,
        *,
        dtype: torch.dtype | None = None,
        tied: bool = False,
        ended: bool = False,
        **options: Any,
    ) -> Callable[[Callable[..., Step]], Callable[..., Step]]:
        """Registers a function of a setting; `options` are its further arguments."""
        expects = expected or self.exact

        def register(wrap: Callable[..., Step]) -> Callable[..., Step]:
            made = functools.partial(wrap, **options)
            run = functools.partial(self._run, made, expects, dtype or self.dtype, tied, ended)
            self.cases[name] = lambda: (expects, run())
            return wrap

        return register

    def run_all(self, only: Callable[[str], bool] = lambda _: True) -> dict[str, Any]:
        """By case what is expected, and what this rank found."""
        warnings.filterwarnings("error", module="spoloss")
        return {name: run() for name, run in self.cases.items() if only(name)}

    def _run(self, wrap: Any, expected: Any, dtype: torch.dtype, tied: bool, ended: bool) -> Found:
        policy, reference = models(tied=tied, dtype=dtype)
        steps = self.steps if isinstance(expected, Exact) else 1
        errors = []
        try:
            with self.around():
                step = wrap(Setting(policy, reference))
                for exact in exact_steps(tied, dtype, ended, self.rate)[:steps]:
                    before = whole(policy)
                    step()
                    descend(policy, self.rate)
                    moved = {n: (before[n] - w) / self.rate for n, w in whole(policy).items()}
                    errors.append(relative_error(moved, exact))
        except Exception as error:
            if not isinstance(expected, Refused):
                raise
            return f"{type(error).__name__}: {error}"
        return errors


def work(_rank: int, module: str) -> dict[str, Any]:
    """What a process of a test does: all cases of a module of helpers."""
    return importlib.import_module(module).run_all()


# ------------------------------------------------------------------------------------ exact steps


@functools.cache
def exact_steps(tied: bool, dtype: torch.dtype, ended: bool, rate: float) -> list[Grads]:
    """One process's gradients, of two steps of gradient descent."""
    policy, reference = models(tied=tied, dtype=dtype)
    steps = []
    for _ in range(2):
        steps.append(exact_step(policy, reference, with_end(PAIRS) if ended else PAIRS)[1])
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


def script_in_group(name: str) -> list[float]:
    """The numbers that a recipe prints that is started as a script in this group of processes."""
    here = {"init_process_group": mock.DEFAULT, "destroy_process_group": mock.DEFAULT}
    with mock.patch.multiple(dist, **here):
        return run_script(name)
