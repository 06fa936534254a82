"""How many matrix products a call takes. N is the number of tokens that count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.fused import flat_logps, flat_pair
from helpers.wings import APODown
from spoloss import SPO
from spoloss.torch import _operator

aten = torch.ops.aten
P, T, D, V = 3, 8, 5, 40
PRODUCTS = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1}
GENERATOR = torch.Generator().manual_seed(0)


class Flops(TorchDispatchMode):
    """Counts products, which `torch.utils.flop_counter` does not: it ignores `addmm_`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            a, b = args[PRODUCTS[func.overloadpacket] :][:2]
            self.count += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


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


def products(
    call: Callable[..., Tensor],
    *,
    trained: bool,
    hidden_wanted: bool = True,
    backward: bool = True,
    **options: Any,
) -> float:
    """The products of a forward and backward, in units of 2NDV FLOPs."""
    hidden, weight, labels = batch()
    for states in hidden:
        states.requires_grad_(hidden_wanted)
    weight.requires_grad_(trained)
    with Flops() as flops:
        value = call(hidden, weight, labels, shift=False, **options)
        if backward:
            value.backward()
    return flops.count / (2 * int((labels >= 0).sum()) * D * V)


@pytest.mark.parametrize("chunk_size", [3, 12, None])  # 3: every pair is long
@pytest.mark.parametrize("name", CALLS)
def test_a_frozen_head_takes_two_products(name: str, chunk_size: int | None) -> None:
    assert products(CALLS[name], trained=False, chunk_size=chunk_size) == 2


@pytest.mark.parametrize("chunk_size", [3, 12, None])
@pytest.mark.parametrize(
    ("name", "count"), [("mean", 3), ("sum", 3), ("none", 4), ("linear_logps", 4)]
)
def test_a_trained_head(name: str, count: int, chunk_size: int | None) -> None:
    assert products(CALLS[name], trained=True, chunk_size=chunk_size) == count
    alone = products(CALLS[name], trained=True, hidden_wanted=False, chunk_size=chunk_size)
    assert alone == count - 1


@pytest.mark.parametrize("name", CALLS)
def test_without_a_gradient_there_is_one_product(name: str) -> None:
    nothing = {"trained": False, "hidden_wanted": False, "backward": False}
    assert products(CALLS[name], **nothing) == 1
    with torch.no_grad():
        assert products(CALLS[name], trained=True, backward=False) == 1


@pytest.mark.parametrize(("trained", "count"), [(False, 2), (True, 4)])
def test_a_compiled_call(monkeypatch: pytest.MonkeyPatch, count: int, *, trained: bool) -> None:
    flops = Flops()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any) -> Any:  # torch.compile does not work inside of the mode
            with flops:
                return function(*args)

        return inside

    monkeypatch.setattr(_operator, "forward", counted(_operator.forward))
    monkeypatch.setattr(_operator, "backward", counted(_operator.backward))
    hidden, weight, labels = batch()
    leaves = [states.requires_grad_() for states in hidden]
    weight.requires_grad_(trained)
    for call in (CALLS["linear_logps"], CALLS["mean"]):
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        flops.count = 0
        compiled(leaves, weight, labels, shift=False).backward()
        assert flops.count / (2 * int((labels >= 0).sum()) * D * V) == count
