"""What test_engines.py runs in each of two processes: trainers on the engines that they can choose.

A way trains one optimiser step of gradient descent at a rate of 1 and reports what moved, which
engine really wrapped the model and which part of the parameters a rank holds: on CPUs, trainers
replace an engine by another without an error. Each way starts with its own environment and with
nothing that Accelerate kept in the process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import deepspeed
import lightning
import torch
import torch.distributed as dist
import trl
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.integrations import deepspeed as transformers_deepspeed

from helpers.recipes_oracle import Grads, exact_step, load, models, relative_error, toy
from spoloss.torch import sequence_logps

BETA = 0.1
WORLD = 2
EVEN, UNEVEN = (
    toy.pairs(12),
    toy.pairs(10),
)  # two ranks, two micro-batches of 3 pairs each, or fewer


@dataclass
class Result:
    """What a way did.

    Attributes:
      engine: the class that wraps the model.
      share: the part of the parameters' elements that lies on this rank between two steps.
      error: |moved - exact| / |exact|; or the error that the way raised.
      ranks: the number of ranks that the trainer counts.
    """

    engine: str
    share: float
    error: float
    ranks: int


Way = Callable[[Path], Result]
WAYS: dict[str, Way] = {}


def way(name: str, *arguments: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        WAYS[name] = lambda folder: run(folder, *arguments, **options)
        return run

    return register


# --------------------------------------------------------------------------------- what is measured


def parameters(model: nn.Module) -> Grads:
    """Copies of the whole parameters, by the names of the bare policy."""
    copies = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            whole = parameter.detach().full_tensor()
        elif hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
        else:
            whole = parameter.detach().clone()
        copies[name] = whole
    return copies


def result(wrapped: nn.Module, model: nn.Module, before: Grads, exact: Grads, ranks: int) -> Result:
    """Compares what a step of rate 1 moved with the gradient."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    share = sum(p.numel() for p in local) / sum(p.numel() for p in before.values())
    after = parameters(model)
    moved = {name: (before[name] - after[name]).double() for name in before}
    return Result(type(wrapped).__name__, share, relative_error(moved, exact), ranks)


def exact(pairs: Iterable[Any], dtype: torch.dtype) -> Grads:
    return exact_step(*models(dtype=dtype), pairs, BETA)[1]


def with_end(pairs: Iterable[Any]) -> list[Any]:
    """The pairs as TRL sees them: it ends each completion."""
    return [toy.Pair(prompt, [*chosen, 1], [*rejected, 1]) for prompt, chosen, rejected in pairs]


def scored(reference: nn.Module, pairs: list[Any]) -> tuple[Tensor, ...]:
    """A batch as the recipes of engines take it: ids, mask, labels, the reference's logps."""
    ids, mask, labels = toy.collate(pairs)
    with torch.no_grad():
        ref = sequence_logps(reference(ids, attention_mask=mask).logits, labels)
    return ids, mask, labels, ref


# ------------------------------------------------------------------------------- engines' settings


def zero(stage: int) -> dict[str, Any]:
    settings = load("deepspeed_zero").settings(stage, micro_batches=2)
    settings["train_micro_batch_size_per_gpu"] = 3  # Trainer insists on what it knows itself
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


FSDP2 = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {
        "fsdp_version": 2,
        "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"],
        "cpu_ram_efficient_loading": False,
    },
}


def deepspeed_options(stage: int) -> dict[str, Any]:
    """DeepSpeed on CPUs, where Accelerate has to be handed the backend that it does not choose."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    return {
        "deepspeed": zero(stage),
        "accelerator_config": {"use_configured_state": True},
        "use_cpu": False,
    }


def fsdp2_plugin() -> accelerate.FullyShardedDataParallelPlugin:
    return accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        cpu_ram_efficient_loading=False,
    )


def step_options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


# ---------------------------------------------------------------------------------------- Trainer


def train(trainer: Any, before: Grads, pairs: Iterable[Any], dtype: torch.dtype) -> Result:
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    ranks = trainer.accelerator.num_processes
    return result(trainer.model_wrapped, model, before, exact(pairs, dtype), ranks)


def by_trainer(
    folder: Path,
    pairs: list[Any],
    dtype: torch.dtype,
    name: str = "ExactSPOTrainer",
    **options: Any,
) -> Result:
    policy, reference = models(dtype=dtype)
    before = parameters(policy)
    arguments = {
        **step_options(folder),
        "remove_unused_columns": False,
        "accelerator_config": {"even_batches": False},
        **options,
    }
    trainer = getattr(load("transformers_trainer"), name)(
        policy,
        TrainingArguments(**arguments),
        lambda pairs: dict(
            zip(("input_ids", "attention_mask", "labels"), toy.collate(pairs), strict=True)
        ),
        pairs,
        reference=reference,
        beta=BETA,
    )
    return train(trainer, before, pairs, dtype)


@way("Trainer: fsdp= on CPUs")
def trainer_fsdp(folder: Path) -> Result:
    return by_trainer(folder, UNEVEN, torch.float64, **FSDP2)


@way("Trainer: ZeRO-2", 2)
@way("Trainer: ZeRO-3", 3)
def trainer_deepspeed(folder: Path, stage: int) -> Result:
    options = deepspeed_options(stage)
    options["accelerator_config"]["even_batches"] = False
    return by_trainer(folder, UNEVEN, torch.float32, **options)


@way("Trainer: ZeRO-2, without use_configured_state")
def trainer_deepspeed_alone(folder: Path) -> Result:
    return by_trainer(folder, EVEN, torch.float32, "SPOTrainer", deepspeed=zero(2), use_cpu=False)


# -------------------------------------------------------------------------------------------- TRL


def by_trl(
    folder: Path, recipe: str, pairs: list[Any], dtype: torch.dtype, **options: Any
) -> Result:
    policy, reference = models(dtype=dtype)
    before = parameters(policy)
    trainer = load(recipe).SPOTrainer(
        policy,
        reference,
        trl.DPOConfig(**{**step_options(folder), "beta": BETA, "bf16": False, **options}),
        train_dataset=Dataset.from_list(toy.texts(pairs)),
        processing_class=toy.tokenizer(),
    )
    return train(trainer, before, with_end(pairs), dtype)


@way("TRL, logits: DDP", "trl_dpo")
@way("TRL, fused: DDP", "trl_fused")
def trl_ddp(folder: Path, recipe: str) -> Result:
    return by_trl(folder, recipe, EVEN, torch.float64)


@way("TRL, logits: DDP, uneven", "trl_dpo")
@way("TRL, fused: DDP, uneven", "trl_fused")
def trl_uneven(folder: Path, recipe: str) -> Result:
    config = {"even_batches": False}
    return by_trl(folder, recipe, UNEVEN, torch.float64, accelerator_config=config)


@way("TRL, fused: fsdp= on CPUs", "trl_fused")
def trl_fsdp(folder: Path, recipe: str) -> Result:
    return by_trl(folder, recipe, EVEN, torch.float64, **FSDP2)


@way("TRL, logits: ZeRO-2", "trl_dpo", 2)
@way("TRL, logits: ZeRO-3", "trl_dpo", 3)
@way("TRL, fused: ZeRO-2", "trl_fused", 2)
@way("TRL, fused: ZeRO-3", "trl_fused", 3)
def trl_deepspeed(folder: Path, recipe: str, stage: int) -> Result:
    return by_trl(folder, recipe, EVEN, torch.float32, **deepspeed_options(stage))


@way("TRL, fused: ZeRO-2, without use_configured_state")
def trl_deepspeed_alone(folder: Path) -> Result:
    return by_trl(folder, "trl_fused", EVEN, torch.float32, deepspeed=zero(2), use_cpu=False)


# ---------------------------------------------------------------------------- Lightning, Accelerate


class Engine(lightning.Callback):
    """Keeps what wraps the module in training: Lightning takes it off afterwards."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen = trainer.strategy.model


def by_lightning(
    folder: Path,
    strategy: Any,
    recipe_class: type | None = None,
    *,
    pairs_per_micro_batch: float = 2.5,
) -> Result:
    """Micro-batches of 3 + 3 and 3 + 1 pairs, 2.5 in the mean."""
    policy, reference = models(dtype=torch.float64)
    before = parameters(policy)
    module = (recipe_class or load("lightning_module").SPOModule)(
        policy, reference, pairs_per_micro_batch=pairs_per_micro_batch, beta=BETA
    )
    module.configure_optimizers = lambda: torch.optim.SGD(policy.parameters(), lr=1.0)
    engine = Engine()
    trainer = lightning.Trainer(
        callbacks=[engine],
        accelerator="cpu",
        strategy=strategy,
        devices=WORLD,
        plugins=[TorchElasticEnvironment()],
        use_distributed_sampler=False,
        max_epochs=1,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    parts = ((UNEVEN[:3], UNEVEN[3:6]), (UNEVEN[6:9], UNEVEN[9:]))[dist.get_rank()]
    loader = torch.utils.data.DataLoader(parts, batch_size=None, collate_fn=toy.collate)
    trainer.fit(module, loader)
    return result(engine.seen, policy, before, exact(UNEVEN, torch.float64), trainer.world_size)


@way("Lightning: DDP")
@way("Lightning: DDP, pairs of a full micro-batch", pairs_per_micro_batch=3)
def lightning_ddp(folder: Path, **options: Any) -> Result:
    return by_lightning(folder, "ddp", **options)


class ShardedModule(load("lightning_module").SPOModule):
    """The hook in which Lightning expects FSDP2 to be applied."""

    def configure_model(self) -> None:
        for layer in self.policy.model.layers:
            fully_shard(layer)
        fully_shard(self.policy, reshard_after_forward=True)


@way("Lightning: FSDP2 (ModelParallelStrategy)")
def lightning_fsdp2(folder: Path) -> Result:
    return by_lightning(folder, ModelParallelStrategy(), ShardedModule)


@way("Lightning: FSDPStrategy on CPUs")
def lightning_fsdp(folder: Path) -> Result:
    return by_lightning(folder, "fsdp")


@way("Lightning: DeepSpeedStrategy on CPUs")
def lightning_deepspeed(folder: Path) -> Result:
    return by_lightning(folder, "deepspeed_stage_3")


def by_accelerate(
    owner: Callable[[nn.Module], nn.Module], dtype: torch.dtype, **options: Any
) -> Result:
    """One micro-batch a rank, uneven, by the module that owns the model."""
    accelerator = accelerate.Accelerator(**options)
    policy, reference = models(dtype=dtype)
    before = parameters(policy)
    module = owner(policy)
    wrapped, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=1.0))
    batch = scored(reference, (UNEVEN[:6], UNEVEN[6:])[dist.get_rank()])
    accelerator.backward(wrapped(*batch) * WORLD / len(UNEVEN))
    optimizer.step()
    inside = accelerator.unwrap_model(wrapped).model
    return result(wrapped, inside, before, exact(UNEVEN, dtype), accelerator.num_processes)


@way("Accelerate: FSDP2 plugin on CPUs")
def accelerate_fsdp(_folder: Path) -> Result:
    return by_accelerate(load("ddp").FusedSPO, torch.float64, cpu=True, fsdp_plugin=fsdp2_plugin())


@way("Accelerate, fused: ZeRO-2", 2)
@way("Accelerate, fused: ZeRO-3", 3)
def accelerate_deepspeed(_folder: Path, stage: int) -> Result:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    settings = {**zero(stage), "gradient_accumulation_steps": 1}
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=settings)
    return by_accelerate(load("ddp").FusedSPO, torch.float32, deepspeed_plugin=plugin)


@way("Accelerate, loop: ZeRO-2, accumulated", 2, 2)
@way("Accelerate, loop: ZeRO-3", 3, 1)
def accelerate_loop(_folder: Path, stage: int, micro_batches: int) -> Result:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    settings = {**zero(stage), "gradient_accumulation_steps": 1}
    accelerator = accelerate.Accelerator(
        deepspeed_plugin=accelerate.DeepSpeedPlugin(hf_ds_config=settings)
    )
    policy, reference = models(dtype=torch.float32)
    before = parameters(policy)
    wrapped, optimizer = accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=1.0))
    mine = (UNEVEN[:6], UNEVEN[6:])[dist.get_rank()]
    size = -(-len(mine) // micro_batches)
    loader = [toy.collate(mine[i : i + size]) for i in range(0, len(mine), size)]
    train = load("accelerate_loop").train
    list(train(wrapped, reference, loader, optimizer, accelerator, micro_batches=micro_batches))
    expected = exact(UNEVEN, torch.float32)
    return result(wrapped, policy, before, expected, accelerator.num_processes)


def pretend_fsdp(plugin: accelerate.FullyShardedDataParallelPlugin) -> None:
    """Lets Accelerate run its own FSDP2 code on CPUs, where it would run DDP."""
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


@way("Accelerate, fused: FSDP2 (stand-in)", "FusedSPO")
@way("Accelerate, logits: FSDP2 (stand-in)", "LogitsSPO")
def accelerate_fsdp2(_folder: Path, name: str) -> Result:
    plugin = fsdp2_plugin()
    accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    pretend_fsdp(plugin)
    return by_accelerate(getattr(load("ddp"), name), torch.float64, cpu=True, fsdp_plugin=plugin)


@way("Trainer: FSDP2 (stand-in)")
def trainer_fsdp2(folder: Path) -> Result:
    return with_fsdp2(lambda: by_trainer(folder, UNEVEN, torch.float64, **FSDP2))


@way("TRL, logits: FSDP2 (stand-in)", "trl_dpo")
@way("TRL, fused: FSDP2 (stand-in)", "trl_fused")
def trl_fsdp2(folder: Path, recipe: str) -> Result:
    return with_fsdp2(lambda: by_trl(folder, recipe, EVEN, torch.float64, **FSDP2))


def with_fsdp2(run: Callable[[], Result]) -> Result:
    """Makes the Accelerator of a trainer believe that its CPUs may run FSDP2."""
    made = accelerate.Accelerator.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        pretend_fsdp(kwargs["fsdp_plugin"])

    with mock.patch.object(accelerate.Accelerator, "__init__", init):
        return run()


# -------------------------------------------------------------------------------------------- FSDP1


@way("FSDP1: fused")
def fsdp1(_folder: Path) -> Result:
    policy, reference = models(dtype=torch.float64)
    before = parameters(policy)
    owner = FullyShardedDataParallel(
        load("ddp").FusedSPO(policy), device_id=torch.device("cpu"), use_orig_params=True
    )
    optimizer = torch.optim.SGD(owner.parameters(), lr=1.0)
    load("ddp").backward(owner, [scored(reference, (UNEVEN[:6], UNEVEN[6:])[dist.get_rank()])])
    optimizer.step()
    share = sum(p.numel() for p in policy.parameters()) / sum(p.numel() for p in before.values())
    with FullyShardedDataParallel.summon_full_params(owner):
        found = result(owner, policy, before, exact(UNEVEN, torch.float64), WORLD)
    return replace(found, share=share)


# ------------------------------------------------------------------------------------------ running


def run(way: Way, folder: Path) -> Result | str:
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    transformers_deepspeed.unset_hf_deepspeed_config()
    with mock.patch.dict(os.environ):
        try:
            return way(folder)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def run_all(rank: int, folder: Path) -> dict[str, Result | str]:
    """By way its result, or the error that it raised."""
    warnings.filterwarnings("error", module="spoloss")
    # What torchrun sets tells a trainer its place; it takes the group that is there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": str(WORLD)}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled: a minute
    return {name: run(WAYS[name], folder) for name in WAYS}
