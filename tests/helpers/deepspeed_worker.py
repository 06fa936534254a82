"""What test_deepspeed.py runs in each of two processes: DeepSpeed's updates against one process's.

A case makes an engine of a policy and says how one optimiser step is run. Two steps of gradient
descent are compared by what they moved, so that accumulation, clipping, the averages over ranks and
the optimiser's partitions are all in what is compared. float32 throughout: ZeRO-3 has no float64.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.distributed_worker import (
    BETA,
    PAIRS,
    Setting,
    exact_steps,
    run_script,
)
from helpers.recipes_oracle import Grads, load, models, relative_error
from spoloss import spo_loss
from spoloss.torch import linear_logps, linear_spo_loss, sequence_logps

recipe = load("deepspeed_zero")

RATE = 1.0  # what moves is the gradient, and is not lost in the weights' last digits

Batch = tuple[Tensor, ...]
Step = Callable[[], object]


@dataclass
class Case:
    """How a step runs on an engine; `stage` and `owner` make the engine, `raises` is its error."""

    run: Callable[[Any, Setting], object]
    stage: int = 3
    owner: Callable[[nn.Module], nn.Module] = recipe.FusedSPO
    tied: bool = False
    micro_batches: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    without: str = ""
    steps: int = 2
    raises: type[Exception] | tuple[()] = ()


CASES: dict[str, Case] = {}


def case(name: str, **options: Any) -> Callable[[Callable[..., object]], Callable[..., object]]:
    def register(run: Callable[..., object]) -> Callable[..., object]:
        CASES[name] = Case(run, **options)
        return run

    return register


def train(engine: Any, batches: list[Batch], scale: Callable[[Tensor], Any]) -> None:
    """One optimiser step; `scale` of a batch's labels is what its summed loss is multiplied by."""
    for batch in batches:
        engine.backward(engine(*batch) * scale(batch[2]))
        engine.step()


# ------------------------------------------------------------------------------------ what is right


@case("ZeRO-1: fused, accumulated", stage=1)
@case("ZeRO-2: fused, accumulated", stage=2)
@case("ZeRO-2: fused, accumulated, tied", stage=2, tied=True)
@case("ZeRO-3: fused, accumulated")
@case("ZeRO-3: fused, accumulated, tied", tied=True)
@case("ZeRO-3: fused, parameters below the default threshold kept whole", without="threshold")
def accumulated(engine: Any, setting: Setting) -> None:
    recipe.train_step(engine, setting.micro_batches)


@case("ZeRO-2: fused", stage=2, micro_batches=1)
@case("ZeRO-3: fused", micro_batches=1)
def at_once(engine: Any, setting: Setting) -> None:
    recipe.train_step(engine, [setting.mine])


class LogitsSPO(recipe.FusedSPO):
    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        logps = sequence_logps(self.model(ids, attention_mask=mask).logits, labels)
        return spo_loss(*logps.chunk(2), *ref.chunk(2), beta=BETA, reduction="sum")


@case("ZeRO-3: logits", owner=LogitsSPO)
def by_logits(engine: Any, setting: Setting) -> None:
    recipe.train_step(engine, setting.micro_batches)


class LogpsSPO(recipe.FusedSPO):
    """By `linear_logps`, which goes through the head a second time in the backward pass."""

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        logps = linear_logps(hidden, self.model.lm_head.weight, labels)
        return spo_loss(*logps.chunk(2), *ref.chunk(2), beta=BETA, reduction="sum")


@case("ZeRO-3: linear_logps", owner=LogpsSPO)
def by_logps(engine: Any, setting: Setting) -> None:
    recipe.train_step(engine, setting.micro_batches)


class CalledHead(recipe.FusedSPO):
    """Calls the head with what the loss needs: a called module's weight is gathered too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        model.lm_head.forward = self.head

    def head(self, hidden: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        return loss_sum(hidden, self.model.lm_head.weight, labels, ref)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        return self.model.lm_head(hidden, labels, ref)


@case("ZeRO-3: fused, the head called", owner=CalledHead)
@case("ZeRO-3: fused, the head called, tied", owner=CalledHead, tied=True)
def by_called_head(engine: Any, setting: Setting) -> None:
    recipe.train_step(engine, setting.micro_batches)


class ReferenceLogps(recipe.FusedSPO):
    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        return linear_logps(hidden, self.model.lm_head.weight, labels)


@case("ZeRO-3: fused, the reference in an engine of its own")
def with_reference_engine(engine: Any, setting: Setting) -> None:
    config = recipe.settings(stage=3, micro_batches=1)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    reference, *_ = deepspeed.initialize(
        model=ReferenceLogps(models(dtype=torch.float32)[1]).eval(), config=config
    )
    assert_empty(reference.module)
    with torch.no_grad():
        batches = [(*inputs, reference(*inputs)) for *inputs, _ in setting.micro_batches]
    recipe.train_step(engine, batches)


def loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
    sides = *hidden.chunk(2), weight, *labels.chunk(2), *ref.chunk(2)
    return linear_spo_loss(*sides, beta=BETA, reduction="sum").loss


class Held(recipe.FusedSPO):
    """Takes the head's Parameter itself, past the attribute access that gathers it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.held = [model.lm_head.weight]

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        return loss_sum(hidden, self.held[0], labels, ref)


class Registered(Held):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        deepspeed.zero.register_external_parameter(self, model.lm_head.weight)


@case("ZeRO-3: fused, the Parameter registered", owner=Registered)
@case("ZeRO-3: fused, the Parameter registered, tied", owner=Registered, tied=True)
def registered(engine: Any, setting: Setting) -> None:
    recipe.train_step(engine, setting.micro_batches)


class Hidden(Held):
    """Returns hidden states: the head is then used outside the engine's forward."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.model(ids, attention_mask=mask).last_hidden_state


@case("ZeRO-3: fused, gathered until after the backward pass", owner=Hidden)
@case("ZeRO-3: fused, gathered until after the backward pass, tied", owner=Hidden, tied=True)
def gathered_over_backward(engine: Any, setting: Setting) -> None:
    weight = engine.module.held[0]
    for ids, mask, labels, ref in setting.micro_batches:
        hidden = engine(ids, mask)
        with deepspeed.zero.GatheredParameters([weight]):
            engine.backward(loss_sum(hidden, weight, labels, ref) * right(labels))
        engine.step()


# ------------------------------------------------------------------------------------ what is wrong


def right(_labels: Tensor, micro_batches: int = 2) -> float:
    return dist.get_world_size() * micro_batches / len(PAIRS)


@case("ZeRO-2: sum * micro-batches / pairs", stage=2, steps=1)
@case("ZeRO-3: sum * micro-batches / pairs", steps=1)
def without_ranks(engine: Any, setting: Setting) -> None:
    train(engine, setting.micro_batches, lambda _: 2 / len(PAIRS))


@case("ZeRO-2: sum * ranks / pairs", stage=2, steps=1)
@case("ZeRO-3: sum * ranks / pairs", steps=1)
def without_micro_batches(engine: Any, setting: Setting) -> None:
    train(engine, setting.micro_batches, lambda _: dist.get_world_size() / len(PAIRS))


@case("ZeRO-2: mean of the micro-batches' means", stage=2, steps=1)
@case("ZeRO-3: mean of the micro-batches' means", steps=1)
def mean_of_means(engine: Any, setting: Setting) -> None:
    train(engine, setting.micro_batches, lambda labels: 2 / len(labels))


@case("ZeRO-3: bypassing the engine", steps=1)
def past_the_engine(engine: Any, setting: Setting) -> None:
    for batch in setting.micro_batches:
        engine.backward(engine.module(*batch) * right(batch[2]))
        engine.step()


@case("ZeRO-2: DeepSpeed's default clipping", stage=2, without="clipping", steps=1)
def clipped(engine: Any, setting: Setting) -> None:
    recipe.train_step(engine, setting.micro_batches)


@case("ZeRO-3: .data of the gathered head", owner=Hidden, micro_batches=1, steps=1)
@case("ZeRO-3: .data of the gathered head, tied", owner=Hidden, micro_batches=1, tied=True, steps=1)
def data(engine: Any, setting: Setting) -> None:
    weight = engine.module.held[0]
    ids, mask, labels, ref = setting.mine
    hidden = engine(ids, mask)
    with deepspeed.zero.GatheredParameters([weight]):
        loss = loss_sum(hidden, weight.data, labels, ref)
    engine.backward(loss * right(labels, 1))
    engine.step()


# ---------------------------------------------------------------------------------- what is refused


@case("ZeRO-3: the Parameter kept elsewhere", owner=Held, raises=ValueError)
def kept_elsewhere(engine: Any, setting: Setting) -> None:
    recipe.train_step(engine, setting.micro_batches)


@case("ZeRO-3: outside the forward", owner=Hidden, raises=ValueError)
def outside(engine: Any, setting: Setting) -> None:
    ids, mask, labels, ref = setting.mine
    loss_sum(engine(ids, mask), engine.module.held[0], labels, ref)


class Closed(Held):
    """Gathers the head for the loss alone."""

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        with deepspeed.zero.GatheredParameters([self.held[0]]):
            return loss_sum(hidden, self.held[0], labels, ref)


@case("ZeRO-3: gather closed before the backward pass, tied", owner=Closed, tied=True)
# Last: an engine that raises in its backward pass leaves work of its own undone.
@case("ZeRO-3: gather closed before the backward pass", owner=Closed, raises=RuntimeError)
def closed(engine: Any, setting: Setting) -> None:
    recipe.train_step(engine, setting.micro_batches)


# ------------------------------------------------------------------------------------------ running


def assert_empty(module: nn.Module) -> None:
    """Every parameter is partitioned: that ZeRO-3 is tested and not something else."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    assert not any(sizes.values()), sizes


def make_engine(case: Case, policy: nn.Module) -> Any:
    config = recipe.settings(case.stage, case.micro_batches)
    if case.without != "threshold":
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if case.without == "clipping":
        del config["gradient_clipping"]
    optimizer = torch.optim.SGD(policy.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=case.owner(policy), optimizer=optimizer, config=config)
    assert type(engine).__name__ == "DeepSpeedEngine"
    assert engine.zero_optimization_stage() == case.stage
    if case.stage == 3 and not case.without:
        assert_empty(policy)
    return engine


def whole(policy: nn.Module) -> Grads:
    """Copies of the parameters, gathered where they are partitioned."""
    copies = {}
    for name, parameter in policy.named_parameters():
        gathered = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(gathered, enabled=bool(gathered)):
            copies[name] = parameter.detach().clone()
    return copies


def run(case: Case) -> list[float] | str:
    """The relative errors of what this rank's steps moved; or the error that is due."""
    policy, reference = models(tied=case.tied, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    setting = Setting(policy, reference)
    errors = []
    try:
        engine = make_engine(case, policy)
        for exact in exact_steps(case.tied, torch.float32, RATE)[: case.steps]:
            case.run(engine, setting)
            after = whole(policy)
            moved = {name: (before[name] - after[name]) / RATE for name in before}
            errors.append(relative_error(moved, exact))
            before = after
    except case.raises as error:
        return f"{type(error).__name__}: {error}"
    return errors


def run_all(rank: int) -> dict[str, Any]:
    """By case its errors, and what the recipe printed."""
    warnings.filterwarnings("error", module="spoloss")
    os.environ |= {"LOCAL_RANK": str(rank)}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled: a minute
    printed = run_script("deepspeed_zero")
    return {"script": printed} | {name: run(case) for name, case in CASES.items()}
