"""SPO under DistributedDataParallel (torchrun --standalone --nproc_per_node 2 docs/recipes/ddp.py).

The loss is the mean over the pairs of all ranks and micro-batches, which may differ in size.
Tested with PyTorch 2.13, two processes on gloo. Pitfall: a forward that bypasses the wrapper
(`ddp.module.model(...)`) leaves every rank with its own gradient, without an error.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spoloss.torch import Completions, head_of, linear_spo_loss, sequence_logps


class FusedSPO(nn.Module):
    """Wraps the model, so that the head's weight is used inside the wrapped forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = replace(head_of(model), weight=None, bias=None)  # read in each forward

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        """Returns the sum of the pairs' losses. The rows are all chosen, then all rejected."""
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        lm_head = self.model.lm_head
        head = replace(self.head, weight=lm_head.weight, bias=lm_head.bias)
        sides = map(Completions, hidden.chunk(2), labels.chunk(2))
        return linear_spo_loss(head, *sides, *ref.chunk(2), beta=0.1, reduction="sum").loss


def backward(ddp: DistributedDataParallel, micro_batches: list[tuple[Tensor, ...]]) -> None:
    """Computes the gradient of an optimizer step. DDP averages over the ranks."""
    pairs = sum((labels.chunk(2)[0] != -100).any(1).sum() for _, _, labels, _ in micro_batches)
    dist.all_reduce(pairs)
    for number, batch in enumerate(micro_batches, start=1):
        with nullcontext() if number == len(micro_batches) else ddp.no_sync():
            (ddp(*batch) * dist.get_world_size() / pairs).backward()


if __name__ == "__main__":
    import toy

    dist.init_process_group("gloo")  # on GPUs "nccl"
    policy, reference = toy.models()
    batch = toy.collate(toy.pairs(count=3 + dist.get_rank(), seed=dist.get_rank()))
    ref = sequence_logps(reference(batch.ids, attention_mask=batch.mask).logits, batch.labels)
    backward(DistributedDataParallel(FusedSPO(policy)), [(*batch, ref)])
    norm = nn.utils.get_total_norm([p.grad for p in policy.parameters()])
    print(f"rank {dist.get_rank()}: {len(ref) // 2} pairs, |gradient| {norm:.6f}")
    dist.destroy_process_group()
