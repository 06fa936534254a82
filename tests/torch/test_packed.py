"""cu_seqlens in PyTorch: graphs, offsets that do not fit, the default dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.fused import flat_logps
from spoloss.torch import sequence_logps

T, D, V = 16, 4, 11
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(1, T, D, generator=GENERATOR)
WEIGHT = torch.randn(V, D, generator=GENERATOR)
LABELS = torch.randint(0, V, (1, T), generator=GENERATOR)
WAYS: dict[str, Callable[..., Tensor]] = {
    "logits": lambda hidden, weight, labels, **options: sequence_logps(
        hidden @ weight.t(), labels, **options
    ),
    "hidden states": flat_logps,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_way
def test_it_compiles_and_then_nan_marks_what_no_check_could(way: Callable[..., Tensor]) -> None:
    # The filter: Dynamo instantiates any autograd.Function and so warns of itself (torch 2.13).
    right = torch.tensor([0, 5, 6, 6, 13, 16], dtype=torch.int32)
    back = torch.tensor([0, 5, 9, 6, 13, 16], dtype=torch.int32)
    compiled = torch.compile(way, backend="eager", fullgraph=True)
    arguments = (HIDDEN.double(), WEIGHT.double(), LABELS)
    found, want = (function(*arguments, cu_seqlens=right) for function in (compiled, way))
    torch.testing.assert_close(found, want)
    if way is not flat_logps:
        assert compiled(*arguments, cu_seqlens=back).isnan().all()
    else:  # the fused head reads the offsets with the labels, in a compiled graph too
        with pytest.raises(ValueError, match="must rise from 0 to T = 16"):
            compiled(*arguments, cu_seqlens=back)


@every_way
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
    with pytest.raises(error, match=message):
        way(HIDDEN, WEIGHT, LABELS, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_way
def test_averages_do_not_depend_on_the_default_dtype(
    way: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    hidden, labels = HIDDEN.repeat(1, 200, 1), LABELS.repeat(1, 200)
    cu_seqlens = torch.tensor([0, 301, 3200])
    want = way(hidden, WEIGHT, labels, cu_seqlens=cu_seqlens, average=True)
    torch.set_default_dtype(dtype)
    try:
        got = way(hidden, WEIGHT, labels, cu_seqlens=cu_seqlens, average=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
    assert got.dtype == want.dtype
