"""The largest tensors of PyTorch's wing: a tile or a block, and never tokens x vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.fused import Case, cut_blocks, flat_logps, flat_spo, largest
from helpers.memory import LargestTensor
from helpers.wings import P, T
from spoloss import SPO
from spoloss.torch import _gradients, _tiles, sequence_logps


def test_no_tensor_grows_with_tokens_times_vocabulary() -> None:
    tile, head = 16 * 64 * 4, 64 * 8 * 4
    hidden = lambda pairs, tokens: 2 * pairs * tokens * 8 * 4  # noqa: E731
    for pairs, tokens in ((2, 8), (16, 8), (1, 128), (4, 128)):
        # A log-probability as long as the tokens would be seen too: V is 8 D here.
        pieces = (2 * pairs + 2 * pairs * tokens // 128 + 1) * 128 * 4  # of the sums over tokens
        bound = max(tile, head, pieces, hidden(pairs, tokens))
        assert largest(pairs, tokens, frozen=False) <= bound
        assert largest(pairs, tokens, frozen=True) <= max(tile, pieces, hidden(pairs, tokens))


def test_only_a_block_of_the_vocabulary_exists_where_no_tile_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_blocks(monkeypatch, 16)
    block, head = 128 * 16 * 4, 512 * 8 * 4
    hidden = torch.randn(2, 128, 8, requires_grad=True)
    weight = torch.randn(512, 8)
    labels = torch.randint(0, 512, (2, 128))
    for trained in (False, True):
        weight.requires_grad_(trained)
        with LargestTensor(torch.float32) as watch:
            flat_logps(hidden, weight, labels, chunk_size=128).sum().backward()
        assert watch.bytes == (max(block, head) if trained else block)
    frozen = weight.detach()
    with LargestTensor(torch.float32) as watch:
        flat_spo(
            *hidden.chunk(2), frozen, *labels.chunk(2), 0.0, 0.0, chunk_size=128
        ).loss.backward()
    assert watch.bytes == block


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_a_frozen_head_makes_nothing_of_its_size(
    chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tensor is the hidden gradients of both sides. The weight is half as large again.

    Blocks of the weight are views, which the watch sees too.
    """
    cut_blocks(monkeypatch, 16)
    wide, tokens = 4096, 16
    hidden = torch.randn(2, 1, tokens, wide, requires_grad=True)
    weight, labels = torch.randn(3 * tokens, wide), torch.randint(0, 3 * tokens, (2, 1, tokens))
    with LargestTensor(torch.float32) as watch:
        flat_spo(*hidden, weight, *labels, 0.0, 0.0, chunk_size=chunk_size).loss.backward()
    assert watch.bytes == 2 * tokens * wide * 4


@pytest.mark.parametrize(("long_pairs", "arrays"), [(0, 1), (1, 2), (2, 3), (4, 3)])
def test_arrays_of_the_weights_size(
    long_pairs: int, arrays: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient, which holds the first direction, and those of the other sides of long pairs."""
    made = []
    init = _gradients.HeadGradient.__init__

    def count(self: Any, *args: Any) -> None:
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(_gradients.HeadGradient, "__init__", count)
    case = Case()
    lengths = torch.tensor([T] * long_pairs + [1] * (P - long_pairs))
    case.labels = tuple(
        torch.where(torch.arange(labels.shape[1]) < lengths[:, None], labels.clamp(min=0), -100)
        for labels in case.labels
    )  # type: ignore[assignment]
    got = case.fused(SPO(), chunk_size=3, shift=False).loss
    want = case.unfused(SPO(), shift=False)
    assert len(made) == arrays
    torch.testing.assert_close(case.grads(got), case.grads(want))


def largest_float32(function: Any) -> int:
    logits = torch.randn(4, 64, 128).bfloat16().requires_grad_()
    labels = torch.randint(0, 128, (4, 64))
    with LargestTensor(torch.float32) as watch:
        function(logits, labels).sum().backward()
    return watch.bytes


def test_no_float32_copy_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "LOGITS_BYTES", 16 * 128 * 4)
    whole = 4 * 64 * 128 * 4
    assert largest_float32(sequence_logps) == 16 * 128 * 4
    naive = lambda z, y: z.float().log_softmax(-1).gather(2, y[..., None])  # noqa: E731
    assert largest_float32(naive) == whole  # the watch sees what it is there to see
