"""Cases of two engines at once, on four processes as a mesh of 2 x 2."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from helpers.recipes_oracle import BETA, load
from helpers.steps import PAIRS, Batch, Cases, Setting, Step, Wrong, loss_sum
from spoloss import spo_loss

fsdp2, sequence_parallel = load("fsdp2"), load("sequence_parallel")
vocab_parallel = load("vocab_parallel")

RANKS, GROUPS = 4, 2
case = Cases()


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (GROUPS, RANKS // GROUPS), mesh_dim_names=("outer", "inner"))


def of_group(setting: Setting, mesh: DeviceMesh) -> Batch:
    """The pairs that the ranks of an inner group share."""
    parts = setting.parts(GROUPS, mesh["outer"].get_local_rank())
    return setting.batch([*itertools.chain(*parts)])


@case("hybrid sharding: sum * ranks / pairs", factor=RANKS)
@case("hybrid sharding: sum * shards / pairs", Wrong(0.50), factor=RANKS // GROUPS)
def hybrid(setting: Setting, factor: int) -> Step:
    sharded = fsdp2.shard(fsdp2.FusedSPO(setting.policy), mesh=square())
    return lambda: (sharded(*setting.mine) * factor / len(PAIRS)).backward()


@case("sequence x data parallel: sum * groups / pairs")
def sequence(setting: Setting) -> Step:
    mesh = square()
    sequence_parallel.GROUP = mesh["inner"].get_group()
    wrapped = DDP(sequence_parallel.SliceLogps(setting.policy))
    ids, _, labels, ref = of_group(setting, mesh)
    setting.policy.set_attn_implementation("ulysses")

    def step() -> None:
        parts = wrapped(*sequence_parallel.cut(ids, labels))
        logps = sequence_parallel.SumOverRanks.apply(parts)
        loss = spo_loss(*logps.chunk(2), *ref.chunk(2), beta=BETA, reduction="sum")
        (loss * GROUPS / len(PAIRS)).backward()

    return step


class SplitSPO(fsdp2.FusedSPO):
    """The root of FSDP2's sharding, whose head is also split over the vocabulary."""

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        weight = self.model.lm_head.weight
        assert isinstance(weight, DTensor)
        group = weight.device_mesh.get_group()
        return loss_sum(hidden, weight.to_local(), labels, ref, vocab_parallel_group=group)


@case("vocabulary parallel x FSDP2: sum * groups / pairs")
def vocabulary(setting: Setting) -> Step:
    mesh = square()
    batch = of_group(setting, mesh)
    root = SplitSPO(setting.policy)
    vocab_parallel.split_head(setting.policy, mesh["inner"])
    for layer in setting.policy.model.layers:
        fully_shard(layer, mesh=mesh["outer"])
    sharded = fully_shard(root, mesh=mesh["outer"])
    return lambda: (sharded(*batch) * GROUPS / len(PAIRS)).backward()


def run_all() -> dict[str, Any]:
    return case.run_all()
