"""Padding-free batches against the padded: sequences in one row, parted by cu_seqlens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.fused import flat_logps
from spoloss.torch import _labels, sequence_logps

LENGTHS = (5, 1, 0, 7, 3)
D, V = 4, 11
WAYS: dict[str, Callable[..., Tensor]] = {
    "logits": lambda hidden, weight, labels, **options: sequence_logps(
        hidden @ weight.t(), labels, **options
    ),
    "hidden states": flat_logps,
}


def padded(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels; every label of a sequence counts, its first included."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(LENGTHS), max(LENGTHS), D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, hidden.shape[:2], generator=generator)
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = -100
    labels[3, 2:4] = -100
    return hidden.to(dtype), weight.to(dtype), labels


def pack(values: Tensor) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(values, LENGTHS, strict=True)])[None]


def offsets(dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=dtype)


def both(
    way: Callable[..., Tensor], dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Log-probabilities and gradients of hidden states and weight: padded and packed."""
    hidden, weight, labels = padded(dtype)
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5, 1.5], dtype=torch.float64)
    found = []
    for packed in (False, True):
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if packed:
            logps = way(pack(states), head, pack(labels), cu_seqlens=offsets(), **options)
        else:
            logps = way(states, head, labels, **options)
        grads = torch.autograd.grad((logps * upstream).sum(), (states, head))
        found.append((logps.detach(), *grads))
    return found[0], found[1]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_half_precision_is_summed_in_float32(way: Callable[..., Tensor]) -> None:
    expected, found = both(way, torch.bfloat16)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_lost_border_is_seen(way: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "spoloss.torch._labels._starts", lambda _, length: torch.zeros(1, length, dtype=torch.bool)
    )
    expected, found = both(way)
    assert (found[0] - expected[0]).abs().max() > 0.1


def test_per_token_is_0_at_the_borders() -> None:
    hidden, weight, labels = padded()
    expected = flat_logps(hidden, weight, labels, per_token=True)
    found = flat_logps(pack(hidden), weight, pack(labels), per_token=True, cu_seqlens=offsets())
    torch.testing.assert_close(found, pack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_it_compiles_and_then_nan_marks_what_no_check_could(way: Callable[..., Tensor]) -> None:
    # The filter: Dynamo instantiates any autograd.Function and so warns of itself (torch 2.13).
    hidden, weight, labels = padded()
    compiled = torch.compile(way, backend="eager", fullgraph=True)
    found = compiled(pack(hidden), weight, pack(labels), cu_seqlens=offsets())
    torch.testing.assert_close(found, way(hidden, weight, labels), rtol=1e-12, atol=1e-12)
    back = offsets().index_fill(0, torch.tensor(2), 9)
    if way is not flat_logps:
        assert compiled(pack(hidden), weight, pack(labels), cu_seqlens=back).isnan().all()
    else:  # the fused head reads the offsets with the labels, in a compiled graph too
        with pytest.raises(ValueError, match="must rise from 0 to T = 16"):
            compiled(pack(hidden), weight, pack(labels), cu_seqlens=back)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 6, 5, 16]), ValueError, r"rise from 0 to T = 16, got \[0, 6, 5, 16\]"),
        (torch.tensor([1, 6, 16]), ValueError, "rise from 0 to T = 16"),
        (torch.tensor([0, 6, 15]), ValueError, "rise from 0 to T = 16"),
        (torch.tensor([0]), ValueError, r"shape \[S \+ 1\] with S >= 1, got \(1,\)"),
        (torch.tensor([[0, 16]]), ValueError, r"shape \[S \+ 1\]"),
        (torch.tensor([0.0, 16.0]), TypeError, "must be integer, got torch.float32"),
        (torch.tensor([0, 16], dtype=torch.int16), TypeError, "int32 or int64, got torch.int16"),
        (torch.tensor([0, 16], device="meta"), ValueError, r"on the cpu of \S*labels, got meta"),
    ],
)
def test_offsets_that_do_not_fit(
    way: Callable[..., Tensor], cu_seqlens: Tensor, error: type[Exception], message: str
) -> None:
    hidden, weight, labels = padded()
    with pytest.raises(error, match=message):
        way(pack(hidden), weight, pack(labels), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_more_than_one_row_is_refused(way: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"labels must have shape \[1, T\], got \(5, 7\)"):
        way(*padded(), cu_seqlens=offsets())


LONG = 20_000


def error(values: Tensor, total: Tensor) -> float:
    """In units of eps of the sum."""
    exact = math.fsum(values.tolist())
    return abs(total.item() - exact) / abs(exact) / torch.finfo(values.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_sequences(dtype: torch.dtype) -> None:
    """Sequences of every length at any place, each within a few eps."""
    values = -torch.rand(LONG, dtype=dtype, generator=torch.Generator().manual_seed(0)) - 3.0
    cuts = torch.tensor([0, 0, 1, 1023, 1024, 1024, 1030, 2048, 9_000, 9_000, LONG, LONG])
    sums = _labels.sum_sequences(values[None], cuts)
    assert len(sums) == len(cuts) - 1
    for start, stop, total in zip(cuts[:-1], cuts[1:], sums, strict=True):
        assert (total == 0) if start == stop else error(values[start:stop], total) < 4
    whole = _labels.sum_sequences(values[None], torch.tensor([0, LONG]))
    assert error(values, whole) < 4
    lengths = _labels.sum_sequences(torch.ones(1, LONG, dtype=torch.bool), cuts)
    assert torch.equal(lengths, cuts.diff())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_averages_do_not_depend_on_the_default_dtype(
    way: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    hidden, weight = torch.randn(1, 3000, D), torch.randn(V, D)
    labels, cu_seqlens = torch.randint(0, V, (1, 3000)), torch.tensor([0, 301, 3000])
    want = way(hidden, weight, labels, cu_seqlens=cu_seqlens, average=True)
    torch.set_default_dtype(dtype)
    try:
        got = way(hidden, weight, labels, cu_seqlens=cu_seqlens, average=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
    assert got.dtype == want.dtype
