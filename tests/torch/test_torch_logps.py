"""sequence_logps against a loop over tokens, cross_entropy, gradcheck and a memory watch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.memory import LargestTensor
from spoloss import spo_loss
from spoloss.torch import _tiles, sequence_logps


def case(dtype: torch.dtype = torch.float64, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, vocabulary, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, vocabulary, (4, 7), generator=generator)
    labels[0, :3] = -100  # a prompt
    labels[1, 5:] = -100  # padding
    labels[2] = -100  # nothing at all
    return logits.to(dtype), labels


def by_hand(logits: Tensor, labels: Tensor, *, shift: bool, average: bool) -> Tensor:
    """One token at a time, in float64."""
    rows = []
    for sequence, targets in zip(logits.double(), labels, strict=True):
        steps = range(1, len(targets)) if shift else range(len(targets))
        terms = [
            sequence[t - shift][targets[t]] - torch.logsumexp(sequence[t - shift], 0)
            for t in steps
            if targets[t] != -100
        ]
        total = torch.stack(terms).sum() if terms else sequence.sum() * 0.0
        rows.append(total / max(len(terms), 1) if average else total)
    return torch.stack(rows)


@pytest.fixture(params=[1, 3, 10**6], ids=lambda rows: f"{rows} rows a tile")
def tile_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "LOGITS_BYTES", request.param * 11 * 8)


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_a_loop_over_tokens(shift: bool, average: bool) -> None:
    logits, labels = case()
    logits.requires_grad_()
    options = {"shift": shift, "average": average}
    got, want = sequence_logps(logits, labels, **options), by_hand(logits, labels, **options)
    torch.testing.assert_close(got, want)
    assert got[2] == 0.0
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    (got_grad,) = torch.autograd.grad(got, logits, upstream)
    (want_grad,) = torch.autograd.grad(want, logits, upstream)
    torch.testing.assert_close(got_grad, want_grad)
    assert (got_grad[2] == 0).all()


@pytest.mark.usefixtures("tile_rows")
def test_derivatives_and_transforms() -> None:
    logits, labels = case()
    function = lambda z: sequence_logps(z, labels)  # noqa: E731
    leaf = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(function, leaf)
    assert torch.autograd.gradgradcheck(function, leaf)
    (want,) = torch.autograd.grad(function(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda z: function(z).sum())(logits), want)
    stacked = torch.stack([logits, 2 * logits])
    torch.testing.assert_close(torch.func.vmap(function)(stacked)[0], function(logits))
    grads = torch.func.vmap(torch.func.grad(lambda z: function(z).sum()))(stacked)
    torch.testing.assert_close(grads[0], want)


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits, labels = case(dtype)
    logits.requires_grad_()
    got = sequence_logps(logits, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), by_hand(logits, labels, shift=True, average=False), rtol=1e-5, atol=1e-5
    )
    (grad,) = torch.autograd.grad(got.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(sequence_logps(exact, labels).sum(), exact)
    assert grad.dtype == dtype
    # One rounding to the half dtype of a gradient made in float32.
    torch.testing.assert_close(grad, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_sure_token_keeps_its_gradient_in_half_precision() -> None:
    logits = torch.tensor([[[8.0, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    sequence_logps(logits, torch.tensor([[0]]), shift=False).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0, 0].item(), 3.3535e-4, rtol=5e-3, atol=0.0)


def test_rows_that_do_not_count_may_hold_anything() -> None:
    logits, labels = case()
    want = sequence_logps(logits, labels)
    logits[2] = torch.nan
    logits[:, -1] = torch.inf
    logits.requires_grad_()
    got = sequence_logps(logits, labels)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_another_ignore_index_and_label_dtype() -> None:
    logits, labels = case()
    other = torch.where(labels == -100, 0, labels)
    used = torch.where((labels == -100) | (other == 0), -100, labels)
    torch.testing.assert_close(
        sequence_logps(logits, other.int(), ignore_index=0), sequence_logps(logits, used)
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph_with_the_loss() -> None:
    # The filter: Dynamo instantiates any autograd.Function and so warns of itself (torch 2.13).
    _, labels = case()

    def function(chosen: Tensor, rejected: Tensor) -> Tensor:
        return spo_loss(
            sequence_logps(chosen, labels), sequence_logps(rejected, labels), 0.0, 0.0, beta=0.1
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [case()[0].requires_grad_(), (case()[0] * 0.5).requires_grad_()]
    want = torch.autograd.grad(function(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), want)


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


def test_bad_input() -> None:
    logits, labels = case()
    with pytest.raises(ValueError, match=r"logits must have shape \[B, T, V\], got \(7, 11\)"):
        sequence_logps(logits[0], labels[0])
    with pytest.raises(ValueError, match=r"labels must have .* = \(4, 7\) of logits, got \(4, 6\)"):
        sequence_logps(logits, labels[:, 1:])
    with pytest.raises(TypeError, match=r"logits must be real floating, got torch\.int64"):
        sequence_logps(logits.long(), labels)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=f"labels must be integer, got {dtype}"):
            sequence_logps(logits, labels.to(dtype))
