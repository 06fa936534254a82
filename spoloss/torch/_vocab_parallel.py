"""A head split over the vocabulary: each rank of a group has some rows of the weight.

All ranks get the same tokens and the same upstream gradient. Each computes the logits of its own
rows. The ranks exchange three numbers per token: the largest logit, the target's logit, and the sum
of exponentials.
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
    """This rank's rows of the head: from `start` on, as many as its weight has.

    Attributes:
      group: the ranks that share one head, in the order of their rows.
      start: the number of rows on the ranks before this one.
      largest: the number of rows of the largest shard.
      vocabulary: the number of rows of all shards.
      rows: the number of tokens per tile, the smallest over the ranks.
      kept_numbers: the number of exponentials that a kept tile may have, the smallest over the
        ranks.
    """

    group: ProcessGroup
    start: int
    largest: int
    vocabulary: int
    rows: int
    kept_numbers: int

    def join_sums(
        self, shift: Tensor, others: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sums over all shards for n tokens: shift, sum of exponentials, target's logit.

        Args:
          shift: [n] the number that this rank subtracted before its exponentials.
          others: [n] the sum of this rank's exponentials, without the target.
          target: [n] the target's logit, -inf if another rank has it.
        """
        highest = torch.stack([shift, target])
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        others = others * (shift - highest[0]).exp()
        self.sum_(others)
        return highest[0], others, highest[1]

    def sum_(self, partial: Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        dist.all_reduce(partial, group=self.group)


def refuse_compilation() -> None:
    """Raise an error for a split head in a compiled graph.

    Dynamo then runs the call eagerly, or reports the error with fullgraph=True.

    Raises:
      RuntimeError: under torch.compile.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("vocab_parallel_group cannot be part of a compiled graph")


def join(
    group: ProcessGroup,
    weight: Tensor,
    labels: Iterable[Tensor],
    ignore_index: int,
    facts: dict[str, int],
    *,
    rows: int,
    kept_numbers: int,
) -> VocabShard:
    """This rank's place among the shards, from one exchange between all ranks.

    Args:
      group: the ranks that share the head.
      weight: this rank's rows, [rows, D].
      labels: token ids of any shape, the same on all ranks.
      ignore_index: the label to ignore.
      facts: name -> number of everything else that must be equal on all ranks. Ranks that differ
        would deadlock.
      rows: the tokens per tile on this rank's device. The ranks agree on the smallest, because
        ranks with different tiles would deadlock.
      kept_numbers: the exponentials of a kept tile on this rank's device. The ranks agree on the
        smallest.

    Raises:
      TypeError: `group` is not a process group.
      ValueError: the ranks do not agree, a shard is empty, or the shards together have fewer rows
        than the labels need.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "vocab_parallel_group must be a torch.distributed ProcessGroup (for a DeviceMesh: "
            f"mesh.get_group()), got {type(group).__name__}"
        )
    ids = torch.cat([side.flatten().long() for side in labels])
    ids = torch.cat([torch.where(ids == ignore_index, -1, ids), ids.new_tensor([-1])])
    known = [len(weight), rows, kept_numbers, *facts.values()]
    mine = torch.cat([ids.new_tensor(known), torch.stack([ids.sum(), ids.max()])])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    sizes, all_rows, all_kept, *others, tops = torch.stack(gathered).t().tolist()
    for name, values in zip([*facts, "the labels (here their sum)"], others, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"the ranks of vocab_parallel_group must agree on {name}, got {values}"
            )
    _check_sizes(sizes, max(tops))
    start = sum(sizes[: dist.get_rank(group)])
    return VocabShard(group, start, max(sizes), sum(sizes), min(all_rows), min(all_kept))


def _check_sizes(sizes: list[int], top: int) -> None:
    if min(sizes) == 0:
        raise ValueError(
            f"every rank of vocab_parallel_group needs at least one row of weight, got {sizes} rows"
        )
    if top >= sum(sizes):
        raise ValueError(
            f"the shards of weight add up to {' + '.join(map(str, sizes))} = {sum(sizes)} rows "
            f"over vocab_parallel_group, too few for the label {top}"
        )
