"""SPO in an Accelerate loop, exact over uneven micro-batches and ranks.

Tested with Accelerate 1.15 and PyTorch 2.13. To change an existing loop: the 5 lines that compute
the loss, 2 that count the pairs of the optimizer step, and the factor for the ranks.

Pitfalls: `reduction="mean"` gives a mean of means, over micro-batches and over ranks. Gradients are
averaged over the ranks, hence the factor. With `accelerator.accumulate`, do not fetch the batches
of a step in advance. Once the loader's last batch is fetched, every backward counts as the last of
a step, and the optimizer steps at each micro-batch. Under DeepSpeed, use one micro-batch per step,
or deepspeed_zero.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from spoloss import spo_loss
from spoloss.torch import sequence_logps


def train(
    policy: nn.Module,
    reference: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    micro_batches: int,
    beta: float,
) -> Iterator[float]:
    """Yields the mean loss per pair of each optimizer step, over all ranks."""
    if micro_batches > 1 and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "micro_batches must be 1 under DeepSpeed, because its engine steps at each backward "
            "here. To accumulate, use deepspeed_zero.py"
        )
    batches = iter(loader)
    while step := list(itertools.islice(batches, micro_batches)):
        here = torch.tensor(
            sum(len(batch.labels) // 2 for batch in step), device=accelerator.device
        )
        pairs = accelerator.gather(here).sum()
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(step, start=1):
            last = number == len(step)
            with contextlib.nullcontext() if last else accelerator.no_sync(policy):
                loss = pair_loss(policy, reference, batch, beta) / pairs
                # DDP and FSDP average the gradients over ranks: times their number is the sum.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        yield accelerator.reduce(total, "sum").item()


def pair_loss(policy: nn.Module, reference: nn.Module, batch: Any, beta: float) -> Tensor:
    """The loss summed over the pairs of a batch."""
    chosen, rejected = sequence_logps(policy(batch.ids, batch.mask).logits, batch.labels).chunk(2)
    with torch.no_grad():
        ref_logps = sequence_logps(reference(batch.ids, batch.mask).logits, batch.labels)
    return spo_loss(chosen, rejected, *ref_logps.chunk(2), beta=beta, reduction="sum")


if __name__ == "__main__":
    import toy

    accelerator = Accelerator()
    policy, reference = toy.models()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(toy.pairs(24), batch_size=4, collate_fn=toy.collate)
    policy, optimizer, loader = accelerator.prepare(policy, optimizer, loader)
    reference.to(accelerator.device)
    for loss in train(
        policy, reference, loader, optimizer, accelerator, micro_batches=2, beta=0.025
    ):
        accelerator.print(loss)
