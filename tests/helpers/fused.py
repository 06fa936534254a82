"""The fused head of the PyTorch wing against all logits: a case, and calls with flat options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import wings
from helpers.memory import LargestTensor
from spoloss.torch import (
    Completions,
    Head,
    _devices,
    _tiles,
    linear_dpo_loss,
    linear_logps,
    linear_pair_loss,
    linear_spo_loss,
)

TORCH = wings.WINGS["torch"]
INPUTS = (*wings.STATES, *wings.HEAD)
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
            Completions(hidden, labels, **common)
            for hidden, labels in ((chosen, chosen_labels), (rejected, rejected_labels))
        ]
        return function(*loss, head, *sides, *references, **{"beta": 0.1, **options})

    return call


def flat_pair(loss: Any, *arguments: Any, **options: Any) -> Any:
    """`linear_pair_loss` with the options of all objects."""
    return flat_loss(linear_pair_loss, loss)(*arguments, **options)


flat_spo, flat_dpo = flat_loss(linear_spo_loss), flat_loss(linear_dpo_loss)


@dataclass
class Case:
    """The tensors of `make_arrays`, as leaves, without reward gaps and weights of tokens."""

    need: tuple[bool, ...] = ALL
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        arrays = wings.make_arrays(TORCH, str(self.dtype).removeprefix("torch."))
        arrays = {name: array.to(self.device) for name, array in arrays.items()}
        needs = dict(zip(INPUTS, self.need, strict=True))
        self.tensors = {name: arrays[name].requires_grad_(needs[name]) for name in INPUTS}
        self.labels = (arrays["chosen_labels"], arrays["rejected_labels"])
        self.reference = (arrays["reference_chosen"], arrays["reference_rejected"])
        self.beta, self.weights = arrays["beta"], arrays["weights"]

    def arrays(self) -> dict[str, Any]:
        found = {**self.tensors, "beta": self.beta, "weights": self.weights}
        for i, side in enumerate(("chosen", "rejected")):
            found |= {f"{side}_labels": self.labels[i], f"reference_{side}": self.reference[i]}
        return found

    def fused(self, loss: Any, **options: Any) -> Any:
        """An option of an array's name replaces the array."""
        return wings.fused(TORCH, loss, self.arrays() | options, **options)

    def unfused(self, loss: Any, **options: Any) -> Any:
        return wings.unfused(TORCH, loss, self.arrays(), **options)

    def grads(self, loss: Tensor) -> list[Tensor]:
        wanted = [tensor for tensor in self.tensors.values() if tensor.requires_grad]
        scalar = wings.upstream(TORCH, loss).sum()
        return list(torch.autograd.grad(scalar, wanted, materialize_grads=True))


def with_memory(device: _devices.Device, **changes: int) -> _devices.Device:
    """A device that spends another amount of memory."""
    return device._replace(memory=device.memory._replace(**changes))


def cut_blocks(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Blocks of so many vocabulary entries, however little memory they take."""
    monkeypatch.setattr(_tiles, "LEAST_COLUMNS", columns)
    monkeypatch.setattr(_tiles, "ALIGNED", columns)
    monkeypatch.setattr(_devices, "CPU", with_memory(_devices.CPU, block_bytes=1))


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
