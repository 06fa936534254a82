"""The fused head with any division of the work into tiles of tokens and blocks of the vocabulary.

Real sizes have many tiles of many blocks, whose shapes depend on each other. Here the memory of a
device is so small that a small problem has them too.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.fused import flat_logps, flat_pair, with_memory
from spoloss import SPO, pair_loss
from spoloss.torch import _devices, _tiles, sequence_logps

WIDTH = 3


@dataclass(frozen=True)
class Tiling:
    """A problem, and the memory that divides it.

    Attributes:
      lengths: tokens of the two completions of each pair.
      vocabulary: V.
      needs: whether hidden states and weight require a gradient.
      rows: tokens of a tile.
      block_numbers: logits of a block.
      kept_numbers: logits of a tile that is kept.
      least: the narrowest block, and what its width is a multiple of.
    """

    lengths: list[tuple[int, int]]
    vocabulary: int
    needs: tuple[bool, bool]
    rows: int
    block_numbers: int
    kept_numbers: int
    least: int

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        itemsize = torch.float64.itemsize
        device = with_memory(
            _devices.CPU,
            block_bytes=self.block_numbers * itemsize,
            rows=self.rows,
            kept_bytes=self.kept_numbers * itemsize,
        )
        patch.setattr(_devices, "CPU", device)
        patch.setattr(_tiles, "LEAST_COLUMNS", self.least)
        patch.setattr(_tiles, "ALIGNED", self.least)
        patch.setattr(_tiles, "LEAST_KEPT_ROWS", 1)


TILINGS = st.builds(
    Tiling,
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    vocabulary=st.integers(1, 40),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
    rows=st.integers(1, 30),
    block_numbers=st.integers(1, 300),
    kept_numbers=st.integers(1, 600),
    least=st.integers(1, 8),
)


@given(TILINGS)
def test_loss_and_gradients_do_not_depend_on_the_tiling(tiling: Tiling) -> None:
    torch.manual_seed(0)
    pairs, longest = len(tiling.lengths), 9
    hidden = torch.randn(2, pairs, longest, WIDTH, dtype=torch.float64)
    weight = torch.randn(tiling.vocabulary, WIDTH, dtype=torch.float64)
    labels = torch.randint(tiling.vocabulary, (2, pairs, longest))
    lengths = torch.tensor(tiling.lengths).T
    labels[torch.arange(longest) >= lengths[..., None]] = -100
    hidden.requires_grad_(tiling.needs[0])
    weight.requires_grad_(tiling.needs[1])
    inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]

    logps = sequence_logps((hidden @ weight.T).flatten(0, 1), labels.flatten(0, 1), shift=False)
    expected = pair_loss(SPO(), *logps.view(2, pairs), -5.0, -5.0, beta=0.1)
    wanted = torch.autograd.grad(expected, inputs, allow_unused=True, retain_graph=True)
    by_logits = torch.autograd.grad(logps.sum(), inputs, retain_graph=True)
    with pytest.MonkeyPatch.context() as patch:
        tiling.apply(patch)
        out = flat_pair(SPO(), *hidden, weight, *labels, -5.0, -5.0, beta=0.1, shift=False)
        ours = flat_logps(hidden.flatten(0, 1), weight, labels.flatten(0, 1), shift=False)
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), inputs), by_logits)
        torch.testing.assert_close(torch.autograd.grad(out.loss, inputs), wanted)
    torch.testing.assert_close(ours, logps)
    torch.testing.assert_close(out.loss, expected)
