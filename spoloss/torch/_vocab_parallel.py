"""A head whose weight is split over the vocabulary: each rank of a group holds some rows of V.

Ranks see the same tokens and the same upstream gradient. Each works on logits of its own rows; of
every token only three numbers travel: the largest logit, the target's, and the sum of exponentials.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of V: from `start` on, as many as its weight has.

    Attributes:
      group: the ranks that hold one head together, in the order of their rows.
      start: how many rows the ranks before this one hold.
      largest: the rows of the largest shard.
      vocabulary: the rows of all shards.
    """

    group: ProcessGroup
    start: int
    largest: int
    vocabulary: int

    def join_sums(
        self, shift: Tensor, others: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of n tokens, over all shards: what to subtract from logits, the sums, the target's logit.

        Args:
          shift: [n] what this rank subtracted before its exponentials.
          others: [n] the sum of these, without the target's.
          target: [n] the target's logit; -inf where another rank holds it.
        """
        highest = torch.stack([shift, target])
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        others = others * (shift - highest[0]).exp()
        self.sum_(others)
        return highest[0], others, highest[1]

    def sum_(self, *partial: Tensor | None) -> None:
        """Sum each tensor over the ranks, in place."""
        for tensor in partial:
            if tensor is not None:
                dist.all_reduce(tensor, group=self.group)


def join(
    group: ProcessGroup,
    weight: Tensor,
    labels: Iterable[Tensor],
    ignore_index: int,
    facts: dict[str, int],
) -> VocabShard:
    """This rank's place among the shards, learnt from all ranks in one exchange.

    Args:
      group: the ranks that hold the head.
      weight: this rank's rows, [rows, D].
      labels: token ids of any shape, the same on all ranks.
      ignore_index: the label that does not count.
      facts: name -> number of what else must be one on all ranks, lest they wait for one another.

    Raises:
      TypeError: `group` is not a process group.
      ValueError: the ranks do not agree, a shard is empty, or the shards together hold fewer rows
        than the labels need.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "vocab_parallel_group must be a torch.distributed ProcessGroup (of a DeviceMesh: "
            f"mesh.get_group()), got {type(group).__name__}"
        )
    ids = torch.cat([side.flatten() for side in labels])
    ids = torch.cat([torch.where(ids == ignore_index, -1, ids), ids.new_tensor([-1])]).long()
    known = torch.tensor([len(weight), *facts.values()], device=ids.device)
    mine = torch.cat([known, torch.stack([ids.sum(), ids.max()])])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    sizes, *others, tops = torch.stack(gathered).t().tolist()
    for name, values in zip([*facts, "the labels (here their sum)"], others, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"the ranks of vocab_parallel_group must agree on {name}, got {values}"
            )
    _check_sizes(sizes, max(tops))
    return VocabShard(group, sum(sizes[: dist.get_rank(group)]), max(sizes), sum(sizes))


def _check_sizes(sizes: list[int], top: int) -> None:
    if min(sizes) == 0:
        raise ValueError(f"every rank of vocab_parallel_group needs a row of weight, got {sizes}")
    if top >= sum(sizes):
        raise ValueError(
            f"the shards of weight add up to {' + '.join(map(str, sizes))} = {sum(sizes)} rows "
            f"over vocab_parallel_group, too few for the label {top}"
        )
