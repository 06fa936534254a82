"""What test_distributed.py runs in each of two processes: gradients against those of one process.

A case wraps a policy as an engine would and returns what makes the gradient of an optimiser step,
mostly a function of a recipe. Cases that are right are taken through a second step too, after an
update: what an engine kept of the first would be wrong by then.
"""

from __future__ import annotations

import functools
import runpy
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from typing import Any
from unittest import mock

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

from helpers.recipes_oracle import RECIPES, exact_step, load, models, relative_error, toy
from spoloss import spo_loss
from spoloss.torch import linear_spo_loss, sequence_logps

ddp, fsdp2, sequence_parallel = load("ddp"), load("fsdp2"), load("sequence_parallel")
vocab_parallel = load("vocab_parallel")

BETA = 0.1
LEARNING_RATE = 0.1
WORLD = 2
PAIRS = toy.pairs(8)
MICRO_BATCHES = {0: [PAIRS[:3], PAIRS[3:5]], 1: [PAIRS[5:7], PAIRS[7:]]}

Step = Callable[[], object]


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

    @cached_property
    def micro_batches(self) -> list[tuple[Tensor, ...]]:
        return [self.batch(pairs) for pairs in MICRO_BATCHES[dist.get_rank()]]

    @cached_property
    def mine(self) -> tuple[Tensor, ...]:
        return self.batch([pair for part in MICRO_BATCHES[dist.get_rank()] for pair in part])

    @property
    def my_pairs(self) -> int:
        return len(self.mine[0]) // 2


@dataclass
class Case:
    """What makes a step of some models, or the kind of error that it raises."""

    wrap: Callable[[Setting], Step]
    tied: bool = False
    dtype: torch.dtype = torch.float64
    raises: type[Exception] | tuple[()] = ()


CASES: dict[str, Case] = {}


def case(name: str, **options: Any) -> Callable[[Callable[[Setting], Step]], Callable[..., Step]]:
    def register(wrap: Callable[[Setting], Step]) -> Callable[[Setting], Step]:
        CASES[name] = Case(wrap, **options)
        return wrap

    return register


# --------------------------------------------------------------------------------------------- DDP


@case("DDP: fused")
@case("DDP: fused, tied", tied=True)
def ddp_fused(setting: Setting) -> Step:
    wrapped = DDP(ddp.FusedSPO(setting.policy))
    return lambda: ddp.backward(wrapped, [setting.mine])


@case("DDP: fused, find_unused_parameters")
def ddp_unused(setting: Setting) -> Step:
    wrapped = DDP(ddp.FusedSPO(setting.policy), find_unused_parameters=True)
    return lambda: ddp.backward(wrapped, [setting.mine])


@case("DDP: fused, accumulated")
def ddp_accumulated(setting: Setting) -> Step:
    wrapped = DDP(ddp.FusedSPO(setting.policy))
    return lambda: ddp.backward(wrapped, setting.micro_batches)


@case("DDP: logits")
@case("DDP: logits, tied", tied=True)
def ddp_logits(setting: Setting) -> Step:
    wrapped = DDP(ddp.LogitsSPO(setting.policy))
    return lambda: ddp.backward(wrapped, [setting.mine])


@case("DDP: fused, a rank without pairs")
def ddp_stand_in(setting: Setting) -> Step:
    wrapped = DDP(ddp.FusedSPO(setting.policy))
    ids, mask, labels, ref = setting.all
    if dist.get_rank() == 1:
        labels, ref = torch.full_like(labels, -100), torch.zeros_like(ref)
    return lambda: ddp.backward(wrapped, [(ids, mask, labels, ref)])


@case("DDP: mean of the ranks' means")
def ddp_mean(setting: Setting) -> Step:
    wrapped = DDP(ddp.FusedSPO(setting.policy))
    return lambda: (wrapped(*setting.mine) / setting.my_pairs).backward()


@case("DDP: sum / pairs of all ranks")
def ddp_no_world(setting: Setting) -> Step:
    wrapped = DDP(ddp.FusedSPO(setting.policy))
    return lambda: (wrapped(*setting.mine) / len(PAIRS)).backward()


@case("DDP: mean of the micro-batches' means")
def ddp_micro_means(setting: Setting) -> Step:
    wrapped = DDP(ddp.FusedSPO(setting.policy))

    def step() -> None:
        for batch in setting.micro_batches:
            (wrapped(*batch) / (len(batch[0]) // 2) / len(setting.micro_batches)).backward()

    return step


@case("DDP: bypassing the wrapper")
def ddp_past(setting: Setting) -> Step:
    wrapped = DDP(ddp.FusedSPO(setting.policy))
    return lambda: (wrapped.module(*setting.mine) * WORLD / len(PAIRS)).backward()


class Hidden(nn.Module):
    """Owns the model but returns hidden states: the head's weight is then used outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.model(ids, attention_mask=mask).last_hidden_state


def logits_outside(wrapped: nn.Module, setting: Setting) -> None:
    ids, mask, labels, ref = setting.mine
    logps = sequence_logps(wrapped(ids, attention_mask=mask).logits, labels)
    loss = spo_loss(*logps.chunk(2), *ref.chunk(2), beta=BETA, reduction="sum")
    (loss * WORLD / len(PAIRS)).backward()


@case("DDP: logits, without an owner")
def ddp_logits_outside(setting: Setting) -> Step:
    wrapped = DDP(setting.policy)
    return lambda: logits_outside(wrapped, setting)


def fused_outside(hidden: Tensor, weight: Tensor, setting: Setting) -> None:
    *_, labels, ref = setting.mine
    sides = *hidden.chunk(2), weight, *labels.chunk(2), *ref.chunk(2)
    loss = linear_spo_loss(*sides, beta=BETA, reduction="sum").loss
    (loss * WORLD / len(PAIRS)).backward()


@case("DDP: weight outside")
def ddp_weight_outside(setting: Setting) -> Step:
    wrapped = DDP(Hidden(setting.policy))
    weight = setting.policy.lm_head.weight
    return lambda: fused_outside(wrapped(*setting.mine[:2]), weight, setting)


@case("DDP: weight outside, find_unused_parameters", raises=RuntimeError)
def ddp_weight_outside_unused(setting: Setting) -> Step:
    wrapped = DDP(Hidden(setting.policy), find_unused_parameters=True)
    weight = setting.policy.lm_head.weight
    return lambda: fused_outside(wrapped(*setting.mine[:2]), weight, setting)


# ------------------------------------------------------------------------------------------- FSDP2


@case("FSDP2: fused")
@case("FSDP2: fused, tied", tied=True)
def fsdp_fused(setting: Setting) -> Step:
    sharded = fsdp2.shard(setting.policy)
    return lambda: fsdp2.backward(sharded, [setting.mine])


@case("FSDP2: fused, accumulated")
def fsdp_accumulated(setting: Setting) -> Step:
    sharded = fsdp2.shard(setting.policy)
    return lambda: fsdp2.backward(sharded, setting.micro_batches)


@case("FSDP2: fused, not resharded after the forward")
def fsdp_kept(setting: Setting) -> Step:
    sharded = fully_shard(fsdp2.FusedSPO(setting.policy), reshard_after_forward=False)
    return lambda: fsdp2.backward(sharded, [setting.mine])


@case("FSDP2: fused, head in a group of its own")
def fsdp_own_group(setting: Setting) -> Step:
    fully_shard(setting.policy.lm_head)
    sharded = fsdp2.shard(setting.policy)
    return lambda: fsdp2.backward(sharded, setting.micro_batches)


@case("FSDP2: fused, head in a group of its own, after an evaluation")
def fsdp_own_group_evaluated(setting: Setting) -> Step:
    fully_shard(setting.policy.lm_head)
    sharded = fsdp2.shard(setting.policy)

    def step() -> None:
        with torch.no_grad():
            sharded(*setting.mine)
        fsdp2.backward(sharded, [setting.mine])

    return step


class CalledHead(fsdp2.FusedSPO):
    """Calls the head with what the loss needs, so that its group gathers and frees it by itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        model.lm_head.forward = self.head

    def head(self, hidden: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        sides = *hidden.chunk(2), self.model.lm_head.weight, *labels.chunk(2), *ref.chunk(2)
        return linear_spo_loss(*sides, beta=BETA, reduction="sum").loss

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        return self.model.lm_head(hidden, labels, ref)


@case("FSDP2: fused, head in a group of its own, called")
def fsdp_called(setting: Setting) -> Step:
    fully_shard(setting.policy.lm_head)
    sharded = fully_shard(CalledHead(setting.policy), reshard_after_forward=True)
    return lambda: fsdp2.backward(sharded, [setting.mine])


@case("FSDP2: logits")
@case("FSDP2: logits, tied", tied=True)
def fsdp_logits(setting: Setting) -> Step:
    sharded = fully_shard(ddp.LogitsSPO(setting.policy), reshard_after_forward=True)
    return lambda: fsdp2.backward(sharded, [setting.mine])


@case("FSDP2: logits, head in a group of its own")
def fsdp_logits_own_group(setting: Setting) -> Step:
    fully_shard(setting.policy.lm_head)
    sharded = fully_shard(ddp.LogitsSPO(setting.policy), reshard_after_forward=True)
    return lambda: fsdp2.backward(sharded, [setting.mine])


@case("FSDP2: logits, without an owner")
def fsdp_logits_outside(setting: Setting) -> Step:
    sharded = fully_shard(setting.policy, reshard_after_forward=True)
    return lambda: logits_outside(sharded, setting)


@case("FSDP2: bfloat16", dtype=torch.float32)
def fsdp_bfloat16(setting: Setting) -> Step:
    sharded = fsdp2.shard(setting.policy, mp_policy=fsdp2.BFLOAT16)
    return lambda: fsdp2.backward(sharded, [setting.mine])


@case("FSDP2: bfloat16, inputs cast as well", dtype=torch.float32)
def fsdp_bfloat16_cast(setting: Setting) -> Step:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    sharded = fsdp2.shard(setting.policy, mp_policy=policy)
    return lambda: fsdp2.backward(sharded, [setting.mine])


@case("FSDP2: mean of the ranks' means")
def fsdp_mean(setting: Setting) -> Step:
    root = fully_shard(fsdp2.FusedSPO(setting.policy))
    return lambda: (root(*setting.mine) / setting.my_pairs).backward()


@case("FSDP2: sum / pairs of all ranks")
def fsdp_no_world(setting: Setting) -> Step:
    root = fully_shard(fsdp2.FusedSPO(setting.policy))
    return lambda: (root(*setting.mine) / len(PAIRS)).backward()


def hidden_root(setting: Setting) -> nn.Module:
    fully_shard(setting.policy.lm_head)
    return fully_shard(Hidden(setting.policy), reshard_after_forward=True)


@case("FSDP2: full_tensor of the head")
def fsdp_full_tensor(setting: Setting) -> Step:
    root = hidden_root(setting)
    return lambda: fused_outside(
        root(*setting.mine[:2]), setting.policy.lm_head.weight.full_tensor(), setting
    )


@case("FSDP2: the model is the root, its owner not", raises=RuntimeError)
def fsdp_inner_root(setting: Setting) -> Step:
    owner = fsdp2.FusedSPO(fully_shard(setting.policy))
    return lambda: fsdp2.backward(owner, [setting.mine])


@case("FSDP2: tied head in a group of its own", tied=True, raises=ValueError)
def fsdp_tied_own_group(setting: Setting) -> Step:
    fully_shard(setting.policy.lm_head)
    sharded = fsdp2.shard(setting.policy)
    return lambda: fsdp2.backward(sharded, [setting.mine])


@case("FSDP2: shard of the head", raises=TypeError)
def fsdp_shard(setting: Setting) -> Step:
    root = hidden_root(setting)
    return lambda: fused_outside(root(*setting.mine[:2]), setting.policy.lm_head.weight, setting)


# --------------------------------------------------------------------------------- tensor parallel

COLUMNS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
ROWS = ("self_attn.o_proj", "mlp.down_proj")


@case("tensor parallel: PyTorch's parallelize_module, split head")
def tensor_parallel(setting: Setting) -> Step:
    mesh = init_device_mesh("cpu", (WORLD,))
    plan = {name: ColwiseParallel() for name in COLUMNS}
    plan |= {name: RowwiseParallel() for name in ROWS}
    for model in (setting.policy, setting.reference):
        for layer in model.model.layers:
            parallelize_module(layer, mesh, plan)
        vocab_parallel.split_head(model, mesh)
    batch = toy.collate(PAIRS)
    return lambda: vocab_parallel.spo_step(setting.policy, setting.reference, batch).backward()


# ------------------------------------------------------------------------------- sequence parallel


@case("sequence parallel: DDP, fused")
@case("sequence parallel: DDP, fused, tied", tied=True)
def sequence_fused(setting: Setting) -> Step:
    return sequence_step(setting, DDP(sequence_parallel.SliceLogps(setting.policy)))


@case("sequence parallel: DDP, logits")
def sequence_logits(setting: Setting) -> Step:
    return sequence_step(setting, DDP(sequence_parallel.LogitsSliceLogps(setting.policy)))


@case("sequence parallel: FSDP2, fused")
def sequence_fsdp(setting: Setting) -> Step:
    return sequence_step(setting, fully_shard(sequence_parallel.SliceLogps(setting.policy)))


def sequence_step(setting: Setting, wrapped: nn.Module) -> Step:
    setting.policy.set_attn_implementation("ulysses")
    ids, _, labels, ref = setting.all
    return lambda: sequence_parallel.backward(wrapped, ids, labels, ref)


def engine_that_sums(setting: Setting) -> None:
    for parameter in setting.policy.parameters():
        dist.all_reduce(parameter.grad)


@case("sequence parallel: an engine that sums")
def sequence_summed(setting: Setting) -> Step:
    step = sequence_step(setting, sequence_parallel.SliceLogps(setting.policy))
    return lambda: (step(), engine_that_sums(setting))


class PlainSum(torch.autograd.Function):
    """The same sum, but with the gradient as it comes."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:  # noqa: ARG004
        return sequence_parallel.SumOverRanks.forward(None, part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


def sequence_by_hand(setting: Setting, wrapped: nn.Module, total: Callable[..., Tensor]) -> None:
    setting.policy.set_attn_implementation("ulysses")
    ids, _, labels, ref = setting.all
    logps = total(wrapped(*sequence_parallel.cut(ids, labels)))
    spo_loss(*logps.chunk(2), *ref.chunk(2), beta=BETA).backward()


@case("sequence parallel: backward returns the gradient unchanged, an engine that sums")
def sequence_plain_summed(setting: Setting) -> Step:
    module = sequence_parallel.SliceLogps(setting.policy)
    return lambda: (
        sequence_by_hand(setting, module, PlainSum.apply),
        engine_that_sums(setting),
    )


@case("sequence parallel: backward returns the gradient unchanged")
def sequence_plain(setting: Setting) -> Step:
    wrapped = DDP(sequence_parallel.SliceLogps(setting.policy))
    return lambda: sequence_by_hand(setting, wrapped, PlainSum.apply)


@case("sequence parallel: dist.all_reduce")
def sequence_in_place(setting: Setting) -> Step:
    wrapped = DDP(sequence_parallel.SliceLogps(setting.policy))

    def total(part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    return lambda: sequence_by_hand(setting, wrapped, total)


@case("sequence parallel: one margin per slice")
def sequence_unsummed(setting: Setting) -> Step:
    wrapped = DDP(sequence_parallel.SliceLogps(setting.policy))
    return lambda: sequence_by_hand(setting, wrapped, lambda part: part)


@case("sequence parallel: labels shifted after the split")
def sequence_shifted_late(setting: Setting) -> Step:
    class ShiftsLate(sequence_parallel.SliceLogps):
        def forward(self, ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
            return sequence_logps(self.model(ids, position_ids=positions).logits, labels)

    setting.policy.set_attn_implementation("ulysses")
    wrapped = DDP(ShiftsLate(setting.policy))
    ids, _, labels, ref = setting.all
    undone = torch.nn.functional.pad(labels, (1, 0), value=-100)[:, :-1]  # of the shift in `cut`
    return lambda: sequence_parallel.backward(wrapped, ids, undone, ref)


# ----------------------------------------------------------------------------------------- running


def gradients(policy: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in policy.named_parameters()
    }


@functools.cache
def exact_steps(
    tied: bool, dtype: torch.dtype, rate: float = LEARNING_RATE
) -> list[dict[str, Tensor]]:
    """One process's gradients, of two steps of gradient descent."""
    policy, reference = models(tied=tied, dtype=dtype)
    steps = []
    for _ in range(2):
        steps.append(exact_step(policy, reference, PAIRS, BETA)[1])
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                parameter -= rate * steps[-1][name].to(dtype)
    return steps


def run(case: Case) -> list[float] | str:
    """The relative errors of this rank's gradients, step by step; or the error that is due."""
    policy, reference = models(tied=case.tied, dtype=case.dtype)
    errors = []
    try:
        step = case.wrap(Setting(policy, reference))
        for exact in exact_steps(case.tied, case.dtype):
            step()
            errors.append(relative_error(gradients(policy), exact))
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter -= LEARNING_RATE * parameter.grad
                    parameter.grad = None
    except case.raises as error:
        return f"{type(error).__name__}: {error}"
    return errors


def run_script(name: str) -> str:
    """What a recipe prints that is started as a script, but in this group of processes."""
    here = {"init_process_group": mock.DEFAULT, "destroy_process_group": mock.DEFAULT}
    with mock.patch.multiple(dist, **here), redirect_stdout(StringIO()) as printed:
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


def run_all(_rank: int, scripts: Iterable[str]) -> dict[str, Any]:
    """By script what it printed, by case its errors."""
    warnings.filterwarnings("error", module="spoloss")
    printed = {name: run_script(name) for name in scripts}
    return printed | {name: run(case) for name, case in CASES.items()}
