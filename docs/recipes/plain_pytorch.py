"""SPO in a plain PyTorch loop, from logits or with the fused head, over uneven micro-batches.

Tested with PyTorch 2.13 and Transformers 5.23. To change an existing loop: the 5 lines of
`loss_by_logits`. With gradient accumulation, 2 more lines: the count and the division.

Pitfall: a mean of the micro-batches' means gives the pairs of a small micro-batch larger weights.
Divide the sum by the number of pairs in the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spoloss import spo_loss
from spoloss.torch import Completions, Head, head_of, linear_logps, linear_spo_loss, sequence_logps


def loss_by_logits(policy: Any, reference: Any, batch: Any, beta: float) -> Tensor:
    """The loss summed over the pairs. Rows are all chosen, then all rejected."""
    chosen, rejected = sequence_logps(policy(batch.ids, batch.mask).logits, batch.labels).chunk(2)
    with torch.no_grad():
        ref_logps = sequence_logps(reference(batch.ids, batch.mask).logits, batch.labels)
    return spo_loss(chosen, rejected, *ref_logps.chunk(2), beta=beta, reduction="sum")


def loss_by_tiles(
    policy: Any, reference: Any, head: Head, ref_head: Head, batch: Any, beta: float
) -> Tensor:
    """The same from hidden states, without holding all logits. The heads come from `head_of`."""
    hidden = policy.model(batch.ids, batch.mask).last_hidden_state
    with torch.no_grad():
        ref_hidden = reference.model(batch.ids, batch.mask).last_hidden_state
        ref_logps = linear_logps(ref_head, Completions(ref_hidden, batch.labels))
    sides = map(Completions, hidden.chunk(2), batch.labels.chunk(2))
    return linear_spo_loss(head, *sides, *ref_logps.chunk(2), beta=beta, reduction="sum").loss


def accumulate(
    loss_of: Callable[[Any, float], Tensor], micro_batches: Sequence[Any], beta: float
) -> float:
    """Runs backward for the micro-batches of one step. Returns their mean loss per pair."""
    pairs = sum(len(batch.labels) // 2 for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        loss = loss_of(batch, beta) / pairs
        loss.backward()
        total += loss.item()
    return total


if __name__ == "__main__":
    import toy

    policy, reference = toy.models()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    pairs = toy.pairs(6)
    micro_batches = [toy.collate(pairs[:4]), toy.collate(pairs[4:])]
    heads = head_of(policy), head_of(reference)  # once, before the loop
    loss_of = partial(loss_by_tiles, policy, reference, *heads)  # loss_by_logits takes no heads
    for _ in range(3):
        print(accumulate(loss_of, micro_batches, beta=0.025))
        optimizer.step()
        optimizer.zero_grad()
