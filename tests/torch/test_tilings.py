"""The fused head with any division of the work into tiles of tokens and blocks of the vocabulary.

Real sizes have many tiles of many blocks, whose shapes depend on each other. Here the memory of a
device is so small that a small problem has them too.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.fused import flat_logps, flat_pair
from spoloss import SPO, pair_loss
from spoloss.torch import _devices, _tiles, sequence_logps

WIDTH, LONGEST = 3, 9
FLOAT64 = torch.float64.itemsize


def of_logits(most: int) -> st.SearchStrategy[int]:
    """Memory of up to so many logits."""
    return st.integers(1, most).map(lambda count: count * FLOAT64)


@given(
    lengths=st.lists(st.tuples(*2 * [st.integers(0, LONGEST)]), min_size=1, max_size=6),
    vocabulary=st.integers(1, 40),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
    memory=st.builds(
        _tiles.Memory,
        block_bytes=of_logits(300),
        rows=st.integers(1, 30),
        kept_bytes=of_logits(600),
        sums_bytes=of_logits(300),
    ),
    columns=st.integers(1, 8),
)
def test_loss_and_gradients_do_not_depend_on_the_tiling(
    lengths: list[tuple[int, int]],
    vocabulary: int,
    needs: tuple[bool, bool],
    memory: _tiles.Memory,
    columns: int,
) -> None:
    """Lengths are of the two completions of each pair, `needs` of hidden states and weight."""
    torch.manual_seed(0)
    pairs = len(lengths)
    hidden = torch.randn(2, pairs, LONGEST, WIDTH, dtype=torch.float64)
    weight = torch.randn(vocabulary, WIDTH, dtype=torch.float64)
    labels = torch.randint(vocabulary, (2, pairs, LONGEST))
    labels[torch.arange(LONGEST) >= torch.tensor(lengths).T[..., None]] = -100
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]

    logps = sequence_logps((hidden @ weight.T).flatten(0, 1), labels.flatten(0, 1), shift=False)
    expected = pair_loss(SPO(), *logps.view(2, pairs), -5.0, -5.0, beta=0.1)
    wanted = torch.autograd.grad(expected, inputs, allow_unused=True, retain_graph=True)
    by_logits = torch.autograd.grad(logps.sum(), inputs, retain_graph=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_devices, "CPU", _devices.CPU._replace(memory=memory))
        patch.setattr(_tiles, "LEAST_COLUMNS", columns)
        patch.setattr(_tiles, "ALIGNED", columns)
        patch.setattr(_tiles, "LEAST_KEPT_ROWS", 1)
        out = flat_pair(SPO(), *hidden, weight, *labels, -5.0, -5.0, beta=0.1, shift=False)
        ours = flat_logps(hidden.flatten(0, 1), weight, labels.flatten(0, 1), shift=False)
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), inputs), by_logits)
        torch.testing.assert_close(torch.autograd.grad(out.loss, inputs), wanted)
    torch.testing.assert_close(ours, logps)
    torch.testing.assert_close(out.loss, expected)
