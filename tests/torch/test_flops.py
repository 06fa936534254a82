"""How many matrix products a call takes. N is the number of tokens that count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers.fused import flat_logps, flat_pair
from helpers.wings import APODown
from spoloss import SPO
from spoloss.torch import _operator

P, T, D, V = 3, 8, 5, 40
GENERATOR = torch.Generator().manual_seed(0)


def counter() -> FlopCounterMode:
    """PyTorch's, which does not know `addmm_`."""
    of_shapes = lambda total, a, b, **_: 2 * total[0] * total[1] * a[1]  # noqa: ARG005, E731
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: of_shapes})


def batch() -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states of both sides, weight and labels, of which a third does not count."""
    hidden = [torch.randn(P, T, D, generator=GENERATOR) for _ in range(2)]
    labels = torch.randint(0, V, (2, P, T), generator=GENERATOR)
    labels[:, :, :3] = -100
    return hidden, torch.randn(V, D, generator=GENERATOR), labels


def logps(hidden: list[Tensor], weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """KTO or any other loss of the log-probabilities."""
    sides = zip(hidden, labels, strict=True)
    return sum(torch.sigmoid(flat_logps(h, weight, y, **options)).sum() for h, y in sides)


def pair(loss: Any, **how: Any) -> Callable[..., Tensor]:
    def call(hidden: list[Tensor], weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return flat_pair(loss, *hidden, weight, *labels, -3.0, -3.0, **how, **options).loss.sum()

    return call


CALLS = {
    "linear_logps": logps,
    "mean": pair(SPO()),
    "sum": pair(APODown(), reduction="sum", nll_weight=0.5),
    "none": pair(APODown(), reduction="none"),
}


def in_products(flops: FlopCounterMode, labels: Tensor) -> float:
    """In units of one product, 2NDV FLOPs."""
    return flops.get_total_flops() / (2 * int((labels >= 0).sum()) * D * V)


def products(
    name: str, *, trained: bool, hidden_wanted: bool = True, chunk_size: int | None = None
) -> float:
    """The products of a forward and, if anything requires a gradient, backward."""
    hidden, weight, labels = batch()
    for states in hidden:
        states.requires_grad_(hidden_wanted)
    weight.requires_grad_(trained)
    with counter() as flops:
        value = CALLS[name](hidden, weight, labels, shift=False, chunk_size=chunk_size)
        if value.requires_grad:
            value.backward()
    return in_products(flops, labels)


@pytest.mark.parametrize("chunk_size", [3, 12, None])  # 3: every pair is long
@pytest.mark.parametrize(
    ("name", "count"), [("mean", 3), ("sum", 3), ("none", 4), ("linear_logps", 4)]
)
def test_products_of_a_call(name: str, count: int, chunk_size: int | None) -> None:
    """The one pass takes a product less with a trained head; each gradient takes a product."""
    assert products(name, trained=True, chunk_size=chunk_size) == count
    only_head = products(name, trained=True, hidden_wanted=False, chunk_size=chunk_size)
    assert only_head == count - 1
    assert products(name, trained=False, chunk_size=chunk_size) == 2
    assert products(name, trained=False, hidden_wanted=False, chunk_size=chunk_size) == 1
    with torch.no_grad():
        assert products(name, trained=True, chunk_size=chunk_size) == 1


@pytest.mark.parametrize(("trained", "count"), [(False, 2), (True, 4)])
@pytest.mark.parametrize("name", ["linear_logps", "mean"])
def test_a_compiled_call(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int, *, trained: bool
) -> None:
    found = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any) -> Any:  # torch.compile does not work inside of the mode
            with counter() as flops:
                result = function(*args)
            found.append(in_products(flops, labels))
            return result

        return inside

    monkeypatch.setattr(_operator, "forward", counted(_operator.forward))
    monkeypatch.setattr(_operator, "backward", counted(_operator.backward))
    hidden, weight, labels = batch()
    leaves = [states.requires_grad_() for states in hidden]
    weight.requires_grad_(trained)
    torch.compiler.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    compiled(leaves, weight, labels, shift=False).backward()
    assert sum(found) == pytest.approx(count)
