"""Cases of DeepSpeed's ZeRO stages on two processes, in float32: ZeRO-3 has no float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.recipes_oracle import BETA, load, models
from helpers.steps import (
    PAIRS,
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
from spoloss import spo_loss
from spoloss.torch import Completions, Head, linear_logps, sequence_logps

recipe = load("deepspeed_zero")

case = Cases(Exact(1e-5), torch.float32, rate=1.0)  # what moves is not lost in the weights' digits


def make_engine(
    setting: Setting,
    owner: Callable[[nn.Module], nn.Module] = recipe.FusedSPO,
    *,
    stage: int = 3,
    micro_batches: int = 2,
    threshold: bool = False,
) -> Any:
    """An engine of the recipe's settings; with `threshold` small parameters stay whole."""
    config = recipe.settings(stage, micro_batches)
    if not threshold:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    module = owner(setting.policy)
    optimizer = torch.optim.SGD(setting.policy.parameters(), lr=case.rate)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    assert engine.zero_optimization_stage() == stage
    if stage == 3 and not threshold:
        assert_partitioned(setting.policy)
    return engine


def assert_partitioned(module: nn.Module) -> None:
    """Every parameter is empty: that ZeRO-3 is tested and not something else."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    assert not any(sizes.values()), sizes


# -------------------------------------------------------------------------- in the engine's forward


class FromLogps(recipe.FusedSPO):
    """By `linear_logps`, which goes through the head a second time in the backward pass."""

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        logps = linear_logps(Head(self.model.lm_head.weight), Completions(hidden, labels))
        return spo_loss(*logps.chunk(2), *ref.chunk(2), beta=BETA, reduction="sum")


@case("ZeRO-1: fused, accumulated", stage=1)
@case("ZeRO-2: fused, accumulated", stage=2)
@case("ZeRO-2: fused, accumulated, tied", stage=2, tied=True)
@case("ZeRO-3: fused", micro_batches=1)
@case("ZeRO-3: fused, accumulated")
@case("ZeRO-3: fused, accumulated, tied", tied=True)
@case("ZeRO-3: fused, parameters below the default threshold kept whole", threshold=True)
@case("ZeRO-3: linear_logps", owner=FromLogps)
def in_forward(setting: Setting, micro_batches: int = 2, **options: Any) -> Step:
    engine = make_engine(setting, micro_batches=micro_batches, **options)
    batches = setting.micro_batches if micro_batches == 2 else [setting.mine]
    return lambda: recipe.train_step(engine, batches)


@case("ZeRO-3: fused, the reference in an engine of its own")
def with_reference_engine(setting: Setting) -> Step:
    engine = make_engine(setting)
    config = recipe.settings(stage=3, micro_batches=1)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = models(dtype=torch.float32)[1].eval()
    reference, *_ = deepspeed.initialize(model=model, config=config)
    assert_partitioned(model)

    def logps(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return sequence_logps(reference(ids, attention_mask=mask).logits, labels)

    with torch.no_grad():
        batches = [(*inputs, logps(*inputs)) for *inputs, _ in setting.micro_batches]
    return lambda: recipe.train_step(engine, batches)


# ------------------------------------------------------------------------ outside, or other factors


def right(_: Tensor) -> float:
    """For two micro-batches."""
    return dist.get_world_size() * 2 / len(PAIRS)


@case("ZeRO-3: bypassing the engine", Wrong(0.84), past=True)
@case("ZeRO-3: sum * ranks / pairs", Wrong(0.50), scale=lambda labels: right(labels) / 2)
@case("ZeRO-3: mean of the micro-batches' means", Wrong(0.37), scale=lambda y: 2 / len(y))
def scaled(setting: Setting, scale: Callable[[Tensor], float] = right, past: bool = False) -> Step:
    engine = make_engine(setting)
    forward = engine.module if past else engine

    def step() -> None:
        for batch in setting.micro_batches:
            engine.backward(forward(*batch) * scale(batch[2]))
            engine.step()

    return step


@case("ZeRO-3: fused, gathered until after the backward pass", weight=lambda w: w)
@case("ZeRO-3: .data of the gathered head", Wrong(0.61), weight=lambda w: w.data)
def gathered(setting: Setting, weight: Callable[[Tensor], Tensor]) -> Step:
    engine = make_engine(setting, Hidden)
    (held,) = engine.module.held

    def step() -> None:
        for *inputs, labels, ref in setting.micro_batches:
            hidden = engine(*inputs)
            with deepspeed.zero.GatheredParameters([held]):
                engine.backward(loss_sum(hidden, weight(held), labels, ref) * right(labels))
            engine.step()

    return step


@case(
    "ZeRO-3: outside the forward",
    Refused("ValueError: head.weight has shape (0,) because DeepSpeed ZeRO-3 has partitioned it"),
)
def outside(setting: Setting) -> Step:
    engine = make_engine(setting, Hidden)
    *inputs, labels, ref = setting.mine
    return lambda: loss_sum(engine(*inputs), engine.module.held[0], labels, ref)


def run_all() -> dict[str, Any]:
    os.environ |= {"LOCAL_RANK": str(dist.get_rank())}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled: a minute
    *_, norm = script_in_group("deepspeed_zero")
    assert norm > 0.1, norm
    return case.run_all()
