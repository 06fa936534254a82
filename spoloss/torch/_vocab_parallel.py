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

from spoloss.torch._labels import IGNORED
from spoloss.torch._tiles import Heights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of the head: from `start` on, as many as its weight has.

    Attributes:
      group: the ranks that share one head, in the order of their rows.
      start: the number of rows on the ranks before this one.
      vocabulary: the number of rows of all shards.
      heights: the tokens per tile, the smallest over the ranks.
    """

    group: ProcessGroup
    start: int
    vocabulary: int
    heights: Heights

    def join_sums(
        self, peak: Tensor, others: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The columns [n] of `Sums` over all shards, from those of this rank."""
        highest = torch.stack([peak, target])
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        others = others * (peak - highest[0]).exp()
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
    targets: Iterable[Tensor],
    facts: dict[str, int],
    heights: Heights,
) -> VocabShard:
    """This rank's place among the shards, from one exchange between all ranks.

    Args:
      group: the ranks that share the head.
      weight: this rank's rows, [rows, D].
      targets: token ids of any shape, the same on all ranks; IGNORED where none counts.
      facts: name -> number of everything else that must be equal on all ranks. Ranks that differ
        would deadlock.
      heights: the tokens per tile on this rank's device. The ranks agree on the smallest, because
        ranks with different tiles would deadlock.

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
    ids = torch.cat([side.flatten() for side in targets])
    ids = torch.cat([torch.where(ids == IGNORED, -1, ids), ids.new_tensor([-1])])
    known = [len(weight), *heights, *facts.values()]
    mine = torch.cat([ids.new_tensor(known), torch.stack([ids.sum(), ids.max()])])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    sizes, *others, tops = torch.stack(gathered).t().tolist()
    of_ranks, others = others[: len(heights)], others[len(heights) :]
    for name, values in zip([*facts, "the labels (here their sum)"], others, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"the ranks of vocab_parallel_group must agree on {name}, got {values}"
            )
    _check_sizes(sizes, max(tops))
    start = sum(sizes[: dist.get_rank(group)])
    return VocabShard(group, start, sum(sizes), Heights(*map(min, of_ranks)))


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
