"""Long runs, threads, processes, and reruns that give the same bits."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.fused import flat_logps, flat_spo
from spoloss import spo_loss
from spoloss.torch import sequence_logps

WIDTH, VOCABULARY, PAIRS = 8, 32, 4
pytestmark = pytest.mark.usefixtures("one_thread")


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens of chosen and rejected completions; another length at each step."""
    generator = torch.Generator().manual_seed(step)
    length = 3 + step % 11
    tokens = torch.randint(0, VOCABULARY, (2, PAIRS, length), generator=generator)
    tokens[:, 0, 0] = tokens[0, 0, 0]
    return tokens[0], tokens[1]


class Model(nn.Module):
    """One layer of a language model."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.embedding = nn.Parameter(normal(VOCABULARY, WIDTH))
        self.head = nn.Parameter(0.1 * normal(VOCABULARY, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.embedding[tokens])


Loss = Callable[[Model, Tensor, Tensor], Tensor]


def fused(model: Model, chosen: Tensor, rejected: Tensor) -> Tensor:
    states = (model(chosen), model(rejected))
    return flat_spo(*states, model.head, chosen, rejected, 0.0, 0.0, chunk_size=20).loss


def unfused(model: Model, chosen: Tensor, rejected: Tensor) -> Tensor:
    sides = (
        sequence_logps(model(tokens) @ model.head.t(), tokens) for tokens in (chosen, rejected)
    )
    return spo_loss(*sides, 0.0, 0.0, beta=0.1)


def train(loss: Loss) -> tuple[list[float], list[Tensor]]:
    """The loss of each step, and the parameters after the last."""
    model, losses = Model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1000):
        optimizer.zero_grad()
        value = loss(model, *batch(step))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.extended
def test_a_thousand_steps_fused_and_unfused() -> None:
    found, want = train(fused), train(unfused)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    assert (found[1][1] - Model().head).abs().max() > 0.1  # the training has moved the head


def live_bytes() -> int:
    gc.collect()
    tensors = (o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def growth(step: Callable[[int], Any], steps: int = 50) -> int:
    """Bytes of tensors that are alive after many steps and were not after the first ones."""
    for number in range(22):  # every length twice
        step(number)
    before = live_bytes()
    for number in range(steps):
        step(number)
    return live_bytes() - before


@pytest.mark.extended
def test_no_tensor_outlives_its_step() -> None:
    model, kept = Model(), []

    def step(number: int) -> None:
        fused(model, *batch(number)).backward()

    def leaky(number: int) -> None:
        kept.append(fused(model, *batch(number)).detach())

    step(0)
    assert growth(step) <= 0
    assert growth(leaky) > 0


def gradients(number: int) -> list[Tensor]:
    model = Model()
    loss = fused(model, *batch(number))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def test_calls_from_several_threads() -> None:
    want = [gradients(number) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(gradients, range(40)))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def worker(number: int) -> list[Any]:
    torch.set_num_threads(1)
    return [tensor.tolist() for tensor in gradients(number)]


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore:.*fork.*")  # JAX and Python 3.12 warn of every fork
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    want = [[tensor.tolist() for tensor in gradients(number)] for number in range(4)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        got = pool.map(worker, range(4))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def everything(dtype: torch.dtype) -> list[Tensor]:
    """The results of the wing's functions, forward and backward, on large enough tensors."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 3, 40, 16, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(300, 16, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 300, (2, 3, 40), generator=generator)
    labels[:, 0, :20] = -100
    out = flat_spo(*hidden, weight, *labels, 0.0, 0.0, chunk_size=16, nll_weight=0.1)
    offsets = torch.tensor([0, 15, 40])
    packed = flat_logps(hidden[0, :1], weight, labels[0, :1], cu_seqlens=offsets)
    plain = sequence_logps(hidden[1] @ weight.t(), labels[1])
    total = out.loss + packed.sum() + plain.sum()
    return [out.loss.detach(), packed, plain, *torch.autograd.grad(total, (hidden, weight))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_deterministic_algorithms_and_bit_by_bit_again(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, again = everything(dtype), everything(dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, again))
    assert all(tensor.isfinite().all() for tensor in first)
