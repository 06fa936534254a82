"""cu_seqlens in PyTorch: graphs, offsets that do not fit, sums of sequences."""

from __future__ import annotations

import math
from collections.abc import Callable

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


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels; every label of a sequence counts, its first included."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(LENGTHS), max(LENGTHS), D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, hidden.shape[:2], generator=generator)
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = -100
    labels[3, 2:4] = -100
    return hidden, weight, labels


def pack(values: Tensor) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(values, LENGTHS, strict=True)])[None]


def offsets() -> Tensor:
    return torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)


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
