"""SPO with a head that is split over the vocabulary: each rank has some of its rows.

In a checkout: torchrun --standalone --nproc_per_node 2 docs/recipes/vocab_parallel.py

All ranks get the same batch. The head's weight, its gradient, its optimizer state and the tile of
logits are split over the ranks. Tested with PyTorch 2.13, two processes on gloo. To change an
existing loop: the split, `to_local()` and `vocab_parallel_group`. Pitfalls: all ranks need the same
batch (each call compares the labels and raises an error if they differ, but does not compare hidden
states), and splitting a head that is tied to the embeddings silently unties it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from spoloss.torch import Completions, Head, head_of, linear_logps, linear_spo_loss


def split_head(model: Any, mesh: DeviceMesh) -> Head:
    """Keeps only this rank's rows of the head. The rest of the model stays whole on every rank.

    Returns the head without its weight, which the step reads from the model.
    """
    head, weight = head_of(model), model.lm_head.weight
    if head.bias is not None:
        raise ValueError("split the head's bias as its weight")
    shard = distribute_tensor(weight.detach(), mesh, [Shard(0)])
    model.lm_head.weight = nn.Parameter(shard, requires_grad=weight.requires_grad)
    return replace(head, weight=None, vocab_parallel_group=mesh.get_group())


def spo_step(
    policy: Any, reference: Any, head: Head, ref_head: Head, batch: Any, beta: float
) -> Tensor:
    """The mean loss of a batch that all ranks share. Rows are all chosen, then all rejected."""
    head = replace(head, weight=policy.lm_head.weight.to_local())
    ref_head = replace(ref_head, weight=reference.lm_head.weight.to_local())
    with torch.no_grad():
        ref_hidden = reference.model(batch.ids, batch.mask).last_hidden_state
        ref_logps = linear_logps(ref_head, Completions(ref_hidden, batch.labels))
    hidden = policy.model(batch.ids, batch.mask).last_hidden_state
    sides = map(Completions, hidden.chunk(2), batch.labels.chunk(2))
    return linear_spo_loss(head, *sides, *ref_logps.chunk(2), beta=beta).loss


if __name__ == "__main__":
    import toy

    dist.init_process_group("gloo")  # "nccl" on GPUs
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = toy.models()
    heads = [split_head(model, mesh) for model in models]
    batch = toy.collate(toy.pairs(4))
    toy.train(models[0], lambda: spo_step(*models, *heads, batch, beta=0.025))
    dist.destroy_process_group()
