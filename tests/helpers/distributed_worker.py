"""Cases of DDP, FSDP2, tensor and sequence parallelism on two processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP

from helpers.recipes_oracle import BETA, load, toy
from helpers.steps import (
    PAIRS,
    Batch,
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
from spoloss.torch import sequence_logps

ddp, fsdp2, sequence_parallel = load("ddp"), load("fsdp2"), load("sequence_parallel")
vocab_parallel = load("vocab_parallel")

case = Cases()


def at_once(setting: Setting) -> list[Batch]:
    return [setting.mine]


def accumulated(setting: Setting) -> list[Batch]:
    return setting.micro_batches


# --------------------------------------------------------------------------------------------- DDP


def placeholder(setting: Setting) -> list[Batch]:
    ids, mask, labels, ref = setting.batch(PAIRS)
    if dist.get_rank() > 0:
        labels, ref = torch.full_like(labels, -100), torch.zeros_like(ref)
    return [(ids, mask, labels, ref)]


@case("DDP: fused")
@case("DDP: fused, tied", tied=True)
@case("DDP: fused, find_unused_parameters", find_unused_parameters=True)
@case("DDP: fused, accumulated", batches=accumulated)
@case("DDP: fused, a rank without pairs", batches=placeholder)
def ddp_step(setting: Setting, batches: Any = at_once, **options: Any) -> Step:
    wrapped = DDP(ddp.FusedSPO(setting.policy), **options)
    return lambda: ddp.backward(wrapped, batches(setting))


@case("DDP: mean of the ranks' means", Wrong(0.26), factor=lambda pairs: 1 / pairs)
@case("DDP: sum / pairs of all ranks", Wrong(0.50), factor=lambda _: 1 / len(PAIRS))
@case(
    "DDP: mean of the micro-batches' means",
    Wrong(0.28),
    factor=lambda pairs: 1 / pairs / 2,
    batches=accumulated,
)
@case("DDP: bypassing the wrapper", Wrong(0.99), factor=lambda _: 2 / len(PAIRS), past=True)
def ddp_wrong(
    setting: Setting,
    factor: Callable[[int], float],
    batches: Callable[[Setting], list[Batch]] = at_once,
    past: bool = False,
) -> Step:
    wrapped = DDP(ddp.FusedSPO(setting.policy))
    forward = wrapped.module if past else wrapped

    def step() -> None:
        for batch in batches(setting):
            (forward(*batch) * factor(len(batch[0]) // 2)).backward()

    return step


@case("DDP: logits", wrap=DDP)
@case("DDP: logits, tied", wrap=DDP, tied=True)
@case("FSDP2: logits", wrap=fully_shard)
@case("FSDP2: logits, tied", wrap=fully_shard, tied=True)
def logits(setting: Setting, wrap: Callable[[nn.Module], nn.Module]) -> Step:
    wrapped = wrap(setting.policy)
    ids, mask, labels, ref = setting.mine

    def step() -> None:
        logps = sequence_logps(wrapped(ids, attention_mask=mask).logits, labels)
        loss = spo_loss(*logps.chunk(2), *ref.chunk(2), beta=BETA, reduction="sum")
        (loss * dist.get_world_size() / len(PAIRS)).backward()

    return step


# ------------------------------------------------------------------------------------------- FSDP2

CAST = MixedPrecisionPolicy(torch.bfloat16, torch.float32)  # the inputs as well


@case("FSDP2: fused")
@case("FSDP2: fused, tied", tied=True)
@case("FSDP2: fused, accumulated", batches=accumulated)
@case("FSDP2: bfloat16", Exact(0.01), dtype=torch.float32, mp_policy=fsdp2.BFLOAT16)
@case("FSDP2: bfloat16, inputs cast", Wrong(0.016), dtype=torch.float32, mp_policy=CAST)
def fsdp_step(setting: Setting, batches: Any = at_once, **options: Any) -> Step:
    sharded = fsdp2.shard(fsdp2.FusedSPO(setting.policy), **options)
    return lambda: fsdp2.backward(sharded, batches(setting))


@case("FSDP2: fused, head in a group of its own, after an evaluation")
def fsdp_own_group(setting: Setting) -> Step:
    root = fsdp2.FusedSPO(setting.policy)
    fully_shard(setting.policy.lm_head)
    sharded = fsdp2.shard(root)

    def step() -> None:
        with torch.no_grad():
            sharded(*setting.mine)
        fsdp2.backward(sharded, setting.micro_batches)

    return step


@case("FSDP2: full_tensor of the head", Wrong(0.62), weight=lambda w: w.full_tensor())
@case(
    "FSDP2: shard of the head",
    Refused("TypeError: head.weight is a sharded DTensor"),
    weight=lambda w: w,
)
def fsdp_outside(setting: Setting, weight: Callable[[Any], Tensor]) -> Step:
    fully_shard(setting.policy.lm_head)
    root = fully_shard(Hidden(setting.policy), reshard_after_forward=True)
    *inputs, labels, ref = setting.mine

    def step() -> None:
        loss = loss_sum(root(*inputs), weight(setting.policy.lm_head.weight), labels, ref)
        (loss * dist.get_world_size() / len(PAIRS)).backward()

    return step


# ------------------------------------------------------ vocabulary parallel, and tensor parallel


@case("vocabulary parallel: split head")
def vocabulary(setting: Setting) -> Step:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = setting.policy, setting.reference
    heads = [vocab_parallel.split_head(model, mesh) for model in models]
    batch = toy.collate(PAIRS)
    return lambda: vocab_parallel.spo_step(*models, *heads, batch, BETA).backward()


SPLIT = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel)
SPLIT |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), ColwiseParallel)
SPLIT |= dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel)


@case("tensor parallel: PyTorch's parallelize_module, split head")
def tensor_parallel(setting: Setting) -> Step:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    step = vocabulary(setting)  # compares whole models with their heads
    for model in (setting.policy, setting.reference):
        for layer in model.model.layers:
            parallelize_module(layer, mesh, {name: style() for name, style in SPLIT.items()})
    return step


# ------------------------------------------------------------------------------- sequence parallel


class Logits(sequence_parallel.SliceLogps):
    shift = False

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(ids, position_ids=positions).logits
        return sequence_logps(logits, labels, shift=self.shift)


class ShiftsLate(Logits):
    shift = True


def all_reduced(part: Tensor) -> Tensor:
    total = part.clone()
    dist.all_reduce(total)
    return total


def bare(module: nn.Module) -> nn.Module:
    return module


@case("sequence parallel: DDP, fused")
@case("sequence parallel: DDP, fused, tied", tied=True)
@case("sequence parallel: DDP, logits", slices=Logits)
@case("sequence parallel: FSDP2, fused", engine=fully_shard)
@case("sequence parallel: dist.all_reduce, an engine that sums", total=all_reduced, engine=bare)
@case("sequence parallel: an engine that sums", Wrong(1.00), engine=bare)
@case("sequence parallel: dist.all_reduce", Wrong(0.50), total=all_reduced)
@case("sequence parallel: one margin per slice", Wrong(1.02), total=lambda part: part)
@case(
    "sequence parallel: labels shifted after the split",
    Wrong(0.64),
    slices=ShiftsLate,
    undo_shift=True,
)
def sequence(
    setting: Setting,
    slices: type = sequence_parallel.SliceLogps,
    engine: Callable[[nn.Module], nn.Module] = DDP,
    total: Callable[[Tensor], Tensor] = sequence_parallel.SumOverRanks.apply,
    undo_shift: bool = False,
) -> Step:
    wrapped = engine(slices(setting.policy))  # compares whole sequences
    ids, _, labels, ref = setting.batch(PAIRS)
    setting.policy.set_attn_implementation("ulysses")
    if undo_shift:  # of `cut`
        labels = torch.nn.functional.pad(labels, (1, 0), value=-100)[:, :-1]

    def step() -> None:
        logps = total(wrapped(*sequence_parallel.cut(ids, labels)))
        spo_loss(*logps.chunk(2), *ref.chunk(2), beta=BETA).backward()
        if engine is bare:
            for parameter in setting.policy.parameters():
                dist.all_reduce(parameter.grad)

    return step


def run_all() -> dict[str, Any]:
    scripts = {name: script_in_group(name)[-1] for name in ("fsdp2", "sequence_parallel")}
    assert min(scripts.values()) > 0.1, scripts  # the length of a gradient
    return case.run_all()
