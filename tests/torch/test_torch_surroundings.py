"""What surrounds a call in PyTorch: autocast, devices, checkpoints, hooks, a second backward."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helpers.fused import INPUTS, Case, flat_logps, flat_spo
from helpers.wings import D, P, T
from spoloss import SPO, spo_loss
from spoloss.torch import _autograd, sequence_logps


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
    """Except that its gradients are float32, as the inputs are, and not rounded to bfloat16."""
    case, rounded = Case(dtype=torch.float32), Case(dtype=torch.float32)
    for name, tensor in case.tensors.items():
        rounded.tensors[name] = tensor.detach().bfloat16().requires_grad_()
    case.tensors["bias"] = rounded.tensors["bias"].float()  # autocast does not round what is added
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.fused(SPO())
    want = rounded.fused(SPO())
    torch.testing.assert_close(got.chosen_logps, want.chosen_logps, rtol=1e-6, atol=1e-6)
    assert got.loss.dtype == torch.float64  # that of the references
    for mine, theirs in zip(case.grads(got.loss), rounded.grads(want.loss), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs.float(), rtol=2.0**-6, atol=1e-6)


def test_the_default_device_is_another() -> None:
    case = Case()
    chosen, _, weight, _ = case.tensors.values()
    for call in (
        lambda: case.fused(SPO(), nll_weight=0.5, weights=0.5).loss,
        lambda: case.fused(SPO(), reduction="none").loss.sum(),
        lambda: flat_logps(chosen, weight, case.labels[0], average=True).sum(),
    ):
        want = call()
        with torch.device("meta"):  # stands for "cuda" where there is none
            got = call()
            grads = case.grads(got)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads, case.grads(want))


def test_interleaved_views() -> None:
    both = torch.randn(2 * P, T, D, dtype=torch.float64, requires_grad=True)
    case = Case()
    weight, (chosen, _) = case.tensors["weight"], case.labels
    out = flat_spo(both[::2], both[1::2], weight, chosen, chosen, *case.reference)
    logps = sequence_logps(both @ weight.t(), chosen.repeat_interleave(2, dim=0))
    want = spo_loss(logps[::2], logps[1::2], *case.reference, beta=0.1)
    torch.testing.assert_close(torch.autograd.grad(out.loss, both), torch.autograd.grad(want, both))


# Autograd's graph, and what it keeps


def test_without_a_gradient_there_is_no_graph() -> None:
    case = Case()
    with torch.no_grad():
        out = case.fused(SPO())
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, case.unfused(SPO()).detach())
    assert Case((False,) * 4).fused(SPO()).loss.grad_fn is None


@pytest.mark.parametrize("chunk_size", [3, None])
def test_a_frozen_head_may_change_before_the_backward(chunk_size: int | None) -> None:
    case = Case((True, True, False, False))
    want = case.grads(case.fused(SPO(), chunk_size=chunk_size).loss)
    loss = case.fused(SPO(), chunk_size=chunk_size).loss
    case.tensors["weight"].mul_(3.0)
    torch.testing.assert_close(case.grads(loss), want)


def test_hidden_states_are_not_kept_alive() -> None:
    case = Case()
    leaves = [case.tensors[name].detach().requires_grad_() for name in INPUTS[:2]]
    freed: list[weakref.ref[Tensor]] = []

    def last_layer(states: Tensor) -> Tensor:
        out = states.clone()  # which keeps nothing for its backward
        freed.append(weakref.ref(out))
        return out

    sides = map(last_layer, leaves)
    loss = flat_spo(*sides, case.tensors["weight"], *case.labels, *case.reference).loss
    gc.collect()
    assert [reference() for reference in freed] == [None, None]
    loss.backward()
    assert all(states.grad is not None for states in leaves)


def test_a_plain_backward_copies_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda self, **k: copies.append(self) or clone(self, **k))
    Case().fused(SPO()).loss.backward()
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


def test_hooks_never_see_a_buffer_overwritten() -> None:
    """Offloading and debugging tools keep what autograd saves, and compare it afterwards."""
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor, tensor.clone()))
        return tensor

    case = Case()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = case.fused(SPO()).loss + case.fused(SPO(), reduction="none").loss.sum()
        (loss * 2.0).backward()
    assert kept
    assert all(torch.equal(tensor, before) for tensor, before in kept)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_around_it(*, use_reentrant: bool) -> None:
    case = Case()
    leaves = list(case.tensors.values())

    def loss(*inputs: Tensor) -> Tensor:
        return case.fused(SPO(), **dict(zip(INPUTS, inputs, strict=True))).loss

    checkpoint(loss, *leaves, use_reentrant=use_reentrant).backward()
    want = torch.autograd.grad(case.unfused(SPO()), leaves)
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), want)


def test_every_backward_gives_new_gradients() -> None:
    """The last one may overwrite what the others have copied."""
    case = Case()
    leaves = list(case.tensors.values())
    want = torch.autograd.grad(case.unfused(SPO()), leaves)
    loss = case.fused(SPO()).loss
    for factor in (2.0, 1.0, 1.0):
        grads = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
        torch.testing.assert_close(grads, tuple(factor * grad for grad in want))
        for grad in grads:
            grad.zero_()  # in place, as clipping does
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), want)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("first", ["chosen_hidden", "weight", "beta"])
def test_a_second_derivative_is_refused(first: str) -> None:
    """A mixed one too, because with beta held constant it would be a silent 0."""
    case = Case()
    case.beta.requires_grad_()
    leaves = {**case.tensors, "beta": case.beta}
    for second in ("weight", "bias"):
        loss = case.fused(SPO()).loss
        for value in (loss, loss**2):
            (grad,) = torch.autograd.grad(value, leaves[first], create_graph=True)
            with pytest.raises(RuntimeError, match="the fused head has no second derivative"):
                torch.autograd.grad(grad.sum(), leaves[second])


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
