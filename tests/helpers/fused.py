"""The fused head of the PyTorch wing against all logits: a case, and calls with flat options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.memory import LargestTensor
from spoloss import SPO, pair_loss
from spoloss.torch import (
    Completions,
    Head,
    _devices,
    _tiles,
    linear_dpo_loss,
    linear_ipo_loss,
    linear_logps,
    linear_pair_loss,
    linear_spo_loss,
    linear_squared_loss,
    sequence_logps,
)

P, T, OTHER_T, D, V = 5, 7, 6, 4, 13


INPUTS = ("chosen_hidden", "rejected_hidden", "weight", "bias")


ALL = (True, True, True, True)


HEAD = {each.name for each in dataclasses.fields(Head)}
COMPLETIONS = {each.name for each in dataclasses.fields(Completions)}


def taken(names: set[str], options: dict[str, Any]) -> dict[str, Any]:
    """The options of these names, which are removed from `options`."""
    return {name: options.pop(name) for name in list(options) if name in names}


def flat_logps(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """`linear_logps` with the options of both objects."""
    head = Head(weight, **taken(HEAD, options))
    return linear_logps(head, Completions(hidden, labels, **taken(COMPLETIONS, options)), **options)


def flat_loss(function: Callable[..., Any], *loss: Any) -> Callable[..., Any]:
    """A fused loss with the options of all objects, and beta = 0.1."""

    def call(
        chosen: Tensor,
        rejected: Tensor,
        weight: Tensor,
        chosen_labels: Tensor,
        rejected_labels: Tensor,
        *references: Any,
        **options: Any,
    ) -> Any:
        head, common = Head(weight, **taken(HEAD, options)), taken(COMPLETIONS, options)
        sides = [
            Completions(
                hidden, labels, token_weights=options.pop(f"{name}_token_weights", None), **common
            )
            for name, hidden, labels in (
                ("chosen", chosen, chosen_labels),
                ("rejected", rejected, rejected_labels),
            )
        ]
        return function(*loss, head, *sides, *references, **{"beta": 0.1, **options})

    return call


def flat_pair(loss: Any, *arguments: Any, **options: Any) -> Any:
    """`linear_pair_loss` with the options of all objects."""
    return flat_loss(linear_pair_loss, loss)(*arguments, **options)


flat_spo, flat_dpo = flat_loss(linear_spo_loss), flat_loss(linear_dpo_loss)
flat_squared, flat_ipo = flat_loss(linear_squared_loss), flat_loss(linear_ipo_loss)


@dataclass
class Case:
    """Five ragged pairs: a prompt, padding, and a chosen answer without any token."""

    need: tuple[bool, ...] = ALL
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        label = lambda *shape: torch.randint(0, V, shape, generator=generator)  # noqa: E731
        shapes = ((P, T, D), (P, OTHER_T, D), (V, D), (V,))
        self.tensors = {
            name: normal(*shape).to(self.device, self.dtype).requires_grad_(need)
            for name, shape, need in zip(INPUTS, shapes, self.need, strict=True)
        }
        chosen, rejected = label(P, T), label(P, OTHER_T)
        chosen[0, :3], rejected[1, 4:], chosen[2] = -100, -100, -100
        self.labels = (chosen.to(self.device), rejected.to(self.device))
        references = (-5 * normal(P).abs(), -5 * normal(P).abs())
        self.reference = tuple(logps.to(self.device) for logps in references)
        number = {"dtype": torch.float64, "device": self.device}
        self.beta = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.5], **number)
        self.weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0], **number)

    def fused(self, loss: Any, **options: Any) -> Any:
        chosen, rejected, weight, bias = self.tensors.values()
        call = {"beta": self.beta, "weights": self.weights, "bias": bias, **options}
        return flat_pair(loss, chosen, rejected, weight, *self.labels, *self.reference, **call)

    def unfused(
        self,
        loss: Any,
        *,
        reduction: str = "mean",
        nll_weight: float = 0.0,
        average: bool = False,
        shift: bool = True,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        with_bias: bool = True,
    ) -> Tensor:
        chosen, rejected, weight, bias = self.tensors.values()

        def logits(hidden: Tensor) -> Tensor:
            z = (hidden @ weight.t() + (bias if with_bias else 0.0)) * logit_scale
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            return z / temperature

        options = {"average": average, "shift": shift}
        value = pair_loss(
            loss,
            sequence_logps(logits(chosen), self.labels[0], **options),
            sequence_logps(logits(rejected), self.labels[1], **options),
            *self.reference,
            beta=self.beta,
            weights=self.weights,
            reduction=reduction,
        )
        nll = -sequence_logps(logits(chosen), self.labels[0], average=True, shift=shift)
        nll = nll * self.weights
        return value + nll_weight * {"mean": nll.mean(), "sum": nll.sum(), "none": nll}[reduction]

    def grads(self, loss: Tensor) -> list[Tensor]:
        upstream = loss.new_tensor([1.0, -2.0, 0.5, 3.0, 1.0])[: loss.numel()]
        wanted = [tensor for tensor in self.tensors.values() if tensor.requires_grad]
        scalar = (loss.flatten() * 1.5 * upstream).sum()
        return [
            torch.zeros_like(tensor) if grad is None else grad
            for tensor, grad in zip(
                wanted, torch.autograd.grad(scalar, wanted, allow_unused=True), strict=True
            )
        ]


def check_fused(case: Case, loss: Any, fused: Callable[..., Any], **options: Any) -> None:
    """Loss and gradients to 1e-10 of the path through the logits."""
    plain = {k: v for k, v in options.items() if k not in ("chunk_size", "bias")}
    got = fused(loss, **options).loss
    want = case.unfused(loss, with_bias="bias" not in options, **plain)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(case.grads(got), case.grads(want), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"average": True, "nll_weight": 0.7},
    {"shift": False, "softcap": 3.0, "logit_scale": 0.5, "temperature": 2.0},
    {"reduction": "sum", "bias": None, "nll_weight": 0.3, "temperature": 0.7},
    {"reduction": "none", "average": True},
]


def with_memory(device: _devices.Device, **changes: int) -> _devices.Device:
    """A device that spends another amount of memory."""
    return device._replace(memory=device.memory._replace(**changes))


def cut_blocks(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Blocks of so many words, however little memory they take."""
    monkeypatch.setattr(_tiles, "LEAST_COLUMNS", columns)
    monkeypatch.setattr(_tiles, "ALIGNED", columns)
    monkeypatch.setattr(_devices, "CPU", with_memory(_devices.CPU, block_bytes=1))


def check_linear_logps(
    chunk_size: int | None, options: dict[str, Any], device: str = "cpu"
) -> None:
    """Sums, averages and single tokens, and gradients, to 1e-10 of those by `sequence_logps`."""
    case = Case(device=device)
    hidden, _, weight, bias = case.tensors.values()
    z = (hidden @ weight.t() + bias) * options.get("logit_scale", 1.0)
    z = 2.0 * torch.tanh(z / 2.0) if options else z
    for average in (False, True):
        got = flat_logps(
            hidden,
            weight,
            case.labels[0],
            bias=bias,
            average=average,
            chunk_size=chunk_size,
            **options,
        )
        want = sequence_logps(z, case.labels[0], average=average)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        inputs, upstream = (hidden, weight, bias), torch.arange(1.0, P + 1).to(got)
        got_grads = torch.autograd.grad(got, inputs, upstream)
        want_grads = torch.autograd.grad(want, inputs, upstream, retain_graph=True)
        torch.testing.assert_close(got_grads, want_grads, rtol=1e-10, atol=1e-12)
    tokens = flat_logps(
        hidden, weight, case.labels[0], bias=bias, per_token=True, chunk_size=chunk_size, **options
    )
    assert tokens.shape == (P, T)
    torch.testing.assert_close(tokens.sum(1), sequence_logps(z, case.labels[0]))
    assert (tokens[0, :2] == 0).all()
    assert (tokens[:, -1] == 0).all()


def check_half_precision(
    dtype: torch.dtype, chunk_size: int | None, device: str = "cpu", loss_scale: float = 1.0
) -> None:
    """Three ways: float64, the path through half-precision logits, and ours.

    A loss that is as small as the loss scale is large has gradients that float16 can't hold before
    they are scaled.
    """
    truth = Case(device=device)
    for name, tensor in Case(dtype=dtype, device=device).tensors.items():
        truth.tensors[name] = tensor.detach().double().requires_grad_()
    naive, ours = (Case(dtype=dtype, device=device) for _ in range(2))
    for case in (truth, naive, ours):
        case.weights /= loss_scale
    exact = truth.unfused(SPO()) * loss_scale
    by_logits = naive.unfused(SPO()) * loss_scale
    fused = ours.fused(SPO(), chunk_size=chunk_size).loss * loss_scale
    pairs = [(exact, by_logits, fused)]
    pairs += list(zip(truth.grads(exact), naive.grads(by_logits), ours.grads(fused), strict=True))
    for want, theirs, mine in pairs:
        size = want.abs().max()
        naive_error = (theirs.double() - want).abs().max() / size
        error = (mine.double() - want).abs().max() / size
        assert error <= naive_error + torch.finfo(dtype).eps


HALF = [torch.bfloat16, torch.float16]


def largest(pairs: int, tokens: int, *, frozen: bool, chunk_size: int = 16) -> int:
    """Bytes of the largest float32 tensor that a forward and backward make."""
    width, vocabulary = 8, 64
    hidden = torch.randn(2, pairs, tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=not frozen)
    labels = torch.randint(0, vocabulary, (2, pairs, tokens))
    with LargestTensor(torch.float32) as watch:
        flat_spo(
            *hidden, weight, *labels, 0.0, 0.0, chunk_size=chunk_size, shift=False
        ).loss.backward()
    return watch.bytes
