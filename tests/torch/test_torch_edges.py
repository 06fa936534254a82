"""The edges of the fused head: autocast, devices, what a backward keeps, graphs."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.fused import Case, flat_logps, flat_spo
from helpers.wings import D, P, V
from spoloss import SPO, spo_loss
from spoloss.torch import _autograd, sequence_logps

CHUNKS = [3, None]


def inputs(case: Case) -> tuple[Any, ...]:
    chosen, rejected, weight, _ = case.tensors.values()
    return (chosen, rejected, weight, *case.labels, *case.reference)


def test_float64_stays_float64_under_autocast() -> None:
    case = Case()
    want = case.fused(SPO()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.fused(SPO()).loss
        logps = flat_logps(case.tensors["chosen_hidden"], case.tensors["weight"], case.labels[0])
    assert got.dtype == logps.dtype == torch.float64
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(case.grads(got), case.grads(want))


def test_autocast_equals_inputs_that_are_rounded_beforehand() -> None:
    case, rounded = Case(dtype=torch.float32), Case(dtype=torch.float32)
    for name, tensor in case.tensors.items():
        rounded.tensors[name] = tensor.detach().bfloat16().requires_grad_()
    case.tensors["bias"] = rounded.tensors["bias"].float()  # autocast does not round what is added
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.fused(SPO())
    want = rounded.fused(SPO())
    torch.testing.assert_close(got.chosen_logps, want.chosen_logps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_a_frozen_head_may_change_before_the_backward(chunk_size: int | None) -> None:
    case = Case((True, True, False, False))
    want = case.grads(case.fused(SPO(), chunk_size=chunk_size).loss)
    loss = case.fused(SPO(), chunk_size=chunk_size).loss
    case.tensors["weight"].mul_(3.0)
    torch.testing.assert_close(case.grads(loss), want)


def test_hidden_states_are_not_kept_alive() -> None:
    case = Case()
    chosen, rejected, weight, _ = case.tensors.values()
    copies = [states.detach().clone() for states in (chosen, rejected)]
    freed: list[weakref.ref[Tensor]] = []

    def last_layer(states: Tensor) -> Tensor:
        out = Identity.apply(states)
        freed.append(weakref.ref(out))
        return out

    loss = flat_spo(
        *(last_layer(states.requires_grad_()) for states in copies),
        weight,
        *case.labels,
        *case.reference,
    ).loss
    gc.collect()
    assert all(reference() is None for reference in freed)
    loss.backward()
    assert all(states.grad is not None for states in copies)


class Identity(torch.autograd.Function):
    """A layer that keeps nothing."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:  # noqa: ARG004
        return states.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # noqa: ARG004
        return upstream


def test_a_plain_backward_copies_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    copies = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda self, **k: copies.append(self) or clone(self, **k))
    case.fused(SPO()).loss.backward()
    assert not [tensor for tensor in copies if tensor.ndim]


def test_a_scaled_backward_makes_no_second_gradient_of_the_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = []
    put = _autograd.Held.put
    monkeypatch.setattr(_autograd.Held, "put", lambda self, *g: held.extend(g) or put(self, *g))
    case = Case()
    (case.fused(SPO()).loss * 2.0).backward()
    assert case.tensors["weight"].grad.data_ptr() == held[1].data_ptr()


def test_a_head_that_zero_3_has_partitioned() -> None:
    case = Case()
    weight = torch.zeros(0)
    weight.ds_id = 3  # type: ignore[attr-defined]
    for call in (
        lambda: flat_logps(case.tensors["chosen_hidden"], weight, case.labels[0]),
        lambda: flat_spo(*inputs(case)[:2], weight, *inputs(case)[3:]),
    ):
        with pytest.raises(
            ValueError, match=r"ZeRO-3 has partitioned it\. Compute the loss inside"
        ):
            call()


def test_the_default_device_is_another() -> None:
    case = Case()
    chosen, _, weight, _ = case.tensors.values()
    calls = (
        lambda: case.fused(SPO(), nll_weight=0.5, weights=0.5).loss,
        lambda: case.fused(SPO(), reduction="none").loss.sum(),
        lambda: flat_logps(chosen, weight, case.labels[0], average=True).sum(),
    )
    for call in calls:
        want = call()
        with torch.device("meta"):  # stands for "cuda" where there is none
            got = call()
            grads = case.grads(got)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads, case.grads(want))


def lengths_compiled(function: Any, *, dynamic: bool | None) -> int:
    """How many graphs serve eleven lengths, each checked against the eager function."""
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for length in range(5, 16):
        hidden = torch.randn(2, P, length, D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, V, (2, P, length), generator=generator)
        labels[:, 1, :3] = -100
        leaves = (hidden.requires_grad_(), Case().tensors["weight"])
        got, want = compiled(*leaves, labels), function(*leaves, labels)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)
        )
    return graphs


def by_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    sides = zip(hidden, labels, strict=True)
    return spo_loss(*(sequence_logps(h @ weight.t(), y) for h, y in sides), 0.0, 0.0, beta=0.1)


def by_fused_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return flat_spo(*hidden, weight, *labels, 0.0, 0.0, nll_weight=0.1).loss


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("function", [by_logits, by_fused_head])
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.extended)])
def test_two_graphs_serve_any_number_of_lengths(function: Any, *, dynamic: bool | None) -> None:
    assert lengths_compiled(function, dynamic=dynamic) <= 2


class NoGradient(torch.autograd.Function):
    """The identity, for which autograd has no gradient at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # noqa: ARG004
        return None


@pytest.mark.parametrize("trained", [False, True])
def test_no_gradient_from_above_makes_none_below(*, trained: bool) -> None:
    hidden = torch.randn(1, 4, 3, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=trained)
    logps = NoGradient.apply(flat_logps(hidden, weight, torch.ones(1, 4, dtype=torch.long)))
    assert torch.autograd.grad(logps.sum(), hidden, allow_unused=True) == (None,)
