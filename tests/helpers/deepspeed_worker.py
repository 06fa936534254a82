"""Cases of DeepSpeed's ZeRO stages on two processes, in float32: ZeRO-3 has no float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.recipes_oracle import load, models
from helpers.steps import (
    PAIRS,
    CalledHead,
    Cases,
    Exact,
    Hidden,
    Refused,
    Setting,
    Step,
    Wrong,
    loss_sum,
    script_in_group,
)
from spoloss.torch import Completions, Head, linear_logps

ddp, recipe = load("ddp"), load("deepspeed_zero")

Batch = tuple[Tensor, ...]

case = Cases(Exact(1e-5), torch.float32, rate=1.0)  # what moves is not lost in the weights' digits
PARTITIONED = Refused(
    "ValueError: head.weight has shape (0,) because DeepSpeed ZeRO-3 has partitioned it"
)


def make_engine(
    setting: Setting,
    owner: Callable[[nn.Module], nn.Module] = recipe.FusedSPO,
    *,
    stage: int = 3,
    micro_batches: int = 2,
    threshold: bool = False,
    clipping: bool = False,
) -> Any:
    """An engine of the recipe's settings; `threshold` and `clipping` are DeepSpeed's defaults."""
    config = recipe.settings(stage, micro_batches)
    if not threshold:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if clipping:
        del config["gradient_clipping"]
    module = owner(setting.policy)
    optimizer = torch.optim.SGD(setting.policy.parameters(), lr=case.rate)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    assert type(engine).__name__ == "DeepSpeedEngine"
    assert engine.zero_optimization_stage() == stage
    if stage == 3 and not threshold:
        assert_partitioned(setting.policy)
    return engine


def assert_partitioned(module: nn.Module) -> None:
    """Every parameter is empty: that ZeRO-3 is tested and not something else."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    assert not any(sizes.values()), sizes


# -------------------------------------------------------------------------- in the engine's forward


class LogpsSPO(ddp.LogitsSPO):
    """By `linear_logps`, which goes through the head a second time in the backward pass."""

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        return linear_logps(Head(self.model.lm_head.weight), Completions(hidden, labels))


class FromLogps(LogpsSPO):
    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        logps = super().forward(ids, mask, labels)
        return ddp.spo_loss(*logps.chunk(2), *ref.chunk(2), beta=0.1, reduction="sum")


class Held(Hidden):
    """Takes the head's Parameter itself, past the attribute access that gathers it."""

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        return loss_sum(super().forward(ids, mask), self.held[0], labels, ref)


class Registered(Held):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        deepspeed.zero.register_external_parameter(self, model.lm_head.weight)


class Closed(Hidden):
    """Gathers the head for the loss alone."""

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        hidden = super().forward(ids, mask)
        with deepspeed.zero.GatheredParameters(self.held):
            return loss_sum(hidden, self.held[0], labels, ref)


@case("ZeRO-1: fused, accumulated", stage=1)
@case("ZeRO-2: fused, accumulated", stage=2)
@case("ZeRO-2: fused, accumulated, tied", stage=2, tied=True)
@case("ZeRO-3: fused, accumulated")
@case("ZeRO-3: fused, accumulated, tied", tied=True)
@case("ZeRO-3: fused, parameters below the default threshold kept whole", threshold=True)
@case("ZeRO-3: logits", owner=ddp.LogitsSPO)
@case("ZeRO-3: linear_logps", owner=FromLogps)
@case("ZeRO-3: fused, the head called", owner=CalledHead)
@case("ZeRO-3: fused, the head called, tied", owner=CalledHead, tied=True)
@case("ZeRO-3: fused, the Parameter registered", owner=Registered)
@case("ZeRO-3: fused, the Parameter registered, tied", owner=Registered, tied=True)
@case("ZeRO-3: the Parameter kept elsewhere", PARTITIONED, owner=Held)
@case("ZeRO-3: gather closed before the backward pass, tied", owner=Closed, tied=True)
@case("ZeRO-2: DeepSpeed's default clipping", Wrong(0.04), stage=2, clipping=True)
def accumulated(setting: Setting, **options: Any) -> Step:
    engine = make_engine(setting, **options)
    return lambda: recipe.train_step(engine, setting.micro_batches)


@case("ZeRO-2: fused", stage=2)
@case("ZeRO-3: fused")
def at_once(setting: Setting, **options: Any) -> Step:
    engine = make_engine(setting, micro_batches=1, **options)
    return lambda: recipe.train_step(engine, [setting.mine])


@case("ZeRO-3: fused, the reference in an engine of its own")
def with_reference_engine(setting: Setting) -> Step:
    engine = make_engine(setting)
    config = recipe.settings(stage=3, micro_batches=1)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    module = LogpsSPO(models(dtype=torch.float32)[1]).eval()
    reference, *_ = deepspeed.initialize(model=module, config=config)
    assert_partitioned(reference.module)
    with torch.no_grad():
        batches = [(*inputs, reference(*inputs)) for *inputs, _ in setting.micro_batches]
    return lambda: recipe.train_step(engine, batches)


# ------------------------------------------------------------------------ outside, or other factors


def train(engine: Any, forward: Any, batches: list[Batch], scale: Callable[[Tensor], Any]) -> None:
    """One optimizer step; `scale` of a batch's labels is what its summed loss is multiplied by."""
    for batch in batches:
        engine.backward(forward(*batch) * scale(batch[2]))
        engine.step()


def right(_: Tensor) -> float:
    """For two micro-batches."""
    return dist.get_world_size() * 2 / len(PAIRS)


@case("ZeRO-3: bypassing the engine", Wrong(0.84), past=True)
@case("ZeRO-3: sum * micro-batches / pairs", Wrong(0.50), scale=lambda _: 2 / len(PAIRS))
@case("ZeRO-3: sum * ranks / pairs", Wrong(0.50), scale=lambda labels: right(labels) / 2)
@case("ZeRO-3: mean of the micro-batches' means", Wrong(0.37), scale=lambda y: 2 / len(y))
@case("ZeRO-2: sum * ranks / pairs", Wrong(0.50), stage=2, scale=lambda y: right(y) / 2)
def scaled(
    setting: Setting, scale: Callable[[Tensor], Any] = right, past: bool = False, **options: Any
) -> Step:
    engine = make_engine(setting, **options)
    forward = engine.module if past else engine
    return lambda: train(engine, forward, setting.micro_batches, scale)


@case("ZeRO-3: fused, gathered until after the backward pass")
@case("ZeRO-3: fused, gathered until after the backward pass, tied", tied=True)
def gathered_over_backward(setting: Setting) -> Step:
    engine = make_engine(setting, Hidden)
    (weight,) = engine.module.held

    def step() -> None:
        for *inputs, labels, ref in setting.micro_batches:
            hidden = engine(*inputs)
            with deepspeed.zero.GatheredParameters([weight]):
                engine.backward(loss_sum(hidden, weight, labels, ref) * right(labels))
            engine.step()

    return step


@case("ZeRO-3: .data of the gathered head", Wrong(0.61))
@case("ZeRO-3: .data of the gathered head, tied", Wrong(0.64), tied=True)
def data(setting: Setting) -> Step:
    engine = make_engine(setting, Hidden, micro_batches=1)
    (weight,) = engine.module.held

    def step() -> None:
        *inputs, labels, ref = setting.mine
        hidden = engine(*inputs)
        with deepspeed.zero.GatheredParameters([weight]):
            loss = loss_sum(hidden, weight.data, labels, ref)
        engine.backward(loss * right(labels) / 2)
        engine.step()

    return step


@case("ZeRO-3: outside the forward", PARTITIONED)
def outside(setting: Setting) -> Step:
    engine = make_engine(setting, Hidden)
    *inputs, labels, ref = setting.mine
    return lambda: loss_sum(engine(*inputs), engine.module.held[0], labels, ref)


# Last: an engine that raises in its backward pass leaves work of its own undone.
case(
    "ZeRO-3: gather closed before the backward pass",
    Refused("RuntimeError: The size of"),
    owner=Closed,
)(accumulated)


def run_all() -> dict[str, Any]:
    os.environ |= {"LOCAL_RANK": str(dist.get_rank())}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled: a minute
    *_, norm = script_in_group("deepspeed_zero")
    assert norm > 0.1, norm
    return case.run_all()
