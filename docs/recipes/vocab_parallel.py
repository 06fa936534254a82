"""SPO with a head that is split over the vocabulary: each rank has some of its rows.

In a checkout: torchrun --standalone --nproc_per_node 2 docs/recipes/vocab_parallel.py

All ranks get the same batch. The head's weight, its gradient, its optimizer state and the tile of
logits are split over the ranks. Tested with PyTorch 2.13, two processes on gloo. To change an
existing loop: the split, `to_local()` and `vocab_parallel_group`. Pitfalls: all ranks need the same
batch (each call compares the labels and raises an error if they differ, but does not compare hidden
states), and splitting a head that is tied to the embeddings silently unties it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from spoloss.torch import linear_logps, linear_spo_loss


def split_head(model: Any, mesh: DeviceMesh) -> None:
    """Keeps only this rank's rows of the head. The rest of the model stays whole on every rank."""
    weight = model.lm_head.weight
    shard = distribute_tensor(weight.detach(), mesh, [Shard(0)])
    model.lm_head.weight = nn.Parameter(shard, requires_grad=weight.requires_grad)


def spo_step(policy: Any, reference: Any, batch: Any, beta: float = 0.1) -> Tensor:
    """The mean loss of a batch that all ranks share. Rows are all chosen, then all rejected."""

    def head(model: Any) -> tuple[Tensor, dict[str, Any]]:
        weight = model.lm_head.weight
        assert isinstance(weight, DTensor)
        return weight.to_local(), {"vocab_parallel_group": weight.device_mesh.get_group()}

    with torch.no_grad():
        weight, options = head(reference)
        ref_hidden = reference.model(batch.ids, batch.mask).last_hidden_state
        ref_logps = linear_logps(ref_hidden, weight, batch.labels, **options)
    weight, options = head(policy)
    hidden = policy.model(batch.ids, batch.mask).last_hidden_state
    return linear_spo_loss(
        *hidden.chunk(2), weight, *batch.labels.chunk(2), *ref_logps.chunk(2), beta=beta, **options
    ).loss


if __name__ == "__main__":
    import toy

    dist.init_process_group("gloo")  # "nccl" on GPUs
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy, reference = toy.models()
    split_head(policy, mesh)
    split_head(reference, mesh)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    batch = toy.collate(toy.pairs(4))
    for _ in range(3):
        loss = spo_step(policy, reference, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {dist.get_rank()}: {loss.item():.6f}")
    dist.destroy_process_group()
