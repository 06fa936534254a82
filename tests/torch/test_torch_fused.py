"""The fused head against logits -> sequence_logps -> pair_loss, in loss and in every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helpers.fused import (
    HALF,
    INPUTS,
    Case,
    D,
    P,
    T,
    V,
    check_fused,
    check_half_precision,
    check_linear_logps,
    cut_blocks,
    flat_logps,
    flat_pair,
    flat_spo,
    largest,
)
from helpers.memory import LargestTensor
from spoloss import SPO, pair_loss, spo_loss
from spoloss.torch import _exponentials, _gradients, _one_pass, sequence_logps


@pytest.fixture(params=[1, 5])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one or five of the 13 entries."""
    cut_blocks(monkeypatch, request.param)


def forgets_to_rescale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _exponentials.exponentials_

    def wrong(products: Any, sums: Any, dtype: Any) -> Any:
        fresh = sums._replace(others=torch.zeros_like(sums.others))
        found = right(products, fresh, dtype)
        return found._replace(sums=found.sums._replace(others=found.sums.others + sums.others))

    monkeypatch.setattr(_exponentials, "exponentials_", wrong)


def counts_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _exponentials.exponentials_
    monkeypatch.setattr(
        _exponentials,
        "exponentials_",
        lambda products, *others: right(
            products._replace(target=torch.zeros_like(products.target)), *others
        ),
    )


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("wrong", [forgets_to_rescale, counts_the_target])
def test_the_check_catches_wrong_blocks(
    wrong: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong(monkeypatch)
    case = Case((True, True, False, False))
    with pytest.raises(AssertionError):
        check_fused(case, SPO(), case.fused)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_linear_logps_block_by_block(chunk_size: int | None) -> None:
    check_linear_logps(chunk_size, {})
    check_linear_logps(chunk_size, {"softcap": 2.0, "logit_scale": 0.5})


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


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_words_that_a_bias_forbids(dtype: torch.dtype) -> None:
    """Padding of the vocabulary: whole blocks of -inf, the first ones among them."""
    case = Case(dtype=dtype)
    case.labels = tuple(torch.where(y >= 0, 6 + y % 4, y) for y in case.labels)  # type: ignore[assignment]
    with torch.no_grad():
        case.tensors["bias"][:6] = -torch.inf
        case.tensors["bias"][10:] = -torch.inf
    want, got = case.unfused(SPO()), case.fused(SPO()).loss
    # The loss is float64, as the references, but the log-probabilities are not.
    torch.testing.assert_close(got, want, rtol=32.0 * torch.finfo(dtype).eps, atol=0.0)
    for mine, theirs in zip(case.grads(got), case.grads(want), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_vocabulary_of_one_word() -> None:
    hidden, weight = torch.randn(2, P, T, D), torch.randn(1, D, requires_grad=True)
    labels = torch.zeros(P, T).long()
    out = flat_spo(*hidden, weight, labels, labels, 0.0, 0.0)
    assert (out.chosen_logps == 0).all()
    out.loss.backward()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("chunk_size", [3, None])
def test_half_precision_is_no_worse_than_the_naive_path(
    dtype: torch.dtype, chunk_size: int | None
) -> None:
    check_half_precision(dtype, chunk_size)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_scale_keeps_the_gradient_of_a_sure_token(*, compiled: bool, trained: bool) -> None:
    """Its derivative is 8e-8, which float16 cannot hold before it is scaled."""
    weight = (20.0 * torch.eye(3, 2)).half().requires_grad_(trained)  # logits 20, 0, 0
    hidden = torch.tensor([[[1.0, 0.0]]]).half().requires_grad_()
    label, scale = torch.tensor([[0]]), 2.0**16
    call = lambda states: flat_logps(states, weight, label, shift=False).sum() * scale  # noqa: E731
    torch.compiler.reset()
    call = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    (grad,) = torch.autograd.grad(call(hidden), hidden)
    assert grad.dtype == torch.float16
    expected = 20.0 * 2.0 * math.exp(-20.0) * scale
    torch.testing.assert_close(grad[0, 0, 0].item(), expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("chunk_size", [3, None])
def test_a_loss_scale_keeps_small_gradients(chunk_size: int | None) -> None:
    check_half_precision(torch.float16, chunk_size, loss_scale=2.0**24)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("chunk_size", [3, None])
def test_half_precision_keeps_block_by_block(dtype: torch.dtype, chunk_size: int | None) -> None:
    check_half_precision(dtype, chunk_size)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", HALF)
def test_the_check_catches_a_stale_shift(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _one_pass.softmax_of

    def stale(*arguments: Any, **options: Any) -> Any:
        softmax = right(*arguments, **options)
        last = softmax.blocks[-1].shift
        return replace(softmax, blocks=tuple(b._replace(shift=last) for b in softmax.blocks))

    monkeypatch.setattr(_one_pass, "softmax_of", stale)
    with pytest.raises(AssertionError):
        check_half_precision(dtype, None)


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


@pytest.mark.parametrize("chunk_size", [3, None])
def test_torch_func_grad(upstream: Upstream, chunk_size: int | None) -> None:
    first, weight = (leaf.detach() for leaf in leaves(upstream))
    got = torch.func.grad(upstream.loss, argnums=(0, 1))(first, weight, chunk_size=chunk_size)
    torch.testing.assert_close(got, torch.func.grad(upstream.plain, argnums=(0, 1))(first, weight))


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
    frozen = Case((False,) * 4).fused(SPO())
    assert frozen.loss.grad_fn is None
    torch.testing.assert_close(out.loss, case.unfused(SPO()).detach())


def test_ignored_rows_may_hold_anything() -> None:
    case, dirty = Case(), Case()
    with torch.no_grad():
        dirty.tensors["chosen_hidden"][2] = torch.nan
        dirty.tensors["rejected_hidden"][1, 4:] = torch.inf
    want, got = case.fused(SPO()).loss, dirty.fused(SPO()).loss
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(dirty.grads(got), case.grads(want))


def test_interleaved_views() -> None:
    both = torch.randn(2 * P, T, D, dtype=torch.float64, requires_grad=True)
    case = Case()
    weight, (chosen, _) = case.tensors["weight"], case.labels
    out = flat_spo(both[::2], both[1::2], weight, chosen, chosen, *case.reference)
    logps = sequence_logps(both @ weight.t(), chosen.repeat_interleave(2, dim=0))
    want = spo_loss(logps[::2], logps[1::2], *case.reference, beta=0.1)
    torch.testing.assert_close(torch.autograd.grad(out.loss, both), torch.autograd.grad(want, both))


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


def test_a_frozen_head_makes_nothing_of_its_size() -> None:
    wide, tokens = 4096, 16
    hidden = torch.randn(2, 1, tokens, wide, requires_grad=True)
    weight, labels = torch.randn(32, wide), torch.randint(0, 32, (2, 1, tokens))
    for chunk_size in (4, 64):
        with LargestTensor(torch.float32) as watch:
            out = flat_spo(*hidden, weight, *labels, 0.0, 0.0, chunk_size=chunk_size)
            inside = watch.bytes
            out.loss.backward()
        # The hidden gradients of both sides; the weight would be as large as one and a half.
        assert inside <= 2 * tokens * wide * 4
        assert weight.numel() * 4 == 2 * tokens * wide * 4


def test_tiles_of_unequal_height_with_a_frozen_head() -> None:
    """Blocks of a tile of 526 tokens are wider, and hold more logits, than those of 1024."""
    torch.manual_seed(0)
    vocabulary, lengths = 4_160, torch.tensor([512, 263])
    weight = torch.randn(vocabulary, D)
    labels = torch.randint(vocabulary, (2, 2, 512))
    labels[:, torch.arange(512) >= lengths[:, None]] = -100
    hidden = [torch.randn(2, 512, D, requires_grad=True) for _ in range(2)]
    sides = zip(hidden, labels, strict=True)
    logps = [sequence_logps(states @ weight.T, targets, shift=False) for states, targets in sides]
    expected = pair_loss(SPO(), *logps, -40.0, -40.0, beta=1e-3)
    loss = flat_pair(SPO(), *hidden, weight, *labels, -40.0, -40.0, beta=1e-3, shift=False).loss
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_log_probabilities_in_tiles_that_are_shorter_than_they_may_be() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4_160, D, requires_grad=True)
    hidden, labels = torch.randn(1, 1040, D), torch.randint(4_160, (1, 1040))
    logps = flat_logps(hidden, weight, labels, shift=False)  # two tiles of 520 tokens
    expected = sequence_logps(hidden @ weight.T, labels, shift=False)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(each.sum(), weight)[0] for each in (logps, expected)),
        rtol=1e-4,
        atol=1e-5,
    )


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
