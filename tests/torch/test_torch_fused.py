"""What surrounds the fused head in PyTorch: checkpoints, hooks, autocast, a second backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helpers.fused import INPUTS, Case, flat_logps, flat_spo
from helpers.wings import D, P, T, V
from spoloss import SPO, spo_loss
from spoloss.torch import _exponentials, sequence_logps


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_compiled_block_is_the_eager_one(dtype: torch.dtype) -> None:
    """What CUDA runs as one fused pass, compiled for the CPU here, two blocks of 300 entries."""
    single = torch.promote_types(dtype, torch.float32)
    block, sums_of = (
        torch.compile(function, dynamic=True)
        for function in (_exponentials.exponentials, _exponentials.sums_alone)
    )
    generator = torch.Generator().manual_seed(3)
    # Exponents reach 40, where half an ulp is 16 eps, and each way rounds up to two of them.
    close = {"rtol": 64.0 * torch.finfo(single).eps, "atol": 0.0}
    for rows, softcap in ((1, None), (5, None), (5, 20.0)):
        products = torch.randn(rows, 300, dtype=single, generator=generator) * 5
        targets = torch.randint(0, 300, (rows,), generator=generator)
        whole = _exponentials.Transform(torch.zeros(300, dtype=single), softcap, 1.0, 1.25)
        logits, bend = whole(products)
        bend = torch.ones_like(logits) if bend is None else bend
        want = logits.softmax(dim=1).scatter_(1, targets[:, None], 0.0)
        lse, found = logits.logsumexp(dim=1), []
        mine = eager = alone = _exponentials.Sums.start(products, single)
        for begin, end in ((0, 170), (170, 300)):
            transform = whole._replace(bias=whole.bias[begin:end])
            part = _exponentials.Products(products[:, begin:end], transform, targets, end)
            exps, shift, _, mine = block(part, mine, dtype)
            assert exps.dtype == dtype
            assert exps.max() <= (2**14 if dtype == torch.float16 else 1)
            found.append(exps * (shift - lse).exp()[:, None])
            copy = part._replace(values=part.values.clone())
            exps, _, _, eager = _exponentials.exponentials_(copy, eager, single)
            normal = exps * (eager.peak - lse).exp()[:, None]
            expected = (want * bend)[:, begin:end]
            torch.testing.assert_close(normal, expected, **close)
            alone = sums_of(part, alone)
        ends = 2e-12 if dtype == torch.float16 else 0.0
        rounded = {"rtol": max(close["rtol"], 20.0 * torch.finfo(dtype).eps), "atol": ends}
        torch.testing.assert_close(torch.cat(found, dim=1), want * bend, **rounded)
        for sums in (mine, eager, alone):
            exps = sums.others * (sums.peak - lse).exp()
            torch.testing.assert_close(exps, want.sum(dim=1), **close)
            torch.testing.assert_close(sums.target, logits.gather(1, targets[:, None])[:, 0])


class Upstream:
    """A small network before the head, so that gradients flow on."""

    def __init__(self) -> None:
        case = Case()
        self.case = case
        self.first = torch.randn(
            D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )

    def loss(self, first: Tensor, weight: Tensor, **options: Any) -> Tensor:
        chosen, rejected = (self.case.tensors[name].detach() for name in INPUTS[:2])
        return flat_spo(
            torch.tanh(chosen @ first),
            torch.tanh(rejected @ first),
            weight,
            *self.case.labels,
            *self.case.reference,
            **options,
        ).loss

    def plain(self, first: Tensor, weight: Tensor) -> Tensor:
        chosen, rejected = (self.case.tensors[name].detach() for name in INPUTS[:2])
        logps = [
            sequence_logps(torch.tanh(hidden @ first) @ weight.t(), labels)
            for hidden, labels in zip((chosen, rejected), self.case.labels, strict=True)
        ]
        return spo_loss(*logps, *self.case.reference, beta=0.1)


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


def leaves(upstream: Upstream) -> tuple[Tensor, Tensor]:
    weight = upstream.case.tensors["weight"].detach().clone()
    return upstream.first.clone().requires_grad_(), weight.requires_grad_()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("chunk_size", "backend"),
    [(3, "aot_eager"), pytest.param(None, "inductor", marks=pytest.mark.extended)],
)
def test_compiles_into_one_graph(upstream: Upstream, chunk_size: int | None, backend: str) -> None:
    # The filter: Dynamo instantiates any autograd.Function and so warns of itself (torch 2.13).
    torch.compiler.reset()
    inputs = leaves(upstream)
    compiled = torch.compile(upstream.loss, fullgraph=True, backend=backend)
    got, want = compiled(*inputs, chunk_size=chunk_size), upstream.plain(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_autocast_makes_half_precision_products_and_full_gradients(upstream: Upstream) -> None:
    inputs = [leaf.detach().float().requires_grad_() for leaf in leaves(upstream)]
    for name in INPUTS[:2]:
        upstream.case.tensors[name] = upstream.case.tensors[name].detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = upstream.loss(*inputs)
    assert loss.dtype == torch.float64  # that of the references
    grads = torch.autograd.grad(loss, inputs)
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
    exact = torch.autograd.grad(upstream.loss(*inputs), inputs)
    for grad, want in zip(grads, exact, strict=True):
        error = (grad - want).abs().max() / want.abs().max()
        assert 1e-5 < error < 0.05  # bfloat16 was used, and used well


def test_checkpointing_around_it(upstream: Upstream) -> None:
    inputs = leaves(upstream)
    want = torch.autograd.grad(upstream.plain(*inputs), inputs)
    for use_reentrant in (False, True):
        loss = checkpoint(upstream.loss, *inputs, use_reentrant=use_reentrant)
        loss.backward()
        torch.testing.assert_close(tuple(leaf.grad for leaf in inputs), want)
        for leaf in inputs:
            leaf.grad = None


def test_backward_twice(upstream: Upstream) -> None:
    inputs = leaves(upstream)
    want = torch.autograd.grad(upstream.plain(*inputs), inputs)
    loss = upstream.loss(*inputs)
    for times in (1, 2, 3):
        (loss * 2.0).backward(retain_graph=True)
        for leaf, grad in zip(inputs, want, strict=True):
            torch.testing.assert_close(leaf.grad, 2.0 * times * grad)
        inputs[1].grad.mul_(1.0)  # what clipping does: in place, on what backward returned
    loss.backward()
    for leaf, grad in zip(inputs, want, strict=True):
        torch.testing.assert_close(leaf.grad, 7.0 * grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_gradient_changed_in_place_does_not_reach_back(upstream: Upstream) -> None:
    inputs = leaves(upstream)
    loss = upstream.loss(*inputs)
    (first,) = torch.autograd.grad(loss, inputs[1], retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, inputs[1])
    torch.testing.assert_close(second, kept)


def test_second_derivative_is_refused(upstream: Upstream) -> None:
    inputs = leaves(upstream)
    tokens = flat_logps(upstream.case.tensors["chosen_hidden"], inputs[1], upstream.case.labels[0])
    for value in (upstream.loss(*inputs), upstream.loss(*inputs) ** 2, tokens.sum()):
        (grad,) = torch.autograd.grad(value, inputs[1], create_graph=True)
        with pytest.raises(RuntimeError, match="the fused head has no second derivative"):
            (grad.sum() + inputs[0].sum()).backward()


def test_without_a_gradient_there_is_no_graph() -> None:
    case = Case()
    with torch.no_grad():
        out = case.fused(SPO())
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, case.unfused(SPO()).detach())
    assert Case((False,) * 4).fused(SPO()).loss.grad_fn is None


def test_interleaved_views() -> None:
    both = torch.randn(2 * P, T, D, dtype=torch.float64, requires_grad=True)
    case = Case()
    weight, (chosen, _) = case.tensors["weight"], case.labels
    out = flat_spo(both[::2], both[1::2], weight, chosen, chosen, *case.reference)
    logps = sequence_logps(both @ weight.t(), chosen.repeat_interleave(2, dim=0))
    want = spo_loss(logps[::2], logps[1::2], *case.reference, beta=0.1)
    torch.testing.assert_close(torch.autograd.grad(out.loss, both), torch.autograd.grad(want, both))


def test_a_sharded_weight_is_refused() -> None:
    class Sharded(torch.Tensor):
        """Stands for a DTensor, which is told by this method."""

        def full_tensor(self) -> Tensor:
            raise AssertionError("gathered without being asked")

    weight = torch.zeros(V, D).as_subclass(Sharded)
    with pytest.raises(TypeError, match="Call this inside the forward of the FSDP module"):
        flat_logps(torch.zeros(P, T, D), weight, torch.zeros(P, T).long())


def test_hooks_never_see_a_buffer_overwritten(upstream: Upstream) -> None:
    """Offloading and debugging tools keep what autograd saves, and compare it afterwards."""
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor, tensor.clone()))
        return tensor

    inputs = leaves(upstream)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (upstream.loss(*inputs) * 2.0).backward()
    for tensor, before in kept:
        torch.testing.assert_close(tensor, before, rtol=0.0, atol=0.0)
