"""What test_meshes.py runs in each of four processes, as a mesh of 2 x 2: two engines at once.

Pairs lie unevenly on the ranks, or on the groups of ranks that share them. The gradient is compared
with that of one process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from helpers.distributed_worker import BETA, PAIRS, Setting, exact_steps, gradients
from helpers.recipes_oracle import load, models, relative_error
from spoloss import spo_loss
from spoloss.torch import linear_spo_loss

fsdp2, sequence_parallel = load("fsdp2"), load("sequence_parallel")
vocab_parallel = load("vocab_parallel")

WORLD = 4
BY_RANK = (PAIRS[:3], PAIRS[3:5], PAIRS[5:7], PAIRS[7:])
BY_GROUP = (PAIRS[:5], PAIRS[5:])

Case = Callable[[Setting, DeviceMesh], object]
CASES: dict[str, Case] = {}


def case(name: str, *arguments: Any) -> Callable[[Callable[..., object]], Callable[..., object]]:
    def register(run: Callable[..., object]) -> Callable[..., object]:
        CASES[name] = lambda setting, mesh: run(setting, mesh, *arguments)
        return run

    return register


# -------------------------------------------------------------------------------- hybrid sharding


@case("hybrid sharding: sum * ranks / pairs", WORLD)
@case("hybrid sharding: sum * shards / pairs", 2)
def hybrid(setting: Setting, mesh: DeviceMesh, factor: int) -> None:
    sharded = fsdp2.shard(setting.policy, mesh=mesh)
    batch = setting.batch(BY_RANK[dist.get_rank()])
    (sharded(*batch) * factor / len(PAIRS)).backward()


# ----------------------------------------------------------------- sequence and data parallelism


@case("sequence x data parallel: sum * groups / pairs", 2)
@case("sequence x data parallel: sum * ranks / pairs", WORLD)
def sequence(setting: Setting, mesh: DeviceMesh, factor: int) -> None:
    setting.policy.set_attn_implementation("ulysses")
    sequence_parallel.GROUP = mesh["inner"].get_group()
    wrapped = DDP(sequence_parallel.SliceLogps(setting.policy))
    ids, _, labels, ref = setting.batch(BY_GROUP[mesh["outer"].get_local_rank()])
    logps = sequence_parallel.SumOverRanks.apply(wrapped(*sequence_parallel.cut(ids, labels)))
    loss = spo_loss(*logps.chunk(2), *ref.chunk(2), beta=BETA, reduction="sum")
    (loss * factor / len(PAIRS)).backward()


# ---------------------------------------------------------- split vocabulary and sharded parameters


class SplitSPO(fsdp2.FusedSPO):
    """The root of FSDP2's sharding, whose head is split over the vocabulary besides."""

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        weight = self.model.lm_head.weight
        assert isinstance(weight, DTensor)
        sides = *hidden.chunk(2), weight.to_local(), *labels.chunk(2), *ref.chunk(2)
        group = weight.device_mesh.get_group()
        return linear_spo_loss(*sides, beta=BETA, reduction="sum", vocab_parallel_group=group).loss


@case("vocabulary parallel x FSDP2: sum * groups / pairs", 2)
@case("vocabulary parallel x FSDP2: sum * ranks / pairs", WORLD)
def vocabulary(setting: Setting, mesh: DeviceMesh, factor: int) -> None:
    batch = setting.batch(BY_GROUP[mesh["outer"].get_local_rank()])
    vocab_parallel.split_head(setting.policy, mesh["inner"])
    for layer in setting.policy.model.layers:
        fully_shard(layer, mesh=mesh["outer"])
    sharded = fully_shard(SplitSPO(setting.policy), mesh=mesh["outer"])
    (sharded(*batch) * factor / len(PAIRS)).backward()


def run(case: Case, mesh: DeviceMesh) -> float:
    policy, reference = models(dtype=torch.float64)
    case(Setting(policy, reference), mesh)
    return relative_error(gradients(policy), exact_steps(False, torch.float64)[0])


def run_all(_rank: int) -> dict[str, float]:
    """By case the relative error of the gradient."""
    warnings.filterwarnings("error", module="spoloss")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    return {name: run(case, mesh) for name, case in CASES.items()}
