"""SPO under FSDP2 (CUDA_VISIBLE_DEVICES= torchrun --standalone --nproc_per_node 2 fsdp2.py).

The loss is the mean over the pairs of all ranks and micro-batches. Tested with PyTorch 2.13, two
processes on gloo. Pitfall: outside its group's forward, the head's weight is a shard. spoloss
raises an error for a shard, but not for its `full_tensor()`, whose gradient is not averaged.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from spoloss.torch import Completions, head_of, linear_spo_loss, sequence_logps

# Casting inputs would round the reference's log-probabilities to bfloat16, in steps of 2 at -300.
BFLOAT16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


class FusedSPO(nn.Module):
    """Wraps the model as the root of its sharding, so that its forward has the whole weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = replace(head_of(model), weight=None, bias=None)  # read in each forward

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        """Returns the sum of the pairs' losses. The rows are all chosen, then all rejected."""
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        if isinstance(self.model.lm_head, FSDPModule):  # its own group is not unsharded yet
            self.model.lm_head.unshard()
        lm_head = self.model.lm_head
        head = replace(self.head, weight=lm_head.weight, bias=lm_head.bias)
        sides = map(Completions, hidden.chunk(2), labels.chunk(2))
        return linear_spo_loss(head, *sides, *ref.chunk(2), beta=0.1, reduction="sum").loss


def shard(root: FusedSPO, **options: object) -> FusedSPO:
    """Shards each layer, and the rest as one group. `mp_policy=BFLOAT16` trains in bfloat16."""
    for layer in root.model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(root, reshard_after_forward=True, **options)


def backward(sharded: nn.Module, micro_batches: list[tuple[Tensor, ...]]) -> None:
    """Computes the gradient of an optimizer step. All ranks need as many micro-batches."""
    pairs = sum((labels.chunk(2)[0] != -100).any(1).sum() for _, _, labels, _ in micro_batches)
    dist.all_reduce(pairs)
    for batch in micro_batches:  # FSDP2 averages over the ranks
        (sharded(*batch) * dist.get_world_size() / pairs).backward()


if __name__ == "__main__":
    import toy

    dist.init_process_group("gloo")  # on GPUs "nccl", and batches there
    policy, reference = toy.models()
    batch = toy.collate(toy.pairs(count=3 + dist.get_rank(), seed=dist.get_rank()))
    ref = sequence_logps(reference(batch.ids, attention_mask=batch.mask).logits, batch.labels)
    backward(shard(FusedSPO(policy)), [(*batch, ref)])
    norm = nn.utils.get_total_norm([p.grad for p in policy.parameters()]).full_tensor()
    print(f"rank {dist.get_rank()}: {len(ref) // 2} pairs, |gradient| {norm:.6f}")
    dist.destroy_process_group()
