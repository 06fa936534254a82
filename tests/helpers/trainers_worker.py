"""Trainers on the engines that they can choose, on two processes.

A case trains one optimizer step of gradient descent at a rate of 1, mostly on two uneven
micro-batches of each rank. On CPUs, trainers replace an engine by another without an error, so the
cases check which engine has wrapped the model and which share of the parameters a rank holds.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import accelerate
import deepspeed
import lightning
import pytest
import torch
import torch.distributed as dist
import trl
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.integrations import deepspeed as transformers_deepspeed

from helpers.recipes_oracle import BETA, load, toy
from helpers.steps import PAIRS, Cases, Exact, Refused, Setting, Step
from helpers.trainers import LIGHTNING, trainer_arguments

# Trainer chooses the order of the micro-batches; no two of them have half of the pairs.
PARTS = (PAIRS[:4], PAIRS[4:6], PAIRS[6:7], PAIRS[7:])


@contextmanager
def fresh() -> Iterator[None]:
    """An environment of its own, and nothing that Accelerate kept in the process."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    transformers_deepspeed.unset_hf_deepspeed_config()
    with mock.patch.dict(os.environ), fsdp2_on_cpus():
        yield


@contextmanager
def fsdp2_on_cpus() -> Iterator[None]:
    """Lets Accelerate run its own FSDP2 code on CPUs, where it would run DDP."""
    made = accelerate.Accelerator.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if plugin := kwargs.get("fsdp_plugin"):
            for state in (PartialState, AcceleratorState):
                state._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = plugin

    with mock.patch.object(accelerate.Accelerator, "__init__", init):
        yield


case = Cases(Exact(1e-5), rate=1.0, steps=1, around=fresh)  # ZeRO-3 has no float64


# -------------------------------------------------------------------------------------- engines


@dataclass(frozen=True)
class Engine:
    """An engine, and how trainers are told to use it.

    Attributes:
      wrapper: what the name of the class of the wrapped model starts with.
      share: the part of the parameters' elements that lies on a rank between two steps.
      of_trainer: arguments of TrainingArguments, and of DPOConfig.
      of_accelerator: arguments of Accelerator, for some number of micro-batches.
    """

    wrapper: str
    share: float = 1.0
    dtype: torch.dtype = torch.float64
    of_trainer: Callable[[], dict[str, Any]] = dict
    of_accelerator: Callable[[int], dict[str, Any]] = lambda _: {"cpu": True}

    def check(self, wrapped: nn.Module, policy: nn.Module) -> None:
        assert type(wrapped).__name__.startswith(self.wrapper), type(wrapped)
        local = [p.to_local() if isinstance(p, DTensor) else p for p in policy.parameters()]
        whole = sum(p.numel() for p in toy.models()[0].parameters())
        assert sum(p.numel() for p in local) / whole == pytest.approx(self.share, abs=0.02)


def fsdp2_arguments() -> dict[str, Any]:
    settings = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
    settings["cpu_ram_efficient_loading"] = False
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": settings}


def fsdp2_plugin(_: int) -> dict[str, Any]:
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    return {"cpu": True, "fsdp_plugin": plugin}


def zero(stage: int, micro_batches: int = 2) -> dict[str, Any]:
    """The recipe's settings; on CPUs, Accelerate does not choose gloo by itself."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    settings = load("deepspeed_zero").settings(stage, micro_batches)
    settings["train_micro_batch_size_per_gpu"] = "auto"
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def zero_arguments(stage: int) -> dict[str, Any]:
    own = {"use_configured_state": True}
    return {"deepspeed": zero(stage), "accelerator_config": own, "use_cpu": False}


def zero_plugin(stage: int, micro_batches: int) -> dict[str, Any]:
    settings = zero(stage, micro_batches) | {"train_micro_batch_size_per_gpu": 1}
    return {"deepspeed_plugin": accelerate.DeepSpeedPlugin(hf_ds_config=settings)}


def zero_engine(stage: int, share: float) -> Engine:
    makers = partial(zero_arguments, stage), partial(zero_plugin, stage)
    return Engine("DeepSpeedEngine", share, torch.float32, *makers)


ENGINES = {
    "DDP": Engine("DistributedDataParallel"),
    "FSDP2 (stand-in)": Engine("FSDP", 0.5, torch.float64, fsdp2_arguments, fsdp2_plugin),
    "ZeRO-2": zero_engine(2, share=1.0),
    "ZeRO-3": zero_engine(3, share=0.0),
}


def on(*engines: str, title: str, **options: Any) -> Callable[[Callable[..., Step]], Any]:
    """Registers a function of a setting and an engine."""

    def register(wrap: Callable[..., Step]) -> Callable[..., Step]:
        for name in engines:
            engine = ENGINES[name]
            case(f"{title}: {name}", engine=engine, dtype=engine.dtype, **options)(wrap)
        return wrap

    return register


# ---------------------------------------------------------------------------- Trainer, and TRL


def arguments(engine: Engine, size: int, **options: Any) -> dict[str, Any]:
    descent = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    return {**trainer_arguments(size), **descent, **engine.of_trainer(), **options}


def training(setting: Setting, engine: Engine, trainer: Any) -> Step:
    def step() -> None:
        trainer.train()
        engine.check(trainer.model_wrapped, setting.policy)

    return step


@on(*ENGINES, title="Trainer")
def by_trainer(setting: Setting, engine: Engine) -> Step:
    trainer = load("transformers_trainer").ExactSPOTrainer(
        setting.policy,
        TrainingArguments(**arguments(engine, 1, remove_unused_columns=False)),
        lambda parts: toy.named(*parts, "input_ids", "attention_mask", "labels"),
        PARTS,
        reference=setting.reference,
        beta=BETA,
    )
    return training(setting, engine, trainer)


@on("DDP", title="Trainer, loss function")
def by_loss_func(setting: Setting, engine: Engine) -> Step:
    recipe = load("transformers_loss_func")
    options = {"remove_unused_columns": False, "label_names": ["labels"]}
    names = ("input_ids", "attention_mask", "targets")
    trainer = Trainer(
        recipe.PolicyAndReference(setting.policy, setting.reference),
        TrainingArguments(**arguments(engine, 1, **options)),
        lambda parts: recipe.with_labels(toy.named(*parts, *names)),
        PARTS,
        compute_loss_func=recipe.mean_over_step,
    )
    return training(setting, engine, trainer)


@on(*ENGINES, title="TRL, logits", recipe="trl_dpo", ended=True)
@on(*ENGINES, title="TRL, fused", recipe="trl_fused", ended=True)
def by_trl(setting: Setting, engine: Engine, recipe: str) -> Step:
    trainer = load(recipe).SPOTrainer(
        setting.policy,
        setting.reference,
        trl.DPOConfig(**arguments(engine, 2, beta=BETA, bf16=False)),
        train_dataset=Dataset.from_list(toy.texts(PAIRS)),
        processing_class=toy.tokenizer(),
    )
    return training(setting, engine, trainer)


# ----------------------------------------------------------------------------------- Lightning


SPOModule = load("lightning_module").SPOModule


class ShardedModule(SPOModule):
    """The hook in which Lightning expects FSDP2 to be applied."""

    def configure_model(self) -> None:
        for layer in self.policy.model.layers:
            fully_shard(layer)
        fully_shard(self.policy, reshard_after_forward=True)


@case("Lightning: DDP", engine=ENGINES["DDP"], strategy=lambda: "ddp")
@case(
    "Lightning: FSDP2 (ModelParallelStrategy)",
    engine=Engine("ShardedModule", 0.5),
    strategy=ModelParallelStrategy,
    module_class=ShardedModule,
)
def by_lightning(
    setting: Setting,
    engine: Engine,
    strategy: Callable[[], Any],
    module_class: type = SPOModule,
) -> Step:
    module = module_class(
        setting.policy,
        setting.reference,
        pairs_per_micro_batch=2,  # in the mean
        beta=BETA,
    )
    module.configure_optimizers = lambda: torch.optim.SGD(setting.policy.parameters(), lr=1.0)
    # Lightning takes its wrapper off after training.
    module.on_train_batch_start = lambda *_: engine.check(trainer.strategy.model, setting.policy)
    trainer = lightning.Trainer(
        **LIGHTNING,
        strategy=strategy(),
        devices=dist.get_world_size(),
        plugins=[TorchElasticEnvironment()],
        use_distributed_sampler=False,
    )
    loader = torch.utils.data.DataLoader(setting.parts(), batch_size=None, collate_fn=toy.collate)

    def step() -> None:
        trainer.fit(module, loader)
        module.zero_grad()

    return step


# ---------------------------------------------------------------------------------- Accelerate


@on("DDP", "FSDP2 (stand-in)", title="Accelerate, accumulated", micro_batches=2)
@on("ZeRO-2", "ZeRO-3", title="Accelerate", micro_batches=1)
@on(
    "ZeRO-2",
    title="Accelerate, accumulated",
    expected=Refused("ValueError: micro_batches must be 1 under DeepSpeed"),
    micro_batches=2,
)
def by_accelerate(setting: Setting, engine: Engine, micro_batches: int) -> Step:
    accelerator = accelerate.Accelerator(**engine.of_accelerator(micro_batches))
    descent = torch.optim.SGD(setting.policy.parameters(), lr=1.0)
    wrapped, optimizer = accelerator.prepare(setting.policy, descent)
    parts = setting.parts() if micro_batches == 2 else [[*itertools.chain(*setting.parts())]]
    loader, train = [*map(toy.collate, parts)], load("accelerate_loop").train
    models = wrapped, setting.reference

    def step() -> None:
        list(train(*models, loader, optimizer, accelerator, micro_batches=micro_batches, beta=BETA))
        engine.check(wrapped, setting.policy)

    return step


# --------------------------------------------------------------------------------------- FSDP1


@case("FSDP1: fused")
def fsdp1(setting: Setting) -> Step:
    owner = FullyShardedDataParallel(
        load("ddp").FusedSPO(setting.policy), device_id=torch.device("cpu"), use_orig_params=True
    )
    Engine("FullySharded", 0.5).check(owner, setting.policy)
    optimizer = torch.optim.SGD(owner.parameters(), lr=1.0)
    whole = ExitStack()

    def gather() -> None:
        whole.enter_context(FullyShardedDataParallel.summon_full_params(owner))

    def step() -> None:
        whole.close()
        load("ddp").backward(owner, [setting.mine])
        optimizer.step()
        optimizer.zero_grad()
        gather()

    gather()
    return step


def run_all() -> dict[str, Any]:
    # What torchrun sets tells a trainer its place; it takes the group that is there.
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": world}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled: a minute
    return case.run_all()
